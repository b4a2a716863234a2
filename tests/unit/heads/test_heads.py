"""Heads are saved, listed and loaded with a model; folders of version 0.2 still open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, load_file, save_file

from ctclip.config import objective_configs
from ctclip.errors import CheckpointError, ConfigError, CtclipError
from ctclip.evaluation.calibration import Calibration, Line
from ctclip.heads.caption import CaptionHead
from ctclip.heads.decode import DecodeHead
from ctclip.heads.decoder import Decoder, Networks
from ctclip.heads.folder import calibration_file, list_heads, load_head, save_head, write_prompt_head
from ctclip.heads.head import Head
from ctclip.heads.linear import LinearHead
from ctclip.heads.locator import LocateHead, Locator
from ctclip.heads.prior import Prior, PriorHead
from ctclip.heads.prompts import PromptHead
from ctclip.heads.text import TextHead
from ctclip.labels import labels_of_columns, load_labels
from ctclip.models.checksums import write_checksums
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import load_model, save_model
from ctclip.objectives.captioning import Captioning, captioning
from ctclip.objectives.objective import Context
from ctclip.objectives.words import WordDecoder
from ctclip.prompts import load_prompts
from tests.unit.small import VIT, dual_encoder, spec_of

LABELS = labels_of_columns("clinic", ["Gallstones", "Lung nodule"])
SPEC = spec_of((8, 16, 12), (3.0, 1.5, 1.5))
CALIBRATION = Calibration(
    method="platt", fitted_on="valid", model="m", lines={"Lung nodule": Line(2.0, -0.5, 0.3, 10, 40)}
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return dual_encoder(VIT, SPEC, standardise=True).eval()


@pytest.fixture(scope="module")
def volumes() -> torch.Tensor:
    return torch.rand(3, 1, *SPEC.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


# From the networks of a decoder.
TINY: dict[str, Any] = {"channels": (8,), "latent": 2, "width": (32,), "depth": 1}


def heads_of(model: DualEncoder) -> dict[str, Head]:
    torch.manual_seed(1)
    return {
        "prompts": PromptHead(model, load_prompts("graded"), LABELS.names),
        "linear": LinearHead(model, LABELS.names, torch.randn(2, 12), torch.randn(2), relu=True),
        "probe-2": LinearHead(model, LABELS.names, torch.randn(2, 12), torch.randn(2)),
        "captions": CaptionHead(model, decoder_of(model), load_prompts("generic"), LABELS.names),
        "prior": PriorHead(model, Prior("mlp", 12, width=16), load_prompts("generic"), LABELS.names),
        "locator": LocateHead(model, Locator([8, 4], 12, features=16), load_prompts("graded"), LABELS.names),
        "volumes": DecodeHead(
            model,
            Decoder(SPEC.shape, 12, Networks(**TINY)),
            Prior("diffusion", 12, 8, 1),
            load_prompts("graded"),
            LABELS.names,
        ),
        "texts": TextHead(model, LABELS.names, ["Normal lungs."]),
    }


def decoder_of(model: DualEncoder) -> WordDecoder:
    objective = Captioning(objective_configs({"captioning": 1})["captioning"], Context(model))
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return objective.decoder


def write_heads(folder: Path, heads: dict[str, Head]) -> None:
    for name, head in heads.items():
        save_head(folder, name, head)


def scored(head: Head, model: DualEncoder, volumes: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        encoded = model.encode(volumes)
        scores = head.score(encoded)
        return [scores, head.values(encoded), head.probabilities(scores)]


def test_heads_are_written_listed_and_read_again(tmp_path: Path, model: DualEncoder, volumes: torch.Tensor) -> None:
    save_model(tmp_path / "model", model, LABELS)
    assert list_heads(tmp_path / "model")[0].name == "prompts", "a folder without heads/ is taken for one of 0.2"
    written = heads_of(model)
    for name, head in written.items():
        head.calibration = CALIBRATION if name != "probe-2" else None
        save_head(tmp_path / "model", name, head)
    facts = {one.name: (one.kind, one.supervision, one.calibrated) for one in list_heads(tmp_path / "model")}
    assert facts == {
        "captions": ("caption", "none", True),
        "linear": ("linear", "label-supervised", True),
        "locator": ("locate", "none", True),
        "prior": ("prior", "none", True),
        "probe-2": ("linear", "label-supervised", False),
        "prompts": ("prompts", "none", True),
        "texts": ("text", "none", True),
        "volumes": ("decode", "none", True),
    }
    loaded = load_model(tmp_path / "model")
    for name, head in written.items():
        again = load_head(loaded.path, name, loaded.model)
        assert type(again) is type(head)
        assert again.names == LABELS.names
        assert again.values_of == head.values_of
        assert again.calibration == head.calibration
        assert again.thresholds() == ({"Lung nodule": 0.3} if name != "probe-2" else {})
        for one, other in zip(scored(again, loaded.model, volumes), scored(head, model, volumes), strict=True):
            assert torch.equal(one, other), name
        assert again.identity() == head.identity()
    assert len({head.identity() for head in written.values()}) == len(written)


def test_a_linear_head_is_a_linear_map_of_the_embedding(model: DualEncoder, volumes: torch.Tensor) -> None:
    heads, embedding = heads_of(model), model.encode_volume(volumes).detach()
    for name, features in (("linear", embedding.clamp(min=0)), ("probe-2", embedding)):
        head = heads[name]
        assert isinstance(head, LinearHead)
        expected = torch.stack([(features * row).sum(dim=1) for row in head.weight], dim=1) + head.bias
        torch.testing.assert_close(scored(head, model, volumes)[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(embedding, embedding.clamp(min=0))
    with pytest.raises(
        CheckpointError, match=r"linear head with weights \(2, 5\) and biases \(2,\); expected 2 labels of 12"
    ):
        LinearHead(model, LABELS.names, torch.zeros(2, 5), torch.zeros(2))


def test_a_calibrated_probability_is_the_sigmoid_of_its_line(model: DualEncoder) -> None:
    head = heads_of(model)["linear"]
    scores = torch.tensor([[0.4, 0.4], [-1.0, 3.0]])
    assert torch.equal(head.probabilities(scores), scores.sigmoid())
    plain = head.identity()
    head.calibration = CALIBRATION
    lines = torch.stack([scores[:, 0], 2 * scores[:, 1] - 0.5], dim=1)
    torch.testing.assert_close(head.probabilities(scores), 1 / (1 + torch.exp(-lines)))
    assert head.identity() != plain


def test_a_head_of_the_same_name_is_replaced_and_others_stay(tmp_path: Path, model: DualEncoder) -> None:
    heads = heads_of(model)
    heads["linear"].calibration = CALIBRATION
    save_head(tmp_path, "linear", heads["linear"])
    save_head(tmp_path, "prompts", heads["prompts"])
    save_head(tmp_path, "linear", heads["probe-2"])
    again = load_head(tmp_path, "linear", model)
    assert isinstance(again, LinearHead)
    assert not again.relu
    assert again.calibration is None, "a calibration of the head before is not the new one's"
    assert {path.name for path in (tmp_path / "heads").iterdir()} == {"linear", "prompts"}
    for name in ("", ".hidden", "../prompts", "a b"):
        with pytest.raises(CheckpointError, match="is not a valid name for a head"):
            save_head(tmp_path, name, heads["linear"])


def test_prompts_are_kept_without_being_encoded(tmp_path: Path, model: DualEncoder, volumes: torch.Tensor) -> None:
    write_prompt_head(tmp_path, load_prompts("graded"), LABELS.names)
    head = load_head(tmp_path, "prompts", model)
    expected = scored(heads_of(model)["prompts"], model, volumes)
    for one, other in zip(scored(head, model, volumes), expected, strict=True):
        assert torch.equal(one, other)
    assert calibration_file(tmp_path, "prompts") == tmp_path / "heads" / "prompts" / "calibration.json"
    with pytest.raises(CheckpointError, match=r"no head 'linear' \(it has: prompts\)"):
        calibration_file(tmp_path, "linear")
    with pytest.raises(CheckpointError, match=r"no head 'linear' \(it has: prompts\)"):
        load_head(tmp_path, "linear", model)


def test_a_damaged_head_is_named(tmp_path: Path, model: DualEncoder) -> None:
    folder = save_head(tmp_path, "linear", heads_of(model)["linear"])
    weights = folder / "linear.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    write_checksums(folder)
    with pytest.raises(CheckpointError, match=r"heads/linear: its linear head is missing or damaged"):
        load_head(tmp_path, "linear", model)
    save_file(load(whole) | {"bias": torch.tensor([0.0, torch.nan])}, weights)
    write_checksums(folder)
    with pytest.raises(CheckpointError, match=r"linear\.safetensors: bias holds values that are not finite"):
        load_head(tmp_path, "linear", model)
    weights.write_bytes(whole)
    write_checksums(folder)
    (folder / "head.yaml").write_text("kind: evil_plugin:Head\nnames: [a]\n")
    with pytest.raises(ConfigError, match="code of the model's author; if you trust it, import evil_plugin first"):
        load_head(tmp_path, "linear", model)
    (folder / "head.yaml").write_text("[]")
    with pytest.raises(CheckpointError, match=r"head\.yaml: has no .kind."):
        list_heads(tmp_path)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize("content", [BOMB, "[" * 50000, "\x80\x81", "kind: mlp\ndim: 12\nwidth: 100000000\ndepth: 2\n"])
@pytest.mark.parametrize("name", ["prompts", "linear", "captions", "locator", "prior", "texts"])
def test_a_head_of_a_stranger_is_read_as_bounded_data(
    name: str, content: str, tmp_path: Path, model: DualEncoder
) -> None:
    """Every settings file in turn: aliases, deep nesting, no text, and sizes that do not match the weights."""
    folder = save_head(tmp_path, name, heads_of(model)[name])
    for path in sorted(folder.glob("*.yaml")):
        whole = path.read_bytes()
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(CtclipError):
            load_head(tmp_path, name, model)
        path.write_bytes(whole)
    load_head(tmp_path, name, model)


SIZES = [("captions", key) for key in ("vocabulary", "width", "token_width", "length", "depth")]
SIZES += [("prior", key) for key in ("dim", "width", "depth")]
SIZES += [("locator", key) for key in ("widths", "text", "features", "waves")]


@pytest.mark.parametrize(("name", "key"), SIZES)
def test_a_head_is_built_with_the_sizes_of_its_weights_alone(
    name: str, key: str, tmp_path: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one line in a foreign file would take all memory."""
    folder = save_head(tmp_path, name, heads_of(model)[name])
    path = folder / {"captions": "decoder.yaml", "prior": "prior.yaml", "locator": "locator.yaml"}[name]
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), key: 4000}))
    for built in ("caption.WordDecoder", "prior.Prior", "locator.Locator"):
        monkeypatch.setattr(f"ctclip.heads.{built}", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_head(tmp_path, name, model)


@pytest.mark.parametrize("with_prompts", [True, False])
def test_a_folder_of_0_2_still_opens(
    tmp_path: Path, model: DualEncoder, volumes: torch.Tensor, with_prompts: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written by 0.2: prompts, classifier and calibration at the top level, no label set, and the spacing and HU window
    of the spec repeated in the architecture."""
    labels = load_labels("ct_rate_18")
    torch.manual_seed(1)
    linear = LinearHead(model, labels.names, torch.randn(18, 12), torch.randn(18), relu=True)
    prompts = PromptHead(model, load_prompts("report_style"), labels.names)
    prompts.calibration = CALIBRATION
    folder = tmp_path / "model"
    save_model(
        folder, model, labels, card="# A run\n\nsupervision: reports only\n",
        write_more=lambda partial: write_heads(partial, {"prompts": prompts, "linear": linear}),
    )  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name in ("init", "init_sides"):
        config.pop(name)
    for name in ("tuning", "lora_rank"):
        config["volume"].pop(name)
    config["volume"] |= {"spacing": list(SPEC.spacing), "hu_window": list(SPEC.hu_window)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if with_prompts:
        (folder / "heads" / "prompts" / "prompts.yaml").rename(folder / "prompts.yaml")
    (folder / "heads" / "prompts" / "calibration.json").rename(folder / "calibration.json")
    save_file(load_file(folder / "heads" / "linear" / "linear.safetensors"), folder / "classifier.safetensors")
    for path in sorted((folder / "heads").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "heads").rmdir()
    for name in ("labels.yaml", "trained_on.yaml"):
        (folder / name).unlink()

    loaded = load_model(folder)
    assert capsys.readouterr().err.strip() == (
        f"note: {folder}: written by an earlier version without a label set; ct_rate_18 is assumed"
    )
    assert loaded.labels == labels
    assert loaded.trained_on.supervision == "reports only"
    facts = [(one.name, one.kind, one.calibrated) for one in list_heads(folder)]
    assert facts == [("prompts", "prompts", True), ("linear", "linear", False)]
    assert calibration_file(folder, "prompts") == folder / "calibration.json"
    for name, head in (("prompts", prompts), ("linear", linear)):
        again = load_head(folder, name, loaded.model)
        assert again.names == labels.names
        assert again.calibration == head.calibration
        for one, other in zip(scored(again, loaded.model, volumes), scored(head, model, volumes), strict=True):
            assert torch.equal(one, other), name
    with pytest.raises(CheckpointError, match=r"no head 'probe' \(it has: prompts, linear\)"):
        load_head(folder, "probe", loaded.model)
    # It may be overwritten, like any model folder of ctclip.
    save_model(folder, model, labels)
    assert (folder / "labels.yaml").is_file()


def test_a_0_2_model_that_was_trained_as_if_the_spec_were_another_stays_so(
    tmp_path: Path, model: DualEncoder, volumes: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stated spacing determined its positions; its scans are nevertheless prepared with the spec."""
    save_model(tmp_path / "model", model, LABELS)
    config = yaml.safe_load((tmp_path / "model" / "config.yaml").read_text())
    config["volume"] |= {"spacing": [1.5, 1.5, 3.0], "hu_window": list(SPEC.hu_window)}
    (tmp_path / "model" / "config.yaml").write_text(yaml.safe_dump(config))
    loaded = load_model(tmp_path / "model")
    assert "trained as if spacing were [1.5, 1.5, 3.0], although the spec of its volumes says [3.0, 1.5, 1.5]" in (
        capsys.readouterr().err
    )
    assert loaded.spec == SPEC
    other = dual_encoder(VIT, spec_of(SPEC.shape, (1.5, 1.5, 3.0)), standardise=True).eval()
    assert torch.equal(loaded.model.encode_volume(volumes), other.encode_volume(volumes))
    assert not torch.equal(loaded.model.encode_volume(volumes), model.encode_volume(volumes))


def test_a_caption_head_tells_the_likelihood_that_it_was_trained_on(model: DualEncoder, volumes: torch.Tensor) -> None:
    """The loss of the objective is the mean per word of the sum that the head computes over a text."""
    decoder, texts = decoder_of(model), ["Gallstones are seen.", "No lung nodule."]
    head = CaptionHead(model, decoder, load_prompts("generic"), LABELS.names)
    with torch.no_grad():
        encoded = model.encode(volumes)
        likelihoods = head.log_likelihood(encoded, texts)
        assert likelihoods.shape == (3, 2)
        for column, text in zip(likelihoods.T, texts, strict=True):
            words = model.text_encoder.whole([text] * 3, 24)
            loss = captioning(decoder, words["input_ids"], words["attention_mask"], encoded)
            counted = int(words["attention_mask"][0].sum()) - 1
            assert float(column.mean()) == pytest.approx(-float(loss) * counted, rel=1e-5)
        scores = head.score(encoded)
    prompts = load_prompts("generic")
    for column, name in zip(scores.T, LABELS.names, strict=True):
        sides = [head.log_likelihood(encoded, prompts.side(name, positive)).mean(dim=1) for positive in (True, False)]
        torch.testing.assert_close(column, sides[0] - sides[1])


def test_a_decoder_of_another_model_is_refused(tmp_path: Path, model: DualEncoder) -> None:
    head = CaptionHead(model, WordDecoder(200, 40, 16), load_prompts("generic"), LABELS.names)
    save_model(tmp_path / "model", model, LABELS)
    folder = save_head(tmp_path / "model", "captions", head)
    with pytest.raises(CheckpointError, match="expects tokens of width 40, but those of the model have 24"):
        load_head(tmp_path / "model", "captions", model)
    (folder / "decoder.safetensors").write_bytes(b"nothing")
    write_checksums(folder)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_head(tmp_path / "model", "captions", model)
