"""Text encoders of every family: trained from a folder, saved, loaded without it, and the same to 1e-6."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from ctclip.models.folder import load_model, save_model
from tests.unit.models.families import FAMILIES, family_folder
from tests.unit.models.pretrained import LABELS, TEXTS, dual_encoder, train_one_step

TUNINGS = ("full", "frozen", "lora")


@pytest.fixture(scope="module")
def table() -> object:
    """One line per round trip, printed at the end (``-s``)."""
    lines: list[tuple[str, str, str, str]] = []
    yield lines
    print(f"\n{'family':16} {'pooling':10} {'tuning':8} largest difference")
    for line in lines:
        print("{:16} {:10} {:8} {}".format(*line))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_folder_of_any_family_scores_as_the_model_did(name: str, tmp_path: Path, table: list) -> None:
    family = FAMILIES[name]
    pretrained = family_folder(name, tmp_path / "pretrained")
    for number, tuning in enumerate(TUNINGS):
        pooling = family.poolings[number]
        model = dual_encoder(pretrained, tuning=tuning, pooling=pooling)
        text = model.text_encoder
        assert (len(text.reading.prefix), len(text.reading.suffix)) == family.special
        assert text.max_tokens == (family.longest or 512)
        before = model.eval().encode_text(TEXTS).detach()
        train_one_step(model)
        expected = model.encode_text(TEXTS).detach()
        assert expected.isfinite().all()
        assert (expected - before).abs().max() > 1e-4, "a step changes something"
        save_model(tmp_path / tuning, model, LABELS)
        away = pretrained.rename(tmp_path / "away")
        loaded = load_model(tmp_path / tuning).model
        away.rename(pretrained)
        difference = float((loaded.encode_text(TEXTS) - expected).detach().abs().max())
        table.append((name, pooling, tuning, f"{difference:.1e}"))
        assert difference <= 1e-6
        shutil.rmtree(tmp_path / tuning)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_is_encoded_as_transformers_does(name: str, tmp_path: Path) -> None:
    """The tokenizer's own ids, padded by it, through the family's own class; the token that stands for the text is the
    one that Transformers itself takes."""
    folder = family_folder(name, tmp_path)
    family, texts = FAMILIES[name], TEXTS[:3]
    kind = {"clip": hf.CLIPTextModel, "t5": hf.T5EncoderModel}.get(name, hf.AutoModel)
    theirs, tokenizer = kind.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    with torch.no_grad():
        output = theirs(input_ids=ids, attention_mask=mask)
    hidden, length = output.last_hidden_state, mask.sum(dim=1)
    last = hidden[torch.arange(len(texts)), length - 1]
    expected = {
        "mean": torch.stack([row[:size].mean(dim=0) for row, size in zip(hidden, length, strict=True)]),
        "last": last,
        "cls": output.pooler_output if name == "clip" else hidden[:, 0],
    }
    for pooling in set(expected) & set(family.poolings):
        ours = dual_encoder(folder, pooling=pooling).text_encoder.eval()
        assert torch.allclose(ours(**ours.tokenise(texts)), expected[pooling], atol=2e-6), pooling
