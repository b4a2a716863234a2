"""Starting from a model: copied weights, frozen layers, learning rates that decrease towards the input, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ctclip.adaptation.recipes import merge_adapters
from ctclip.config import FreezeConfig, TextConfig, TrainingConfig, objective_configs
from ctclip.errors import ConfigError
from ctclip.labels import load_labels
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import load_model, save_model
from ctclip.models.lora import merged_state
from ctclip.models.resnet3d import ResNet3DConfig
from ctclip.models.slices import SlicesConfig
from ctclip.models.start import freeze, rate_factors, take_weights, text_layers
from ctclip.models.text import with_lora
from ctclip.models.vit3d import ViT3DConfig
from ctclip.objectives.objective import Context
from ctclip.training.optimizer import parameter_groups
from ctclip.training.step import TrainingStep
from tests.unit.small import REPORTS, dual_encoder, spec_of

SHAPE = (16, 16, 24)
SPEC = spec_of(SHAPE, (3.0, 1.5, 1.5))
VIT = ViT3DConfig(stages=(), width=24, heads=2, depth=3, patch=(4, 4, 4), registers=2)
TEXT = TextConfig(width=16, depth=2, heads=2, max_tokens=24)
CONFIGS: dict[str, Any] = {
    "vit3d": VIT,
    "vit3d, convolutions": ViT3DConfig(stages=((8, 1),), width=24, heads=2, depth=2, patch=(2, 2, 2)),
    "ctvit": CTViTConfig(
        patch=(4, 8, 8), width=16, spatial_depth=2, temporal_depth=1, heads=2, head_width=8, codebook_size=32
    ),
    "resnet3d": ResNet3DConfig(width_factor=0.125),
    "slices": SlicesConfig(aggregator="transformer", heads=2),
}  # fmt: skip
# The named layers that a training run counts, the embedding with the first.
LAYERS = {"vit3d": 4, "vit3d, convolutions": 3, "ctvit": 4, "resnet3d": 9, "slices": 1}
every = pytest.mark.parametrize("name", list(CONFIGS))


def dual(name: str = "vit3d", vision: Path | None = None, seed: int = 0, **changes: Any) -> DualEncoder:
    config = CONFIGS[name].model_copy(update=changes)
    if name == "slices":
        config = config.model_copy(update={"pretrained": str(vision)})
    return dual_encoder(config, SPEC, TEXT, seed, standardise=True)


def volumes() -> torch.Tensor:
    return torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same_tensors(model: DualEncoder, state: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if name in state and torch.equal(value, state[name])}


def test_both_sides_are_taken_whole() -> None:
    source, model = dual(seed=1), dual(seed=2)
    result = take_weights(model, source.state_dict(), "both", "there")
    assert set(result.taken) == set(model.state_dict())
    assert (result.new, result.reshaped, result.unused) == ([], [], [])
    assert torch.equal(model.eval().encode_volume(volumes()), source.eval().encode_volume(volumes()))
    assert torch.equal(model.encode_text(REPORTS), source.encode_text(REPORTS))
    assert result.describe("there") == f"from there: {len(result.taken)} tensors taken"


@pytest.mark.parametrize(("side", "other"), [("volume", "text"), ("text", "volume")])
def test_one_side_leaves_the_other_as_it_was(side: str, other: str) -> None:
    source, model = dual(seed=1), dual(seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = take_weights(model, source.state_dict(), side, "there")
    taken, kept = same_tensors(model, source.state_dict()), same_tensors(model, before)
    sides = {
        word: {name for name in before if name.startswith((f"{word}_", f"similarity.{word}_"))}
        for word in (side, other)
    }
    assert sides[side] <= taken
    assert sides[other] | {"similarity.logit_scale"} <= kept
    assert set(result.taken) == sides[side]


def test_what_does_not_fit_begins_at_random_and_is_said() -> None:
    """Another depth and another embedding of patches: all other weights are copied."""
    source = dual(seed=1)
    model = dual(seed=2, patch=(2, 4, 4), depth=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = take_weights(model, source.state_dict(), "both", "there")
    assert result.reshaped == ["volume_encoder.stem.embed.weight"]
    assert result.new
    assert all(name.startswith("volume_encoder.blocks.3.") for name in result.new)
    kept = same_tensors(model, before)
    assert {*result.reshaped, *result.new} <= kept
    assert set(result.taken) <= same_tensors(model, source.state_dict())
    lines = result.describe("there").splitlines()
    assert lines[0] == f"from there: {len(result.taken)} tensors taken"
    assert lines[1:] == [
        f"  {len(result.new)} new, initialised at random: volume_encoder.blocks.3",
        "  1 with another shape in the source, initialised at random: volume_encoder.stem.embed",
    ]
    shallower = take_weights(dual(seed=2, depth=1), source.state_dict(), "both", "there")
    assert {name.split(".")[2] for name in shallower.unused} == {"1", "2"}
    assert "in the source, not used here: volume_encoder.blocks.1, volume_encoder.blocks.2" in shallower.describe(
        "there"
    )


def test_a_side_of_which_nothing_fits_is_refused() -> None:
    source = dual("resnet3d", seed=1).state_dict()
    for sides in ("both", "volume"):
        with pytest.raises(ConfigError, match=r"model\.init=there: no tensor of its volume encoder fits") as refused:
            take_weights(dual(seed=2), source, sides, "there")
        assert "\n" not in str(refused.value)
    assert take_weights(dual(seed=2), source, "text", "there").taken


@every
def test_adapters_change_nothing_at_first_and_they_alone_learn(name: str, vision: Path) -> None:
    """Weights of a plain model are loaded into the base layers."""
    source = dual(name, vision, seed=1)
    model = dual(name, vision, seed=2, tuning="lora", lora_rank=2)
    result = take_weights(model, source.state_dict(), "both", "there")
    assert result.unused == result.reshaped == []
    assert result.new
    assert all("lora_" in one for one in result.new)
    expected = source.eval().encode_volume(volumes())
    torch.testing.assert_close(model.eval().encode_volume(volumes()), expected, atol=1e-5, rtol=1e-5)
    encoder = model.volume_encoder
    learned = {one for one, p in encoder.named_parameters() if p.requires_grad}
    assert learned
    assert all("lora_" in one for one in learned)
    before = {one: p.detach().clone() for one, p in encoder.named_parameters()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=10.0)
    direction = torch.linspace(-1, 1, encoder.width)
    for _ in range(2):
        optimizer.zero_grad()
        (encoder.train()(volumes()).pooled @ direction).sum().backward()
        optimizer.step()
    moved = {one for one, p in encoder.named_parameters() if not torch.equal(p, before[one])}
    assert moved
    assert moved <= learned
    assert not torch.allclose(model.eval().encode_volume(volumes()), expected, atol=1e-4)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_the_projection_may_have_adapters_too(projection: str, tmp_path: Path) -> None:
    """They change nothing at first, are the only weights that learn, are saved with the model, and merge into the
    weights."""
    adapted_too = VIT.model_copy(update={"tuning": "lora", "lora_rank": 2, "lora_projection": True})
    source = dual_encoder(VIT, SPEC, TEXT, 1, standardise=True, projection=projection)
    model = dual_encoder(adapted_too, SPEC, TEXT, 2, standardise=True, projection=projection)
    assert take_weights(model, source.state_dict(), "both", "there").unused == []
    expected = source.eval().encode_volume(volumes())
    torch.testing.assert_close(model.eval().encode_volume(volumes()), expected, atol=1e-5, rtol=1e-5)
    learned = [one for one, p in model.volume_projection.named_parameters() if p.requires_grad]
    assert learned
    assert all("lora_" in one for one in learned)
    torch.manual_seed(3)
    for one, parameter in model.named_parameters():
        if "lora_" in one:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = model.encode_volume(volumes())
    assert not torch.allclose(adapted, expected, atol=1e-3)
    save_model(tmp_path / "model", model, load_labels("ct_rate_18"))
    torch.testing.assert_close(load_model(tmp_path / "model").model.encode_volume(volumes()), adapted)
    merge_adapters(tmp_path / "model")
    merged = load_model(tmp_path / "model").model
    assert not any("lora_" in one for one in merged.state_dict())
    torch.testing.assert_close(merged.encode_volume(volumes()), adapted, atol=1e-5, rtol=1e-5)


@every
def test_a_model_with_adapters_is_taken_with_what_they_learned(name: str, vision: Path) -> None:
    """Merged into the weights, on both sides; a model that already has adapters gets additional new ones."""
    source = dual(name, vision, seed=1, tuning="lora", lora_rank=2).eval()
    source.text_encoder.bert = with_lora(source.text_encoder.bert, TEXT.model_copy(update={"lora_rank": 2}))
    torch.manual_seed(3)
    for one, parameter in source.named_parameters():
        if "lora_" in one:
            torch.nn.init.normal_(parameter, std=0.2)
    before = {one: value.clone() for one, value in source.state_dict().items()}
    state = merged_state(source)
    assert all(torch.equal(value, before[one]) for one, value in source.state_dict().items())
    for tuning in ("full", "lora"):
        model = dual(name, vision, seed=2, tuning=tuning, lora_rank=2)
        result = take_weights(model, state, "both", "there")
        assert (result.reshaped, result.unused) == ([], [])
        assert all("lora_" in one for one in result.new)
        assert bool(result.new) is (tuning == "lora")
        model.eval()
        expected = source.encode_volume(volumes()), source.encode_text(REPORTS)
        torch.testing.assert_close(model.encode_volume(volumes()), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_text(REPORTS), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["full", "lora", "all", "nothing learns"])
def test_the_codebook_moves_with_the_weights_that_learn(how: str) -> None:
    model = dual("ctvit", tuning="lora" if how == "lora" else "full")
    encoder = model.volume_encoder
    freeze(model, FreezeConfig(volume="all" if how == "all" else "none"))
    if how == "nothing learns":
        encoder.requires_grad_(False)
    codebook: Any = encoder.codebook
    before = codebook.rows.clone()
    model.train()
    encoder(volumes())
    encoder.end_step()
    assert torch.equal(codebook.rows, before) is (how != "full")
    assert not codebook.sums.any()


def test_an_encoder_without_places_for_adapters_is_explained() -> None:
    from ctclip.models.lora import add_lora

    with pytest.raises(ConfigError, match="tuning=lora: Linear has no linear layer among qkv, out"):
        add_lora(nn.Linear(2, 2), ("qkv", "out"), 2)


def frozen(model: DualEncoder) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@every
def test_all_of_an_encoder_is_frozen_and_nothing_else(name: str, vision: Path) -> None:
    model = dual(name, vision)
    freeze(model, FreezeConfig(volume="all", text="all"))
    encoders = {one for one, _ in model.named_parameters() if "_encoder." in one}
    assert frozen(model) == encoders
    assert not model.train().text_encoder.bert.training, "its dropout would only add noise"
    free = dual(name, vision)
    freeze(free, FreezeConfig())
    assert frozen(free) == set()


def test_a_range_of_layers_is_counted_from_the_input() -> None:
    model = dual()
    freeze(model, FreezeConfig(volume="0-1", text="0-0"))
    parts = {name.removeprefix("volume_encoder.").split(".attention")[0] for name in frozen(model)}
    assert {".".join(part.split(".")[:2]) for part in parts if not part.startswith("text")} == {
        "registers", "stem.embed", "blocks.0",
    }  # fmt: skip
    text = {".".join(name.split(".")[2:5]) for name in frozen(model) if name.startswith("text")}
    assert {part.partition(".")[0] for part in text} == {"embeddings", "encoder"}
    assert {part for part in text if part.startswith("encoder")} == {"encoder.layer.0"}
    middle = dual()
    freeze(middle, FreezeConfig(volume="2-3"))
    assert {".".join(name.split(".")[1:3]) for name in frozen(middle)} == {"blocks.1", "blocks.2"}


@every
def test_layers_that_there_are_not_are_named(name: str, vision: Path) -> None:
    last = LAYERS[name] - 1
    assert len(dual(name, vision).volume_encoder.layers()) == LAYERS[name]
    freeze(dual(name, vision), FreezeConfig(volume=f"0-{last}"))
    for chosen in (f"0-{last + 1}", f"{last + 1}-{last + 1}", "1-0"):
        with pytest.raises(ConfigError, match=rf"freeze\.volume={chosen}: the volume encoder has layers 0 to {last}"):
            freeze(dual(name, vision), FreezeConfig(volume=chosen))
    with pytest.raises(ConfigError, match=r"freeze\.text=0-2: the text encoder has layers 0 to 1"):
        freeze(dual(name, vision), FreezeConfig(text="0-2"))


def test_rates_fall_by_a_factor_from_layer_to_layer() -> None:
    """A volume encoder of four layers, a text encoder of two, and the parameters after both."""
    model = dual()
    step = TrainingStep(Context(model), objective_configs({"clip": 1}))
    config = TrainingConfig(learning_rate=1e-3, text_learning_rate=1e-4, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in parameter_groups(step, config) for p in group["params"]}
    expected = {
        "volume_encoder.stem": 1e-3 / 16, "volume_encoder.registers": 1e-3 / 16, "volume_encoder.blocks.0": 1e-3 / 8,
        "volume_encoder.blocks.1": 1e-3 / 4, "volume_encoder.blocks.2": 1e-3 / 2, "volume_encoder.norm": 1e-3,
        "volume_encoder.query": 1e-3, "volume_projection": 1e-3, "similarity": 1e-3,
        "text_encoder.bert.embeddings": 1e-4 / 4, "text_encoder.bert.encoder.layer.0": 1e-4 / 4,
        "text_encoder.bert.encoder.layer.1": 1e-4 / 2, "text_projection": 1e-4,
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (start,) = [start for start in expected if name.startswith(start)]
            assert rate.pop(id(parameter)) == pytest.approx(expected[start]), name
    assert not rate
    assert rate_factors(model, 1.0) == {}


@every
def test_every_layer_of_an_encoder_learns_at_one_rate_and_lies_in_one_layer(name: str, vision: Path) -> None:
    model = dual(name, vision)
    seen: list[int] = []
    for layers in (model.volume_encoder.layers(), text_layers(model)):
        for layer in layers:
            parts = [[p] if isinstance(p, nn.Parameter) else list(p.parameters()) for p in layer]
            seen += [id(parameter) for part in parts for parameter in part]
    assert len(seen) == len(set(seen)), "a parameter in two layers would have the rate of the later one"
    factors = rate_factors(model, 0.9)
    assert set(factors) == set(seen)
    assert min(factors.values()) == pytest.approx(0.9 ** max(LAYERS[name], 2))
