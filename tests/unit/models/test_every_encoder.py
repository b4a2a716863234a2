"""Properties of every volume encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctclip.config import ModelConfig, TextConfig
from ctclip.labels import labels_of_columns
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.dual_encoder import DualEncoder, build_model, build_volume_encoder
from ctclip.models.encoded import VolumeEncoder, axis_shape
from ctclip.models.folder import load_model, save_model
from ctclip.models.resnet3d import ResNet3DConfig
from ctclip.models.sizes import measure
from ctclip.models.slices import SlicesConfig
from ctclip.models.text import train_tokenizer
from ctclip.models.vit3d import ViT3DConfig
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.small import spec_of

SHAPE = (16, 24, 32)
SPEC = spec_of(SHAPE, (3.0, 1.5, 1.25))
# The same volumes, with rows and columns oriented as by the published loader.
TURNED = spec_of((16, 32, 24), (3.0, 1.25, 1.5), published=True)
LABELS = labels_of_columns("two", ["Nodule", "Effusion"])
VIT: dict[str, Any] = {"width": 24, "heads": 2, "depth": 2, "patch": (4, 4, 4), "registers": 2}
CTVIT: dict[str, Any] = {
    "patch": (4, 8, 8), "width": 16, "spatial_depth": 1, "temporal_depth": 1, "heads": 2,
    "head_width": 8, "codebook_size": 32,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "vit3d, linear": ViT3DConfig(stages=(), **VIT),
    "vit3d, convolutions": ViT3DConfig(
        stages=((8, 1),), **VIT | {"patch": (2, 2, 2)}, pooling=("attention", "mean", "max"), extremes=True, pool_stem=True
    ),
    "vit3d, windows": ViT3DConfig(stages=(), **VIT, window=(2, 2, 3), global_every=2, drop_air=True),
    "vit3d, between windows": ViT3DConfig(
        stages=(), **VIT, window=(2, 2, 3), global_every=2, global_over="windows", drop_air=True, activation_checkpointing=True
    ),
    "vit3d, checkpointed": ViT3DConfig(stages=(), **VIT, activation_checkpointing=True),
    "ctvit": CTViTConfig(**CTVIT),
    "ctvit, no codebook": CTViTConfig(**CTVIT, quantise=False, activation_checkpointing=True),
    "resnet3d 18": ResNet3DConfig(width_factor=0.125),
    "resnet3d 50": ResNet3DConfig(depth=50, width_factor=0.125, norm="batch"),
    **{f"slices, {kind}": SlicesConfig(aggregator=kind, heads=2, slices_at_once=20) for kind in ("mean", "lstm", "transformer", "cross")},
}  # fmt: skip
every = pytest.mark.parametrize("name", list(CONFIGS))


def config_of(name: str, vision: Path) -> Any:
    config = CONFIGS[name]
    return config.model_copy(update={"pretrained": str(vision)}) if isinstance(config, SlicesConfig) else config


def spec(name: str) -> PreprocessingSpec:
    return TURNED if name.startswith("ctvit") else SPEC


def build(name: str, vision: Path) -> VolumeEncoder:
    torch.manual_seed(0)
    return build_volume_encoder(config_of(name, vision), spec(name)).eval()


def build_dual(name: str, vision: Path) -> DualEncoder:
    torch.manual_seed(0)
    config = ModelConfig(volume=config_of(name, vision), text=TextConfig(width=16, depth=1, heads=2), dim=12)
    return build_model(config, spec(name), train_tokenizer(["A nodule is seen."] * 20, 60)).eval()


def volume(batch: int = 2) -> Tensor:
    """Bodies of -0.5 to 1 in air of -1 along one side."""
    made = torch.rand(batch, 1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 1.5 - 0.5
    made[..., :8] = -1
    return made


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=1).min())


@every
def test_tokens_fill_their_grid(name: str, vision: Path) -> None:
    encoder = build(name, vision)
    found = encoder(volume())
    depth, height, width = found.grid
    assert found.tokens.shape[:2] == (2, depth * height * width)
    assert found.pooled.shape == (2, encoder.width)
    assert found.tokens.shape[2] == encoder.token_width
    assert found.affine.shape == (4, 4)
    assert axis_shape(encoder.spec) == SHAPE


@every
def test_a_volume_is_seen_alone_in_training_unless_batch_norm_was_asked_for(name: str, vision: Path) -> None:
    encoder, given = build(name, vision).train(), volume()
    other = torch.cat([given[:1], given[1:].flip(-1) * 0.5])
    with torch.no_grad():
        same = torch.allclose(encoder(given).pooled[0], encoder(other).pooled[0], atol=1e-5)
    assert same == (name not in ("vit3d, convolutions", "resnet3d 50"))


@every
def test_a_mistaken_volume_is_explained(name: str, vision: Path) -> None:
    model = build_dual(name, vision)
    for wrong, said in (
        (volume() * 1000, r"range over \[-1000, .*Hounsfield"),
        (volume().fill_(float("nan")), "nan"),
        (volume()[:, 0], r"\(B, 1, D, H, W\), found shape \(2, 16, 24, 32\)"),
        (volume().movedim(1, -1), r"\(B, 1, D, H, W\), found shape"),
    ):
        with pytest.raises(ValueError, match=said):
            model.encode(wrong)
    with pytest.raises(ValueError, match=r"\(B, 1, D, H, W\), found shape"):
        model.volume_encoder(volume()[:, 0])


@pytest.mark.parametrize("name", ["vit3d, linear", "ctvit"])
def test_a_wrong_axis_order_is_explained(name: str, vision: Path) -> None:
    """Encoders with a fixed grid can detect it."""
    with pytest.raises(
        ValueError, match=r"axis order|expected a volume \(B, 1, 16, 24, 32\) .*, found \(2, 1, 24, 30, 16\)"
    ):
        build(name, vision)(volume().permute(0, 1, 3, 4, 2)[:, :, :, :30])


@every
def test_every_parameter_learns(name: str, vision: Path) -> None:
    encoder = build(name, vision).train()
    encoder(volume(3)).pooled.square().sum().backward()
    # A 2-D model's own pooling or embeddings may have parts that its pooled vector does not use; aggregators have none.
    ours = [(n, p) for n, p in encoder.named_parameters() if not n.startswith("vision.")]
    assert [n for n, p in ours if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0] == []
    theirs = [p for n, p in encoder.named_parameters() if n.startswith("vision.encoder") or "patch_emb" in n]
    assert all(p.grad is not None for p in theirs)


@every
def test_the_batch_changes_nothing(name: str, vision: Path) -> None:
    encoder = build(name, vision)
    given = volume(3)
    given[1, ..., :16] = -1  # a different share of air than its neighbours
    together = encoder(given)
    for row, alone in enumerate(encoder(one) for one in given.split(1)):
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.tokens[row], alone.tokens[0], atol=1e-5, rtol=1e-5)


@every
def test_what_padding_holds_changes_nothing(name: str, vision: Path) -> None:
    encoder = build(name, vision)
    mask = torch.ones(2, 1, *SHAPE, dtype=torch.bool)
    mask[:, :, :4] = False
    mask[1, ..., 24:] = False
    real = volume()
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(2))
    empty, full = real.masked_fill(~mask, -1), torch.where(mask, real, noise)
    found = encoder(full, mask).pooled
    assert torch.equal(found, encoder(empty, mask).pooled)
    assert not torch.equal(found, encoder(full).pooled)


@pytest.mark.parametrize("name", ["vit3d, linear", "vit3d, windows", "vit3d, between windows"])
def test_the_amount_of_padding_changes_nothing(name: str, vision: Path) -> None:
    """Positions are counted from the middle, and dropped tokens have no influence: a volume may be padded on all
    sides."""
    encoder = build(name, vision)
    padded = torch.full((2, 1, 32, 24, 56), -1.0)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    # By whole windows, if there are any: a window has a fixed position in the grid.
    padded[:, :, 8:24, :, 12:44], mask[:, :, 8:24, :, 12:44] = volume(), True
    torch.testing.assert_close(encoder(padded, mask).pooled, encoder(volume()).pooled, atol=2e-5, rtol=1e-4)


@every
def test_saved_and_loaded_the_same(name: str, vision: Path, tmp_path: Path) -> None:
    model = build_dual(name, vision)
    save_model(tmp_path / "model", model, LABELS)
    loaded = load_model(tmp_path / "model").model
    assert torch.equal(loaded.encode_volume(volume()), model.encode_volume(volume()))
    assert loaded.config == model.config
    assert type(loaded.config.volume) is type(CONFIGS[name])
    assert loaded.spec == spec(name)


@pytest.mark.integration
@every
def test_compiled_it_gives_the_same(name: str, vision: Path) -> None:
    """Traced by torch.compile; the code that inductor generates is tested against the recorded outputs."""
    encoder = build(name, vision)
    compiled = torch.compile(encoder, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(volume()).pooled, encoder(volume()).pooled, atol=1e-5, rtol=1e-5)


@every
def test_half_precision_stays_near(name: str, vision: Path) -> None:
    encoder = build(name, vision)
    with torch.no_grad():
        whole = encoder(volume()).pooled
        half = build(name, vision).bfloat16()(volume().bfloat16()).pooled
        with torch.autocast("cpu", torch.bfloat16):
            mixed = encoder(volume()).pooled
    # A token between two codes may be assigned the other one.
    bound = 0.8 if name == "ctvit" else 0.999
    assert half.dtype == torch.bfloat16
    assert cosine(half, whole) > bound
    assert cosine(mixed, whole) > bound


@every
def test_the_same_seed_gives_the_same_gradients(name: str, vision: Path) -> None:
    gradients = []
    for _ in range(2):
        encoder = build(name, vision).train()
        encoder(volume()).pooled.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["vit3d, linear", "ctvit, no codebook", "resnet3d 18", "slices, mean"])
def test_activations_made_again_give_the_same_gradients(name: str, vision: Path) -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        config = config_of(name, vision).model_copy(update={"activation_checkpointing": again})
        encoder = build_volume_encoder(config, spec(name)).train()
        encoder(volume()).pooled.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for kept, made in zip(*gradients, strict=True):
        torch.testing.assert_close(made, kept)


def test_batch_norm_and_activation_checkpointing_are_refused_together() -> None:
    with pytest.raises(ValueError, match="norm=group"):
        ResNet3DConfig(norm="batch", activation_checkpointing=True)


@pytest.mark.parametrize("window", [None, (2, 3, 4)])
def test_operations_are_those_of_the_formula(window: tuple[int, int, int] | None) -> None:
    config = ViT3DConfig(width=48, heads=2, depth=4, patch=(4, 4, 4), stages=(), registers=0, window=window)
    tokens, hidden, full = 4 * 6 * 8, 128, 1 if window else 4
    linear = 2 * tokens * (64 * 48 + 4 * (4 * 48 * 48 + 3 * 48 * hidden))
    attention = 2 * 2 * tokens * 48 * (full * tokens + (4 - full) * 2 * 3 * 4)
    pooling = 2 * tokens * 48 * 2  # one score per token, and their weighted mean
    found = measure(ModelConfig(volume=config, text=TextConfig()), SPEC).flops
    assert found == pytest.approx(linear + attention + pooling, rel=0.01)
