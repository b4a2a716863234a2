"""The locator: it finds planted cells of held-out volumes without knowing their positions, for every encoder, and is
saved, loaded and used by explanations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

import ctclip
from ctclip.adaptation import locate
from ctclip.adaptation import sharpen as sharpening
from ctclip.adaptation.caption import prompts_of
from ctclip.adaptation.locate import (
    COLUMNS,
    Drawn,
    LocateConfig,
    Stated,
    _draw,
    fit_locator,
    run_locate,
    stated_sentences,
)
from ctclip.adaptation.plan import least_certain
from ctclip.adaptation.sharpen import Meanings, choose, sharpen
from ctclip.adaptation.sides import fit_sides, side_cleaner
from ctclip.adaptation.stages import STATE
from ctclip.drafting.drafter import Drafting
from ctclip.drafting.store import draft_store
from ctclip.errors import CheckpointError, ExplanationError
from ctclip.explanation.method import Subject, method
from ctclip.heads.folder import list_heads, load_head
from ctclip.heads.locator import SIZE, WEIGHTS, Cells, LocateHead, Locator, levels_of
from ctclip.inference.scans import StoredScans
from ctclip.inference.sides import surest
from ctclip.models.checksums import write_checksums
from ctclip.models.encoded import Level
from ctclip.models.folder import load_model
from ctclip.preprocessing import prepare
from ctclip.preprocessing.store import VolumeStore
from ctclip.sentences import sentences
from tests.unit.drafting.conftest import Clinic, clinic, clinic_files  # noqa: F401
from tests.unit.explanation.known import SPEC as KNOWN
from tests.unit.explanation.known import known_model
from tests.unit.small import spec_of

GRID, SPEC, AFFINE = (4, 4, 4), spec_of((8, 8, 8), (2.0, 2.0, 2.0)), np.diag([4.0, 4.0, 4.0, 1.0])


def planted(count: int, random: np.random.Generator) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Volumes of 64 cells with two findings, each in half of the volumes at a random cell: features (count, 64, 6),
    present (count, 2) bool, place (count, 2)."""
    cells = random.normal(0, 0.3, (count, 64, 6)).astype(np.float32)
    present = random.random((count, 2)) < 0.5
    place = np.stack([random.permutation(64)[:2] for _ in range(count)])
    for volume in range(count):
        for finding in np.flatnonzero(present[volume]):
            # Neither channel is unusual by itself: the first finding has both, the second has one without the other.
            cells[volume, place[volume, finding], :2] += (2, 2) if finding == 0 else (2, -2)
    return torch.from_numpy(cells), present, place


def learned(count: int, config: LocateConfig, held: np.ndarray) -> tuple[Locator, pd.DataFrame, torch.Tensor, Stated]:
    cells, present, _ = planted(300, np.random.default_rng(0))
    position = Cells([Level(cells, GRID, AFFINE)], SPEC).position
    texts = F.normalize(torch.tensor([[1.0, 0.1, 0.2], [-0.2, 1.0, 0.1]]), dim=-1)
    stated = Stated(texts, torch.from_numpy(present[:count].astype(np.int8)), torch.zeros(3))
    drawn = [Drawn([cells[row]], position, row) for row in range(count)]
    locator, losses = fit_locator(drawn, stated, held, config, 0)
    return locator, pd.DataFrame(losses, columns=list(COLUMNS)), texts, stated


def test_planted_cells_are_found_in_volumes_that_were_not_learned() -> None:
    locator, losses, texts, _ = learned(240, LocateConfig(features=64, waves=1), np.arange(240) % 10 == 0)
    cells, present, place = planted(300, np.random.default_rng(0))
    assert losses["held_out_loss"].min() < losses["held_out_loss"].max()
    found, highest = [], []
    for volume in range(240, 300):
        # Texts of any length, like the prompts of a model that standardises.
        maps, _ = locator.maps([Level(cells[volume : volume + 1], GRID, AFFINE)], SPEC, 3 * texts)
        for finding in np.flatnonzero(present[volume]):
            found.append(int(maps[finding].argmax()) == place[volume, finding])
        highest.append(maps.amax(dim=1).numpy())
    assert np.mean(found) > 0.9
    seen = np.array(highest)
    assert seen[present[240:]].mean() > 2 * seen[~present[240:]].mean()


