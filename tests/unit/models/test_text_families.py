"""Text encoders of every family: trained from a folder, saved, loaded without it, and the same to 1e-6."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, REPORTS, family_folder

from ctclip.config import ModelConfig, TextConfig, objective_configs
from ctclip.labels import labels_of_columns
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.folder import load_model, save_model
from ctclip.models.vit3d import ViT3DConfig
from ctclip.objectives.objective import Context
from ctclip.training.step import Pairs, Part, TrainingStep
from tests.unit.small import spec_of

SPEC, LABELS = spec_of((8, 8, 8)), labels_of_columns("two", ["Nodule", "Effusion"])
VOLUME = ViT3DConfig(patch=(4, 4, 4), stages=(), width=16, depth=1, heads=2, registers=1)
TEXTS = [*REPORTS[:4], " ".join(REPORTS), ""]
TUNINGS = ("full", "frozen", "lora")


@pytest.fixture(scope="module")
def table() -> object:
    """One line a round trip, printed at the end (``-s``)."""
    lines: list[tuple[str, str, str, str]] = []
    yield lines
    print(f"\n{'family':16} {'pooling':10} {'tuning':8} largest difference")
    for line in lines:
        print("{:16} {:10} {:8} {}".format(*line))


def dual_encoder(folder: Path, **text: object) -> DualEncoder:
    torch.manual_seed(1)
    return build_model(
        ModelConfig(volume=VOLUME, text=TextConfig(pretrained=str(folder), lora_rank=2, **text), dim=8), SPEC
    )


def train_one_step(model: DualEncoder) -> None:
    """One step of AdamW; every parameter that learns must have a gradient."""
    step = TrainingStep(Context(model.train()), objective_configs({"clip": 1}))
    learning = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    volumes = torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    part = Part(volumes, model.text_encoder.tokenise(TEXTS[1:5]))
    loss, _ = step(part, Pairs(torch.arange(4), torch.arange(4), {}))
    loss.backward()
    assert [name for name, parameter in learning.items() if parameter.grad is None] == []
    optimizer.step()
    model.eval()


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
