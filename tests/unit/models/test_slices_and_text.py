"""The slice encoder, a frozen text encoder's memory, named sizes, an imported linear probe, Hugging Face's conventions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

import ctclip
from ctclip.config import ModelConfig, TextConfig
from ctclip.config_files import load_config, load_size
from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import labels_of_columns
from ctclip.models.dual_encoder import build_model, build_volume_encoder
from ctclip.models.folder import load_model, save_model
from ctclip.models.sizes import measure
from ctclip.models.slices import SlicesConfig
from ctclip.models.text import build_text_encoder, load_tokenizer, train_tokenizer
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.small import spec_of

LABELS = labels_of_columns("two", ["Nodule", "Effusion"])
SPEC = spec_of((6, 20, 24), (3.0, 1.5, 1.5))
SENTENCES = ["The heart is enlarged.", "No pleural effusion is seen.", "A nodule lies in the upper lobe."]


@pytest.fixture(scope="module", params=["vit", "resnet", "clip"])
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face writes it, of a small 2-D model."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    made = {
        "vit": lambda: ViTModel(ViTConfig(image_size=16, patch_size=8, **layers)),
        "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config={**layers, "vocab_size": 50}, vision_config={**layers, "image_size": 16, "patch_size": 8})
        ),
    }[request.param]()  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return folder


def volume(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 1, 6, 20, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "values", [{"image_mean": [0.4, "x", 0.4]}, {"image_mean": [[0.4]] * 3}, {"image_std": [0.2, 0.0, 0.2]}, {"image_std": [float("nan")] * 3}]
)  # fmt: skip
def test_colours_that_are_no_numbers_are_named(vision: Path, values: dict, tmp_path: Path) -> None:
    shutil.copytree(vision, tmp_path / "vision")
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json: image_\w+ does not hold (finite|positive) numbers"
    ):
        build_volume_encoder(SlicesConfig(pretrained=str(tmp_path / "vision")), SPEC)


@pytest.mark.parametrize("aggregator", ["mean", "lstm", "transformer", "cross"])
def test_slices_of_any_vision_model(vision: Path, aggregator: str) -> None:
    torch.manual_seed(0)
    config = SlicesConfig(pretrained=str(vision), aggregator=aggregator, heads=2, slices_at_once=5)
    encoder = build_volume_encoder(config, SPEC).eval()
    assert encoder.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    found = encoder(volume())
    assert found.grid == (6, 1, 1)
    assert found.pooled.shape == (2, encoder.width)
    alone = torch.cat([encoder(part).pooled for part in volume().split(1)])
    assert torch.allclose(found.pooled, alone, atol=1e-5)
    # Padded slices change nothing: neither their content nor their number.
    padded = torch.cat([torch.full((2, 1, 2, 20, 24), 0.3), volume(), torch.full((2, 1, 2, 20, 24), 0.9)], dim=2)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    mask[:, :, 2:8] = True
    assert torch.allclose(encoder(padded, mask).pooled, found.pooled, atol=1e-5)
    encoder.train()
    encoder(volume()).pooled.square().sum().backward()
    still = [name for name, p in encoder.aggregate.named_parameters() if p.grad is None]
    assert still == []


def test_a_slice_encoder_sees_windows_as_colours(vision: Path) -> None:
    encoder = build_volume_encoder(SlicesConfig(pretrained=str(vision), aggregator="mean"), spec_of((1, 16, 16))).eval()
    shown: list[torch.Tensor] = []
    encoder.vision.register_forward_pre_hook(
        lambda _, args, kwargs: shown.append(kwargs["pixel_values"]), with_kwargs=True
    )
    water = torch.zeros(1, 1, 1, 16, 16)
    encoder(water)
    expected = [(1000 / 1400 - 0.4) / 0.2, (160 / 400 - 0.4) / 0.2, (500 / 1500 - 0.4) / 0.2]
    assert shown[0][0, :, 8, 8].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_model_of_slices_stands_without_the_folder_it_came_from(vision: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        volume=SlicesConfig(pretrained=str(vision), heads=2),
        text=TextConfig(width=16, depth=1, heads=2, max_tokens=16), dim=12,
    )  # fmt: skip
    made = build_model(config, SPEC, train_tokenizer(SENTENCES * 20, 200)).eval()
    save_model(tmp_path / "model", made, LABELS)
    settings = tmp_path / "model" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(vision), "gone"))
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.model.encode_volume(volume()), made.encode_volume(volume()))


def test_a_folder_without_a_vision_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no vision model could be loaded"):
        build_volume_encoder(SlicesConfig(pretrained=str(tmp_path)), SPEC)


def test_a_frozen_text_encoder_reads_a_report_once() -> None:
    torch.manual_seed(0)
    config = TextConfig(width=16, depth=1, heads=2, max_tokens=32, tuning="frozen")
    encoder = build_text_encoder(config, train_tokenizer(SENTENCES * 20, 200)).train()
    assert not encoder.bert.training
    rows: list[int] = []
    encoder.bert.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = encoder(**encoder.tokenise(SENTENCES[:2]))
    again = encoder(**encoder.tokenise([SENTENCES[2], SENTENCES[1], SENTENCES[0]]))
    assert rows == [2, 1]
    assert torch.allclose(again[[2, 1]], first, atol=1e-6)
    fresh = build_text_encoder(config, encoder.tokenizer)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.allclose(again, fresh(**fresh.tokenise([SENTENCES[2], SENTENCES[1], SENTENCES[0]])), atol=1e-6)


def test_named_sizes_stand_for_the_model_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmodel: tiny\n")
    config = load_config(str(recipe), ["model.dim=64"])
    assert config.model == load_size("tiny").model_copy(update={"dim": 64})
    spec = PreprocessingSpec.load("ct_224")
    sizes = [measure(load_size(name), spec) for name in ("tiny", "small", "base", "large")]
    assert [s.flops for s in sizes] == sorted(s.flops for s in sizes)
    tiny = build_model(load_size("tiny"), spec, train_tokenizer(SENTENCES * 20, 200))
    assert sizes[0].volume_parameters == sum(p.numel() for p in tiny.volume_encoder.parameters())


def test_what_a_model_costs_is_printed() -> None:
    from typer.testing import CliRunner

    from ctclip.cli import app

    shown = CliRunner().invoke(app, ["models", "ct_clip"]).stdout
    # Of the published sizes, layer by layer: convolution, attention, feed-forward.
    layer = 28 * 512 + 512 * (2 + 256 + 512 + 256) + 64 + 512 * (2 + 2730 + 1365)
    patches, places = 4000 * 514 + 512 * 3, 2 * 512 + 512 + 512 * 513 + 513 * 8
    assert f" {(8 * layer + patches + places + 4 * 512) / 1e6:.1f} M " in shown
    # A multiplication and an addition for each weight of a linear map and token; scores, their weighted sums; codes.
    linear = 8 * 512 * (256 + 512 + 256 + 2730 + 1365 + 27) + 4000 * 512
    attention = 4 * 2 * 256 * (576 + 24)
    flops = 2 * 24**3 * (linear + attention + 8192 * 512)
    assert float(shown.splitlines()[3].split("│")[-2]) == pytest.approx(flops / 1e9, rel=0.01)


def test_what_to_do_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json, or vocab\.txt with tokenizer_config\.json.*--text-encoder"
    ) as said:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(said.value)


def test_saved_and_loaded_as_hugging_face_does(tmp_path: Path) -> None:
    from ctclip.inference.model import Model

    made = build_model(
        ModelConfig(volume=load_size("tiny").volume, text=TextConfig(width=16, depth=1, heads=2), dim=12),
        PreprocessingSpec.load("ct_224"),
        train_tokenizer(SENTENCES * 20, 200),
    )
    save_model(tmp_path / "one", made, LABELS)
    ctclip.load(str(tmp_path / "one")).save_pretrained(tmp_path / "two")
    two = Model.from_pretrained(str(tmp_path / "two"))
    assert torch.equal(two.encode_text(SENTENCES), made.eval().encode_text(SENTENCES))
    assert two.folder.hash == ctclip.load(str(tmp_path / "one")).folder.hash


TEXTS = ["The heart is enlarged.", "No nodule.", "A nodule of 5 mm lies in the upper lobe."]


def test_attention_pooling_weighs_words_and_never_padding() -> None:
    torch.manual_seed(0)
    config = TextConfig(width=16, depth=1, heads=2, max_tokens=24, pooling="attention", vocabulary=200)
    text = build_text_encoder(config, train_tokenizer(TEXTS * 10, 200)).eval()
    whole = text(**text.tokenise(TEXTS))
    for row, one in zip(whole, TEXTS, strict=True):
        assert torch.allclose(text(**text.tokenise([one]))[0], row, atol=1e-5), "shorter beside longer ones"
    tokens = text.tokenise(TEXTS[:1])
    hidden = text.bert(**{name: tokens[name] for name in ("input_ids", "attention_mask")}).last_hidden_state[0]
    weights = (hidden @ text.attention.weight[0] + text.attention.bias).softmax(dim=0)
    assert torch.allclose(whole[0], (weights[:, None] * hidden).sum(dim=0), atol=1e-5)
    text(**text.tokenise(TEXTS)).square().sum().backward()
    assert text.attention.weight.grad.abs().sum() > 0


def test_lora_learns_beside_weights_that_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TextConfig(width=16, depth=1, heads=2, max_tokens=24, vocabulary=200)
    scratch = build_text_encoder(config, train_tokenizer(TEXTS * 10, 200))
    scratch.bert.save_pretrained(tmp_path)
    scratch.tokenizer.save_pretrained(tmp_path)
    lora = {"tuning": "lora", "lora_rank": 2}
    with pytest.raises(ConfigError, match=r"name one in model\.text\.pretrained"):
        build_text_encoder(config.model_copy(update=lora), scratch.tokenizer)
    text = build_text_encoder(config.model_copy(update={**lora, "pretrained": str(tmp_path)})).eval()
    assert torch.allclose(text(**text.tokenise(TEXTS)), scratch.eval()(**scratch.tokenise(TEXTS)), atol=1e-5)
    learned = {name for name, p in text.named_parameters() if p.requires_grad}
    assert learned
    assert all("lora_" in name for name in learned)
    before = {name: p.detach().clone() for name, p in text.named_parameters()}
    first = text(**text.tokenise(TEXTS)).detach()
    optimizer = torch.optim.SGD([p for p in text.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        text(**text.tokenise(TEXTS))[:, 0].sum().backward()
        optimizer.step()
    moved = {name for name, p in text.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= learned
    with torch.no_grad():
        assert not torch.allclose(text(**text.tokenise(TEXTS)), first, atol=1e-4)
        with text.bert.disable_adapter():
            assert torch.allclose(text(**text.tokenise(TEXTS)), first, atol=1e-5), "an adapter begins as nothing"