def test_the_regression_is_scikit_learns_at_the_best_strength_of_held_out_volumes() -> None:
    held = np.arange(120) % 10 == 0
    locator, losses, _, stated = learned(120, LocateConfig(features=16, waves=1), held)
    cells, _, _ = planted(300, np.random.default_rng(0))
    position = Cells([Level(cells, GRID, AFFINE)], SPEC).position
    features = torch.stack([locator.features([cells[row]], position) for row in range(120)]).double().numpy()
    targets = stated.targets(0.55).double().numpy()[:, None].repeat(64, axis=1)
    train = features[~held].reshape(-1, locator.width), targets[~held].reshape(-1, 3)
    scale = len(train[0]) * np.cov(train[0].T, bias=True).trace() / locator.width
    fitted = [Ridge(alpha=strength * scale).fit(*train) for strength in losses["ridge"]]
    expected = [
        np.square(one.predict(features[held].reshape(-1, locator.width)) - targets[held].reshape(-1, 3)).sum(1).mean()
        for one in fitted
    ]
    np.testing.assert_allclose(losses["held_out_loss"], expected, rtol=1e-4)
    best = fitted[int(np.argmin(expected))]
    np.testing.assert_allclose(locator.weight, best.coef_.T, atol=1e-3)
    # A map, which is computed grid by grid, equals this regression of each cell.
    maps, _ = locator.maps([Level(cells[:1], GRID, AFFINE)], SPEC, torch.eye(3))
    np.testing.assert_allclose(maps.T, best.predict(features[0]), atol=2e-3)


def test_a_round_of_chosen_cells_learns_what_the_first_stage_cannot() -> None:
    random = np.random.default_rng(0)
    # A finding has two channels of equal sign; every volume has cells with two channels of opposite sign, so that neither
    # channel, nor a sum of them, tells the finding.
    cells, present = random.normal(0, 0.65, (300, 64, 6)).astype(np.float32), random.random(300) < 0.5
    places = np.stack([random.permutation(64)[:7] for _ in range(300)])
    sign = random.choice([-2.5, 2.5], (300, 7))
    for row in range(300):
        for number, place in enumerate(places[row]):
            cells[row, place, :2] += sign[row, number] * np.array([1, 1 if number == 0 and present[row] else -1])
    features, held = torch.from_numpy(cells), np.arange(240) % 10 == 0
    levels = [[Level(features[row : row + 1], GRID, AFFINE)] for row in range(300)]
    position = Cells(levels[0], SPEC).position
    texts = F.normalize(torch.tensor([[1.0, 0.1, 0.2]]), dim=-1)
    stated = Stated(texts, torch.from_numpy(present[:240, None].astype(np.int8)), torch.zeros(3))
    drawn = [Drawn([features[row]], position, row) for row in range(240)]
    locator, _ = fit_locator(drawn, stated, held, LocateConfig(features=24, waves=0), 0)

    def found() -> float:
        rows = [row for row in range(240, 300) if present[row]]
        peaks = [int(locator.maps(levels[row], SPEC, texts)[0][0].argmax()) for row in rows]
        return float(np.mean(peaks == places[rows, 0]))

    before, meanings = found(), Meanings.of(stated.sentences, stated.says, 0.9)
    for _ in range(2):
        own = [
            choose(locator, levels[row], SPEC, texts, *meanings.draw(row, random), row, random) for row in range(240)
        ]
        losses = sharpen(locator, [one for one in own if one is not None], texts, held, 30, 0)
    after = found()
    assert (before < 0.9, after > 0.9, after > before + 0.1) == (True, True, True), (before, after)
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < 0.5, "held-out volumes"
    assert locator.rounds == 2
    assert not any(parameter.requires_grad for parameter in locator.parameters())


