"""A 2-D vision model applied to every slice and an aggregator over slices, for users who have 2-D weights.

Any Hugging Face vision model can be used (DINOv2, CLIP, ViT, ConvNeXt, ResNet ...). The aggregators are those of
CLIP4Clip (Luo et al. 2022): mean pooling, LSTM, transformer, and cross-attention. The query of cross-attention is
learned instead of being the text, because a volume must have one vector for all texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip.config import EncoderConfig, HuWindow
from ctclip.errors import CheckpointError, ConfigError
from ctclip.models.encoded import Encoded, Evidence, Level, VolumeEncoder, axis_shape, axis_spacing, check_shape
from ctclip.models.hub import pretrained_folder
from ctclip.models.huggingface import freeze_unused, read_settings, vision_model
from ctclip.models.pooling import air_where_padded
from ctclip.preprocessing.spec import PreprocessingSpec

LONGEST_MM = 1000.0


class SlicesConfig(EncoderConfig):
    """A 2-D vision model of Hugging Face on every slice, and an aggregator over slices (``ctclip/models/slices.py``)."""

    kind: Literal["slices"] = Field(
        "slices", description="a 2-D vision model applied to every slice, and an aggregator"
    )
    pretrained: str = Field(
        "", description="folder, or name on the Hugging Face Hub, of a vision model, for example facebook/dinov2-small"
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: take only the architecture of `pretrained`"
    )
    aggregator: Literal["mean", "lstm", "transformer", "cross"] = Field(
        "transformer", description="how slices are pooled into one vector; cross: a learned query attends to them"
    )
    depth: int = Field(2, ge=1, le=512, description="number of layers of the transformer or LSTM over slices")
    heads: int = Field(8, ge=1, le=1024, description="number of attention heads over slices")
    every: int = Field(1, ge=1, le=10**4, description="use every n-th slice")
    windows: tuple[HuWindow, ...] = Field(
        ((-1000.0, 400.0), (-160.0, 240.0), (-500.0, 1000.0)),
        min_length=1,
        description="HU windows that become the three colour channels",
    )
    slices_at_once: int = Field(64, ge=1, le=10**6, description="number of slices encoded together")


class SliceEncoder(VolumeEncoder):
    """volume (B, 1, D, H, W) in [-1, 1] -> Encoded: one token per slice, and the vector of the aggregator."""

    Config: ClassVar[type[EncoderConfig]] = SlicesConfig
    lora_targets = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
    config: SlicesConfig

    def __init__(self, config: SlicesConfig, spec: PreprocessingSpec, vision: Any | None = None) -> None:
        """``vision``: the vision model; by default, it is loaded according to ``config``."""
        super().__init__(config, spec)
        self.vision: Any = load_vision(config) if vision is None else vision
        shape = self.vision.config
        self.channels = int(getattr(shape, "num_channels", 3))
        self.side = _side(shape)
        self.width = self.token_width = width_of(self.vision, self.channels, self.side)
        # In a model folder, the weights include the colour statistics.
        mean, deviation = _colour(config if vision is None else None, self.channels)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", mean, persistent=True)
        self.register_buffer("deviation", deviation, persistent=True)
        self.aggregate = Aggregator(config, self.width, axis_spacing(spec)[0])

    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        """volume (B, 1, D, H, W) in [-1, 1]; mask (B, 1, D, H, W) bool, true where voxels are real: slices without any
        are left out and returned as zeros. tokens (B, D / every, width), grid (D / every, 1, 1)."""
        check_shape(volume)
        volume = air_where_padded(volume, mask)
        first = (volume.shape[2] - 1) % self.config.every // 2
        taken = volume[:, :, first :: self.config.every]
        slices = rearrange(taken, "b 1 d h w -> (b d) 1 h w")
        parts = [self._slices(part) for part in slices.split(self.config.slices_at_once)]
        tokens = rearrange(torch.cat(parts), "(b d) c -> b d c", b=len(volume))
        real = None if mask is None else mask[:, 0, first :: self.config.every].flatten(2).any(dim=2)
        if real is not None:
            tokens = tokens * real[..., None]
        _, height, width = axis_shape(self.spec)
        affine = self.affine((self.config.every, 1, 1), (first, (height - 1) / 2, (width - 1) / 2))
        return Encoded(tokens, (tokens.shape[1], 1, 1), self.aggregate(tokens, real), affine, real)

    def evidence(self, volume: Tensor, mask: Tensor | None = None) -> Evidence:
        """A slice is one token, so evidence refers to whole slices."""
        encoded = self(volume, mask)

        def pool(features: Sequence[Tensor]) -> Tensor:
            return self.aggregate(features[0], encoded.real)

        def alone(features: Sequence[Tensor], directions: Tensor) -> list[Tensor]:
            single = features[0].flatten(0, 1)[:, None]
            return [(self.aggregate(single, None) @ directions.T).unflatten(0, features[0].shape[:2]).transpose(1, 2)]

        level = Level(encoded.tokens, encoded.grid, encoded.affine, encoded.real)
        return Evidence(encoded, (level,), pool, alone)

    def layers(self) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
        """The 2-D model as a whole; its own layers differ from architecture to architecture."""
        return [[self.vision]]

    def _slices(self, slices: Tensor) -> Tensor:
        """(n, 1, H, W) -> (n, width)."""
        if self.config.activation_checkpointing and self.training:
            return checkpoint(self._encode, slices, use_reentrant=False)  # type: ignore[return-value]
        return self._encode(slices)

    def _encode(self, slices: Tensor) -> Tensor:
        bottom, top = self.spec.hu_window
        hu = (slices + 1) / 2 * (top - bottom) + bottom
        images = torch.cat([((hu - low) / (high - low)).clamp(0, 1) for low, high in self.config.windows], dim=1)
        # Windows are repeated or cut to the number of channels: (n, channels, H, W).
        images = repeat(images, "n c h w -> n (again c) h w", again=-(-self.channels // images.shape[1]))[
            :, : self.channels
        ]
        if images.shape[-2:] != (self.side, self.side):
            # In float32, because torch has no antialiased bfloat16 interpolation on a CPU.
            scaled = F.interpolate(images.float(), (self.side, self.side), mode="bilinear", antialias=True)
            images = scaled.to(images.dtype)
        return _pooled(self.vision, (images - self.mean) / self.deviation)


class Aggregator(nn.Module):
    """(B, slices, width) -> (B, width)."""

    def __init__(self, config: SlicesConfig, width: int, spacing: float) -> None:
        """``spacing``: mm between the slices of a volume."""
        super().__init__()
        self.kind, self.step = config.aggregator, spacing * config.every
        if self.kind in ("transformer", "cross") and width % config.heads:
            raise ConfigError(f"model.volume.heads={config.heads} must divide the vision model's width {width}")
        if self.kind == "lstm":
            self.recurrent = nn.LSTM(width, width, config.depth, batch_first=True)
        elif self.kind == "transformer":
            layer = nn.TransformerEncoderLayer(width, config.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)  # fmt: skip
            self.layers = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(width), enable_nested_tensor=False)
        elif self.kind == "cross":
            self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
            self.norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)

    def forward(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """``real`` (B, slices) bool: which slices take part; None: all."""
        if self.kind == "lstm":
            if real is not None:
                # Padding lies at both ends of the slices, and a recurrent layer must not process it.
                order = torch.argsort(real.to(torch.int8), dim=1, descending=True, stable=True)
                tokens = tokens.gather(1, order[..., None].expand_as(tokens))
                real = real.gather(1, order)
            tokens = tokens + self.recurrent(tokens)[0]
        elif self.kind == "transformer":
            placed = tokens + self._positions(tokens)
            tokens = tokens + self.layers(placed, src_key_padding_mask=None if real is None else ~real)
        elif self.kind == "cross":
            keys = self.norm(tokens)
            query = self.query.expand(len(tokens), -1, -1)
            hidden = None if real is None else ~real
            pooled, _ = self.attention(query, keys + self._positions(keys), keys, key_padding_mask=hidden)
            return pooled[:, 0]
        if real is None:
            return tokens.mean(dim=1)
        weight = real[..., None].to(tokens.dtype)
        return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def _positions(self, tokens: Tensor) -> Tensor:
        """(slices, width) sines and cosines of the height in mm from the middle slice (Vaswani et al. 2017)."""
        _, count, width = tokens.shape
        height = (torch.arange(count, device=tokens.device) - (count - 1) / 2) * self.step
        waves = torch.exp(torch.linspace(math.log(2 * self.step), math.log(LONGEST_MM), (width + 1) // 2, device=tokens.device))  # fmt: skip
        angle = 2 * math.pi * height[:, None] / waves
        return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width].to(tokens.dtype)


def load_vision(config: SlicesConfig) -> Any:
    """The vision model ``config`` names."""
    if not config.pretrained:
        raise CheckpointError("model.volume.pretrained is not set: name the folder (or hub name) of a vision model")
    return vision_model(config.pretrained, weights=config.weights == "pretrained")


def width_of(vision: Any, channels: int, side: int) -> int:
    """The size of the vector that ``vision`` returns for an image; parameters that it does not depend on are frozen.

    The size is found by a test. Raises CheckpointError if the model cannot be used: it does not accept an image, does
    not return a vector, or returns a different one each time (as with random masking).
    """
    kind = vision.config.model_type
    parameter = next(vision.parameters())
    image = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0), device="cpu").to(parameter)
    training = vision.training
    vision.eval()
    try:
        with torch.enable_grad():
            first, second = (_pooled(vision, image) for _ in range(2))
    except Exception as error:  # unsuitable architectures raise any kind of error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"model.volume: the architecture {kind} cannot serve as slice encoder ({reason})"
        ) from error
    finally:
        vision.train(training)
    freeze_unused(vision, first)
    if first.ndim != 2 or not (parameter.is_meta or torch.allclose(first, second, atol=1e-4)):
        raise CheckpointError(
            f"model.volume: the architecture {kind} cannot serve as slice encoder: it must return one vector "
            "per image, and the same vector each time"
        )
    return int(first.shape[1])


def _pooled(vision: Any, images: Tensor) -> Tensor:
    """(n, channels, side, side) -> (n, width): the model's own pooled vector, or the mean over positions."""
    output = vision(pixel_values=images)
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden.mean(dim=1)


def _side(shape: Any) -> int:
    size = getattr(shape, "image_size", None) or 224
    return int(size if isinstance(size, int) else size[0])


def _colour(config: SlicesConfig | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, channels, 1, 1) of the model's training images; one half each if its folder does
    not state them."""
    values: dict[str, Any] = {}
    if config is not None:
        folder = pretrained_folder(config.pretrained, "model.volume.pretrained", weights=False)
        path = folder / "preprocessor_config.json"
        values = read_settings(path) if path.is_file() else {}
    colours = []
    for name in ("image_mean", "image_std"):
        numbers = values.get(name) or [0.5] * channels
        numbers = (
            list(numbers)[:channels] if isinstance(numbers, list) and len(numbers) >= channels else [0.5] * channels
        )
        plain = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        if not plain or (name == "image_std" and min(numbers) <= 0):
            raise CheckpointError(
                f"{path}: {name} does not hold {'positive' if name == 'image_std' else 'finite'} numbers; copy the folder again"
            )
        colours.append(torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1, 1))
    return colours[0], colours[1]
