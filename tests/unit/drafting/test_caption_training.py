"""A caption head is trained with the encoder frozen, saved in heads/, and writes the reports that it has learned."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import ctclip
from ctclip.adaptation.caption import CaptionConfig, _padded, run_caption
from ctclip.cli import main
from ctclip.heads.caption import CaptionHead, Decoding, ReportTokens
from ctclip.heads.folder import list_heads
from ctclip.models.folder import load_model
from ctclip.preprocessing.store import VolumeStore
from tests.unit.drafting.conftest import Clinic, report
from tests.unit.drafting.test_service_drafts import check_caption_drafts

CONFIG = CaptionConfig(depth=1, heads=2, length=96, epochs=80, batch=8, learning_rate=0.01, told=0.5)


def test_a_caption_head_is_trained_kept_and_loaded_again(clinic: Clinic, tmp_path: Path) -> None:
    weights = load_file(clinic.model / "model.safetensors")
    folder = run_caption(load_model(clinic.model), clinic.store, tmp_path / "out", CONFIG)
    assert folder == clinic.model / "heads" / "caption"
    again = load_file(clinic.model / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items()), "the encoders must not change"
    losses = pd.read_csv(tmp_path / "out" / "caption.csv")["loss"]
    assert losses.iloc[-1] < 0.5 * losses.iloc[0]
    assert not list((tmp_path / "out").glob("*.partial"))
    assert {head.name: head.kind for head in list_heads(clinic.model)}["caption"] == "caption"
    model = ctclip.load(clinic.model)
    head = model.head("caption")
    assert isinstance(head, CaptionHead)
    assert (head.sections, head.prompted) == (("findings", "impression"), True)
    store = VolumeStore(clinic.store)
    without, encoded = (model.encode(torch.from_numpy(store.voxels(name))[None, None]) for name in ("v00", "v01"))
    # With few reports no side is certain, so none is written.
    unsided = tuple(text.replace(" on the left", "").lower() for text in report(1))
    cases = (
        (encoded, ["Nodule"], unsided),
        (encoded, None, unsided),
        (without, [], report(0)),
        (without, None, report(0)),
    )
    for scan, told, expected in cases:
        written = head.generate(scan, Decoding(), told)
        assert tuple(text.lower() for text in written.values()) == tuple(text.lower() for text in expected)
    for side in ("left", "right"):
        assert (
            f"nodule is seen on the {side}"
            in head.generate(encoded, Decoding(), [f"Nodule {side}"])["findings"].lower()
        )
    assert head.generate(without, Decoding(), ["Nodule"]) != head.generate(without, Decoding(), []), "told is heard"
    both = encoded._replace(
        tokens=torch.cat([encoded.tokens, without.tokens]), pooled=torch.cat([encoded.pooled, without.pooled])
    )
    each = [head.generate(encoded, Decoding(), ["Nodule left"]), head.generate(without, Decoding(), [])]
    assert head.write(both, Decoding(), [["Nodule left"], []]) == each, "texts do not depend on their batch"
    for decoding in (Decoding(beams=2), Decoding(nucleus=0.9, seed=3)):
        assert head.generate(encoded, decoding, []) == head.generate(encoded, decoding, [])
    assert head.score(encoded).shape == (1, 2)
    check_caption_drafts(model, store)


def test_the_prefix_is_not_learned_and_tells_nothing_by_default(clinic: Clinic) -> None:
    model = load_model(clinic.model).model
    tokens = ReportTokens(model.text_encoder, 48, prompted=True)
    (plain, first), (told, second) = tokens.whole(["a", "b"], None), tokens.whole(["a", "b"], ["Nodule"])
    assert plain[:first] == [*tokens.before, tokens.end]
    assert told[second:] == plain[first:]
    assert plain.count(tokens.end) == 3
    ids, mask, learned = _padded([(plain, first), (told, second)])
    assert learned.sum(dim=1).tolist() == [len(plain) - first, len(told) - second]
    assert (mask.sum(dim=1).tolist(), ids.shape) == ([len(plain), len(told)], (2, len(told)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shots", "3"), "--method caption reads no labels"),
        (("--head", "prompts"), "has a head 'prompts' of its own"),
        (("depht=2",), "depht"),
    ],
)
def test_bad_options_are_one_line(
    words: tuple[str, ...], message: str, clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["adapt", "--method", "caption", "--model", str(clinic.model), "--store", str(clinic.store)]
    assert main([*given, "--output", str(tmp_path / "out"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