def test_a_stated_sentence_chooses_cells_and_an_unstated_one_describes_none() -> None:
    cells, _, _ = planted(1, np.random.default_rng(0))
    locator = Locator([6], 3, features=8, waves=1)
    torch.nn.init.normal_(locator.weight)
    level, texts = Level(cells, GRID, AFFINE), F.normalize(torch.eye(3), dim=-1)
    chosen = choose(locator, [level], SPEC, texts, [2], [0], 5, np.random.default_rng(0))
    assert chosen is not None
    assert chosen.row == 5
    assert chosen.queries.tolist() == [2, 0]
    assert len(chosen.position) == 64, "all cells, since more were to be drawn than there are"
    values, known = locator.maps([level], SPEC, texts, centred=True)
    described = chosen.described[:, 0] == 1
    assert torch.equal(chosen.position[described], known.position[values[2].argmax()][None])
    # Other cells of a volume with the finding may show it too.
    assert set(chosen.described[:, 0].tolist()) == {1, -1}
    assert set(chosen.described[:, 1].tolist()) == {0}
    assert choose(locator, [level], SPEC, texts, [], [], 5, np.random.default_rng(0)) is None
    # Cells that are not real are never chosen, even if they respond most.
    real = torch.ones(1, 64, dtype=torch.bool)
    real[0, values[2].topk(9).indices] = False
    seen = choose(locator, [level._replace(real=real)], SPEC, texts, [2], [0], 5, np.random.default_rng(0))
    assert seen is not None
    assert torch.equal(seen.position, known.position[real[0]])
    assert (seen.described[:, 0] == 1).sum() == 1
    nothing = level._replace(real=torch.zeros_like(real))
    assert choose(locator, [nothing], SPEC, texts, [2], [0], 5, np.random.default_rng(0)) is None


def test_cells_without_influence_are_not_chosen() -> None:
    cells, _, _ = planted(1, np.random.default_rng(0))
    locator = Locator([6], 3, features=8, waves=1)
    torch.nn.init.normal_(locator.weight)
    level, texts = Level(cells, GRID, AFFINE), F.normalize(torch.eye(3), dim=-1)
    values, known = locator.maps([level], SPEC, texts, centred=True)
    place = int(values[2].topk(9).indices[8])
    influence = torch.full((1, 64), 1e-6)
    influence[0, place] = 0.5
    chosen = choose(locator, [level], SPEC, texts, [2], [0], 5, np.random.default_rng(0), influence)
    assert chosen is not None
    assert torch.equal(chosen.position[chosen.described[:, 0] == 1], known.position[place][None])
    # What is not stated is not weighted: besides the described cell and a random one, the strongest cells are drawn.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpening, "RANDOM", 1)
        patch.setattr(sharpening, "UNSTATED", 2)
        few = choose(locator, [level], SPEC, texts, [2], [0], 5, np.random.default_rng(0), influence)
    assert few is not None
    strongest = known.position[values[0].topk(10).indices]
    among = [bool((strongest == position).all(dim=1).any()) for position in few.position]
    assert sum(among) >= len(among) - 2 >= 1


def test_held_out_volumes_do_not_change_what_is_learned() -> None:
    cells, _, _ = planted(12, np.random.default_rng(0))
    texts, held = F.normalize(torch.eye(3), dim=-1), np.arange(12) >= 8
    learned = []
    for count in (12, 8):
        locator = Locator([6], 3, features=8, waves=1)
        with torch.no_grad():
            for number, weight in enumerate([locator.weight, locator.offset, *locator.random]):
                weight.copy_(torch.sin(torch.arange(weight.numel()) + number).view_as(weight))
        random = np.random.default_rng(0)
        levels = [[Level(cells[row : row + 1], GRID, AFFINE)] for row in range(count)]
        drawn = [choose(locator, levels[row], SPEC, texts, [row % 2], [2], row, random) for row in range(count)]
        losses = sharpen(locator, [one for one in drawn if one is not None], texts, held, 2, 0)
        assert np.isnan(losses[-1][1]) == (count == 8)
        learned.append(locator.weight.clone())
    torch.testing.assert_close(*learned)


def test_the_values_of_a_map() -> None:
    model, head = known_model(KNOWN)
    volume = torch.rand(1, 1, *KNOWN.shape) * 2 - 1
    levels = levels_of(model.volume_encoder, volume, tokens=False, halves=False)
    for rounds in (0, 2):
        locator = Locator([level.features.shape[2] for level in levels], model.config.dim, features=8, rounds=rounds)
        torch.nn.init.normal_(locator.weight)
        log_odds, _ = locator.maps(levels, KNOWN, head.texts()[:1])
        found = method("learned").maps(Subject(model, head, [0], volume, locator=locator)).values[0].ravel()
        p = torch.sigmoid(log_odds[0].double())
        expected = -torch.log1p(-p) if rounds else log_odds[0].clamp(min=0).double()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert (log_odds < 0).any()


def test_every_meaning_is_drawn_as_often_where_it_is_absent_as_where_it_is_stated() -> None:
    random = np.random.default_rng(0)
    # Two wordings of one meaning, a rare one, and one that is unclear in the first volume.
    sentences = F.normalize(torch.tensor([[1.0, 0.02, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=-1)
    says = torch.from_numpy((random.random((400, 4)) < [0.3, 0.3, 0.05, 0.2]).astype(np.int8))
    says[:, 0] = says[:, 1]
    says[0, 3] = -1
    meanings = Meanings.of(sentences, says, 0.9)
    assert meanings.group.tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(meanings.rate, (says[:, 1:] == 1).double().mean(dim=0))
    count = np.zeros((2, 4))
    for draw in range(4000):
        present, absent = meanings.draw(draw % 400, random)
        assert (says[draw % 400, present] == 1).all()
        assert (says[draw % 400, absent] == 0).all()
        assert len({*meanings.group[present]}) == len(present)
        for kind, numbers in enumerate((present, absent)):
            np.add.at(count[kind], numbers, 1)
    assert count[0, 0] == pytest.approx(count[0, 1], rel=0.2), "either wording"
    np.testing.assert_allclose(count[1, 2:], count[0, 2:], rtol=0.2)


def test_a_draw_prefers_what_is_unusual_and_leaves_out_what_is_not_real() -> None:
    weights = np.ones(100)
    weights[7], weights[50:] = 40.0, 0.0
    drawn = np.concatenate([_draw(weights, 10, np.random.default_rng(seed)) for seed in range(200)])
    count = np.bincount(drawn, minlength=100)
    assert count[50:].sum() == 0
    assert count[7] > 3 * count[:50].mean()
    assert count[:50].min() > 0
    assert list(_draw(np.eye(1, 9)[0], 4, np.random.default_rng(0))) == [0]


def test_a_locator_of_another_model_and_none_are_one_line() -> None:
    model, head = known_model(KNOWN)
    volume = torch.zeros(1, 1, *KNOWN.shape)
    other = Locator([5], model.config.dim, features=8)
    with pytest.raises(ExplanationError, match="belongs to another model"):
        method("learned").maps(Subject(model, head, [0], volume, locator=other))
    with pytest.raises(ExplanationError, match="ctclip adapt --method locate"):
        method("learned").maps(Subject(model, head, [0], volume))


def test_a_half_cell_holds_its_voxels() -> None:
    model, _ = known_model(KNOWN)
    hu = np.random.default_rng(0).uniform(-1000, 1000, (24, 36, 40)).astype(np.float32)
    volume = torch.from_numpy(hu / 1000)[None, None]
    # Cells of the known encoder are 4 x 6 x 5 voxels.
    halves = levels_of(model.volume_encoder, volume, tokens=False, halves=True)[-1]
    blocks = hu.reshape(12, 2, 12, 3, 20, 2).transpose(0, 2, 4, 1, 3, 5).reshape(12 * 12 * 20, -1)
    lung, soft = np.interp(blocks, [-1000, -500], [-1, 1]), np.interp(blocks, [-160, 240], [-1, 1])
    expected = [blocks.mean(1) / 1000, blocks.min(1) / 1000, blocks.max(1) / 1000]
    np.testing.assert_allclose(halves.features[0, :, :3].T, expected, atol=1e-5)
    for channel, window in ((3, lung), (4, soft)):
        difference = halves.features[0, :, channel].numpy() - window.mean(1)
        assert difference.std() < 1e-4, "a window's mean, up to a constant that is standardised away"
    np.testing.assert_allclose(halves.affine @ [0, 0, 0, 1], [2.0, 2.5, 1.5, 1.0])


def test_each_fine_cell_lies_in_the_coarse_cell_around_it() -> None:
    fine = Level(torch.zeros(1, 64, 2), GRID, np.array([[4.0, 0, 0, 1], [0, 4, 0, 1], [0, 0, 4, 1], [0, 0, 0, 1]]))
    coarse = Level(
        torch.zeros(1, 8, 3), (2, 2, 2), np.array([[8.0, 0, 0, 3], [0, 8, 0, 3], [0, 0, 8, 3], [0, 0, 0, 1]])
    )
    within = Cells([coarse, fine], SPEC).within
    assert torch.equal(within[1], torch.arange(64))
    expected = np.arange(8).reshape(2, 2, 2).repeat(2, 0).repeat(2, 1).repeat(2, 2).ravel()
    np.testing.assert_array_equal(within[0], expected)


def test_a_sentence_of_the_same_meaning_is_stated_and_an_absence_states_nothing(clinic: Clinic) -> None:  # noqa: F811
    loaded = load_model(clinic.model)
    table = pd.DataFrame({
        "findings": ["Nodule here. No effusion.", "No nodule. No effusion.", "nodule here.", "A wide effusion."],
        "impression": [""] * 4,
    })  # fmt: skip
    stated = stated_sentences(loaded, table, LocateConfig(same=0.999, other=0.998), "the store")
    # "Nodule here." and "nodule here." have the same embedding.
    assert sorted(map(tuple, stated.says.T.tolist())) == [(0, 0, 0, 1), (1, 0, 1, 0), (1, 0, 1, 0)]
    targets = stated.targets(0.9)
    fits = targets @ stated.sentences.T
    assert (fits[stated.says.bool()].min() > fits[~stated.says.bool()].max()).item()


def test_a_locator_is_trained_kept_loaded_and_used(clinic: Clinic, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ExplanationError, match="no locator"):
        ctclip.load(clinic.model).explain(clinic.scan, "Nodule", method="learned", hu="trust-file")
    weights = load_file(clinic.model / "model.safetensors")
    config = LocateConfig(cells=8, features=8, same=0.9, other=0.8, rounds=1, epochs=2)
    folder = run_locate(load_model(clinic.model), clinic.store, tmp_path / "out", config)
    again = load_file(clinic.model / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items()), "the encoders must not change"
    losses = pd.read_csv(tmp_path / "out" / "locate.csv")
    assert list(losses.columns) == list(COLUMNS)
    # The round after those that were asked for weighs cells by their influence.
    assert losses["stage"].tolist()[-4:] == [f"round {number}, epoch {epoch}" for number in (1, 2) for epoch in (1, 2)]
    assert np.isfinite(losses["loss"]).all()
    assert {head.name: head.kind for head in list_heads(clinic.model)}["locate"] == "locate"
    model = ctclip.load(clinic.model)
    assert model.method() == "learned"
    assert model.explain(clinic.scan, "Nodule", hu="trust-file").method == "learned"
    assert model.find(clinic.scan, "a nodule", hu="trust-file").explanation.method == "learned"
    assert model.explain(clinic.scan, "Nodule", method="similarity", hu="trust-file").method == "similarity"
    located = load_head(clinic.model, "locate", model.dual)
    assert located.certain == {}, "too few reports name a side"
    located.certain = {"Nodule": 0.25, "Effusion": 1.5}
    located.save(folder)
    write_checksums(folder)
    model = ctclip.load(clinic.model)
    assert model._located().certain == {"Nodule": 0.25, "Effusion": 1.5}
    drafted = model.draft(clinic.scan, hu="trust-file")
    placed = [claim.place for part in drafted.sections.values() for one in part for claim in one.claims if claim.place]
    assert {place.method for place in placed} == {"learned"}
    left = {"left": 1.0, "right": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctclip.drafting.drafter.by_side", lambda values, affine, prepared: left)
        patch.setattr("ctclip.drafting.store.stored_by_side", lambda values, affine, voxels, spec: left)
        drafter = model.drafter(Drafting())
        patch.setattr(drafter.detector, "thresholds", lambda: dict.fromkeys(drafter.detector.names, 0.0))
        scans = StoredScans(VolumeStore(clinic.store), "train", model.spec, clinic.model)
        stored = draft_store(drafter, scans, {}, count=1)["findings"][0]
        assert ["on the left" in sentence.lower() for sentence in sentences(stored)] == [True, False], stored
        ready = prepare(clinic.scan, model.spec, hu="trust-file")
        assert drafter.draft(ready, "scan", places=False).text("findings") == stored
    one = model.detect(clinic.scan, head="locate", hu="trust-file").probabilities
    assert one == model.detect(clinic.scan, hu="trust-file").probabilities, "scores are those of the prompts"
    # As version 1.0 wrote it.
    size = (folder / SIZE).read_text()
    assert "rounds: 2" in size
    (folder / SIZE).write_text(size.replace("rounds: 2\n", ""))
    assert load_head(clinic.model, "locate", model.dual).locator.rounds == 0
    (folder / SIZE).write_text(size)
    kept = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b"no")
    write_checksums(folder)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_head(clinic.model, "locate", model.dual)
    (folder / WEIGHTS).write_bytes(kept)
    write_checksums(folder)
    (folder / SIZE).write_text((folder / SIZE).read_text().replace("features: 8", "features: 800000"))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_head(clinic.model, "locate", model.dual)
    other = Locator([3], 5, features=8)
    save_file(other.state_dict(), folder / WEIGHTS)
    write_checksums(folder)
    (folder / SIZE).write_text(json.dumps(other.size))
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        load_head(clinic.model, "locate", model.dual)


def test_the_last_round_weighs_the_cells_of_at_most_so_many_volumes(
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, one_influence = list[torch.Tensor](), locate.influence

    def counted(model: Any, volume: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(volume)
        return one_influence(model, volume, *rest)

    monkeypatch.setattr(locate, "influence", counted)
    for count in (0, 7):
        config = LocateConfig(cells=8, features=8, same=0.9, other=0.8, rounds=1, influence_volumes=count, epochs=1)
        run_locate(load_model(clinic.model), clinic.store, tmp_path / str(count), config, head=f"locate{count}")
        stages = pd.read_csv(tmp_path / str(count) / "locate.csv")["stage"].tolist()
        assert ("round 2, epoch 1" in stages) == (count > 0)
        assert len({float(volume.double().sum()) for volume in seen}) == len(seen), "each volume its own"
        assert (len(seen) > 1, len(seen) <= count) == (count > 1, True)


def test_an_interrupted_training_resumes_and_gives_the_same_locator(
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LocateConfig(cells=8, features=8, same=0.9, other=0.8, rounds=2, epochs=2)
    whole = load_file(run_locate(load_model(clinic.model), clinic.store, tmp_path / "whole", config) / WEIGHTS)
    assert not (tmp_path / "whole" / STATE).exists()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def stopped_in_round(number: int, *rest: Any) -> Any:
        return stopped() if number == 1 else one_round(number, *rest)

    output, one_round = tmp_path / "again", locate._round
    monkeypatch.setattr(locate, "_round", stopped_in_round)
    with pytest.raises(KeyboardInterrupt):
        run_locate(load_model(clinic.model), clinic.store, output, config)
    state = (output / STATE).read_bytes()
    monkeypatch.setattr(locate, "_round", one_round)
    monkeypatch.setattr(locate, "fit_locator", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_locate(load_model(clinic.model), clinic.store, output, config, seed=1)
    (output / STATE).write_bytes(state[:-9])
    with pytest.raises(CheckpointError, match="damaged; delete it and run the same command again"):
        run_locate(load_model(clinic.model), clinic.store, output, config)
    (output / STATE).write_bytes(state)
    again = load_file(run_locate(load_model(clinic.model), clinic.store, output, config) / WEIGHTS)
    assert not (output / STATE).exists()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert (output / "locate.csv").read_text() == (tmp_path / "whole" / "locate.csv").read_text()


def test_a_side_is_certain_from_the_share_on_at_which_hardly_any_was_wrong() -> None:
    def _least(seen: list[tuple[float, bool]]) -> float | None:
        return least_certain(*(torch.tensor(part) for part in zip(*seen, strict=True)))

    right = [(0.9 - number / 100, True) for number in range(40)]
    assert _least(right) == pytest.approx(0.51)
    assert _least([*right, *((share - 0.005, False) for share, _ in right[20:])]) == pytest.approx(0.70, abs=0.011)
    assert _least(right[:14]) is None, "too few"
    assert _least([(share, number % 2 == 0) for number, (share, _) in enumerate(right)]) is None
    assert surest({"left": 0.8, "right": 0.0, "both": 0.2}, 0.7) == "left"
    assert surest({"left": 0.8, "right": 0.0, "both": 0.2}, 0.9) == ""
    assert surest({}, 0.1) == ""


def test_the_sides_of_stored_volumes_are_learned_from_reports_that_name_them(
    clinic: Clinic,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reports name the side of the stronger half in all volumes but two, whose maps hardly differ between the sides."""
    loaded = load_model(clinic.model)
    scans = StoredScans(VolumeStore(clinic.store), "train", loaded.spec, loaded.path)
    scans.table = pd.concat([scans.table] * 30).iloc[:24].reset_index(drop=True)
    sides = ["left" if row % 3 else "right" for row in range(24)]
    scans.table["findings"] = [f"There is a nodule on the {side}." for side in sides]
    scans.table["impression"] = ""
    said = iter(sides)

    def halves(*_: object) -> dict[str, float]:
        side = next(said)
        other = "right" if side == "left" else "left"
        return {side: 0.9, other: 1.0} if len(list_of) in (3, 9) else {side: 1.0, other: 0.1}

    list_of: list[int] = []
    monkeypatch.setattr("ctclip.adaptation.sides.stored_by_side", lambda *given: (halves(*given), list_of.append(1))[0])
    head = LocateHead(loaded.model, Locator([1], loaded.model.config.dim, features=8), prompts_of(loaded), loaded.labels.names)  # fmt: skip
    maps = SimpleNamespace(values=[None], affine=None)
    monkeypatch.setattr("ctclip.adaptation.sides.method", lambda name: SimpleNamespace(maps=lambda subject: maps))
    refused: dict[str, str] = {}
    cleaner = side_cleaner(loaded, "english")
    assert cleaner is not None
    assert fit_sides(loaded, head, scans, range(24), cleaner, refused) == {"Nodule": pytest.approx(0.9)}
    assert not refused
    scans.table["findings"] = "There is a nodule on the left."
    said = iter(["left"] * 24)
    assert fit_sides(loaded, head, scans, range(24), cleaner, refused) == {}, "a side that is always the same"


def test_the_certain_sides_of_held_out_volumes_are_saved_with_the_locator(
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[int]] = []

    def fitted(loaded: object, head: object, scans: StoredScans, rows: list[int], *_: object) -> dict[str, float]:
        asked.append(rows)
        patients = scans.table["patient"]
        assert not set(patients.iloc[rows]) & set(patients.drop(patients.index[rows])), "whole patients"
        return {"Nodule": 0.5}

    monkeypatch.setattr(locate, "fit_sides", fitted)
    config = LocateConfig(cells=8, features=8, same=0.9, other=0.8, rounds=0)
    run_locate(load_model(clinic.model), clinic.store, tmp_path / "out", config)
    assert len(asked[0]) >= 1
    assert ctclip.load(clinic.model)._located().certain == {"Nodule": 0.5}
