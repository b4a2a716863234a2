"""The volume encoder of the published CT-CLIP (CT-ViT; Hamamci et al. 2023, 2024), numerically identical.

Attention within each slab of slices, then across slabs; each layer begins with a depthwise convolution, and tokens are
replaced by rows of a codebook. Quirks of the published code on which the weights depend are kept, with a comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip import distributed
from ctclip.config import Count, EncoderConfig
from ctclip.errors import ConfigError
from ctclip.models import by_hand
from ctclip.models.attention import Attention
from ctclip.models.encoded import Encoded, Evidence, Level, VolumeEncoder, axis_shape, check_shape
from ctclip.models.lora import is_adapter
from ctclip.models.pooling import air_where_padded
from ctclip.models.precision import autocast_off, float32_exactly
from ctclip.preprocessing.spec import PreprocessingSpec

ATTENTION_SCALE = 8.0
CODEBOOK_DECAY = 0.8
TOKENS_AT_ONCE = 2048


class CTViTConfig(EncoderConfig):
    """The published CT-CLIP's encoder (``ctclip/models/ctvit.py``)."""

    kind: Literal["ctvit"] = Field("ctvit", description="the encoder of the published CT-CLIP")
    patch: tuple[Count, Count, Count] = Field((10, 20, 20), description="voxels [slice, row, column] of one token")
    width: int = Field(512, ge=1, le=2**16, description="number of channels of a token")
    spatial_depth: int = Field(4, ge=1, le=512, description="number of layers that attend within a slab of slices")
    temporal_depth: int = Field(4, ge=1, le=512, description="number of layers that attend across slabs")
    heads: int = Field(8, ge=1, le=1024, description="attention heads")
    head_width: int = Field(32, ge=1, le=4096, description="number of channels of an attention head")
    codebook_size: int = Field(8192, ge=2, le=2**20, description="number of vectors in the codebook")
    quantise: bool = Field(
        True, description="replace each token by the nearest vector of the codebook, as the published model does"
    )


class CTViT(VolumeEncoder):
    """volume (B, 1, D, H, W) in [-1, 1], indexed [slice, column, row] as ``ct_clip`` prepares it -> Encoded.

    ``pooled`` is the mean over slabs of slices, flattened: (B, h * w * width). Any number of slabs fits the weights; the
    in-plane size is the spec's.
    """

    Config: ClassVar[type[EncoderConfig]] = CTViTConfig
    lora_targets = ("to_query", "to_key_value", "out")
    config: CTViTConfig

    def __init__(self, config: CTViTConfig, spec: PreprocessingSpec) -> None:
        super().__init__(config, spec)
        extents = axis_shape(spec)
        if any(extent % step for extent, step in zip(extents, config.patch, strict=True)):
            raise ConfigError(
                f"model.volume.patch={list(config.patch)} does not divide the volumes of spec {spec.name!r} "
                f"({' x '.join(map(str, extents))} voxels): prepare them with another spec, or choose another patch"
            )
        self.plane = tuple(extent // step for extent, step in zip(extents[1:], config.patch[1:], strict=True))
        depth, height, width = config.patch
        inside = depth * height * width
        self.embed = nn.Sequential(nn.LayerNorm(inside), nn.Linear(inside, config.width), nn.LayerNorm(config.width))
        self.bias = RelativeBias(config.width, config.heads)
        self.spatial = nn.ModuleList(Layer(config) for _ in range(config.spatial_depth))
        self.spatial_norm = nn.LayerNorm(config.width)
        self.temporal = nn.ModuleList(Layer(config) for _ in range(config.temporal_depth))
        self.temporal_norm = nn.LayerNorm(config.width)
        self.codebook = Codebook(config.codebook_size, config.width) if config.quantise else None
        self.width, self.token_width = self.plane[0] * self.plane[1] * config.width, config.width

    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        """``mask`` (B, 1, D, H, W) bool: padding is treated as air, as in the published model."""
        return self._encoded(volume, mask, straight_through=False)

    def _encoded(self, volume: Tensor, mask: Tensor | None, straight_through: bool) -> Encoded:
        """``straight_through``: gradients pass through the codebook at inference too."""
        encoded = self.encode(self.patches(air_where_padded(volume, mask)))
        tokens = encoded if self.codebook is None else self.codebook(encoded)[0]
        if straight_through and self.codebook is not None:
            tokens = encoded + (tokens - encoded).detach()
        grid = (tokens.shape[1], tokens.shape[2], tokens.shape[3])
        affine = self.affine(self.config.patch, [(extent - 1) / 2 for extent in self.config.patch])
        pooled = tokens.mean(dim=1).flatten(1)
        return Encoded(rearrange(tokens, "b t h w c -> b (t h w) c"), grid, pooled, affine)

    def evidence(self, volume: Tensor, mask: Tensor | None = None) -> Evidence:
        """The pooled vector concatenates the positions within a slab and averages over slabs, so the weights of a token
        depend on its position in the slab."""
        encoded = self._encoded(volume, mask, straight_through=torch.is_grad_enabled())

        def pool(features: Sequence[Tensor]) -> Tensor:
            return features[0].unflatten(1, encoded.grid).mean(dim=1).flatten(1)

        def alone(features: Sequence[Tensor], directions: Tensor) -> list[Tensor]:
            places = directions.unflatten(1, (*encoded.grid[1:], -1))
            cells = features[0].unflatten(1, encoded.grid)
            return [torch.einsum("bthwc,fhwc->bfthw", cells, places).flatten(2)]

        return Evidence(encoded, (Level(encoded.tokens, encoded.grid, encoded.affine),), pool, alone)

    def check_lift(self) -> None:
        raise ConfigError(
            "objectives.alignment: the tokens of the encoder ctvit have no vectors of their own in the shared embedding, "
            "because it pools each position of a slab separately; choose another encoder"
        )

    def layers(self) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
        """The patch embedding, the spatial layers (the first with the position bias), then the temporal ones."""
        first, *spatial = self.spatial
        blocks: Sequence[Sequence[nn.Module | nn.Parameter]] = [
            [self.embed],
            [self.bias, first],
            *[[layer] for layer in spatial],
        ]
        return [*blocks, *[[layer] for layer in self.temporal]]

    def end_step(self) -> None:
        if self.codebook is None:
            return
        # If the encoder's weights are frozen, apart from adapters, the codebook is not updated either.
        if any(parameter.requires_grad for name, parameter in self.named_parameters() if not is_adapter(name)):
            self.codebook.update_ema()
        else:
            self.codebook.sums.zero_()

    def patches(self, volume: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> embedded patches (B, t, h, w, C)."""
        check_shape(volume)
        expected = axis_shape(self.spec)
        if volume.shape[2] % self.config.patch[0] or tuple(volume.shape[3:]) != expected[1:]:
            raise ValueError(
                f"expected a volume (B, 1, {', '.join(map(str, expected))}) with any multiple of {self.config.patch[0]} "
                f"slices, found {tuple(volume.shape)}"
            )
        pt, p1, p2 = self.config.patch
        rows = rearrange(volume, "b c (t pt) (h p1) (w p2) -> b t h w (c pt p1 p2)", pt=pt, p1=p1, p2=p2)
        norm: Any = self.embed[0]
        linear: Any = self.embed[1]
        # Merge the norm's weight and bias into the linear map, so that no gradient with respect to voxels is needed.
        weight, bias = linear.weight * norm.weight, linear.bias + (linear.weight * norm.bias).sum(dim=1)
        embedded: Tensor = self.embed[2](
            F.linear(F.layer_norm(rows, norm.normalized_shape, eps=norm.eps), weight, bias)
        )
        return embedded

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, t, h, w, C) -> the same, before quantisation."""
        batch, slabs, height, width, _ = tokens.shape
        grid = (batch, slabs, height, width)
        bias = self.bias(height, width)
        # Under autocast, the residual stream is float32; the layers compute in bfloat16.
        rows = rearrange(tokens.to(self.spatial_norm.weight.dtype), "b t h w c -> (b t) (h w) c")
        for layer in self.spatial:
            rows = self._run(layer, rows, grid, bias)
        rows = self.spatial_norm(rows)
        rows = rearrange(rows, "(b t) (h w) c -> (b h w) t c", b=batch, h=height)
        for layer in self.temporal:
            rows = self._run(layer, rows, grid, None)
        return rearrange(self.temporal_norm(rows), "(b h w) t c -> b t h w c", b=batch, h=height)

    def _run(self, layer: nn.Module, rows: Tensor, grid: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, rows, grid, bias, use_reentrant=False)
        return layer(rows, grid, bias)


class Layer(nn.Module):
    """Depthwise convolution, attention, feed-forward, each with a residual."""

    def __init__(self, config: CTViTConfig) -> None:
        super().__init__()
        width, inner = config.width, config.heads * config.head_width
        hidden = int(4 * 2 / 3 * width)
        self.heads = config.heads
        self.convolution = nn.Conv3d(width, width, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key_value = nn.Linear(width, 2 * inner, bias=False)
        self.query_scale = nn.Parameter(torch.ones(config.head_width))
        self.key_scale = nn.Parameter(torch.ones(config.head_width))
        self.attention = Attention()
        self.out = nn.Linear(inner, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_gate = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, rows: Tensor, grid: tuple[int, ...], bias: Tensor | None) -> Tensor:
        """rows (sequences, n, C); grid (B, t, h, w); bias (heads, n, n) or None."""
        rows = rows + self._convolve(rows, grid)
        rows = rows + self._attend(rows, bias)
        return rows + self._feed_forward(self.mlp_norm(rows))

    def _convolve(self, rows: Tensor, grid: tuple[int, ...]) -> Tensor:
        # Quirk of the published code: temporal layers order rows as (b h w) t, but reshape them as (b t h w). The
        # convolution is causal along slabs: it reads the two slabs before and none after.
        return by_hand.depthwise(rows.reshape(*grid, rows.shape[-1]), self.convolution).reshape(rows.shape)

    def _feed_forward(self, rows: Tensor) -> Tensor:
        if not rows.is_cuda or not isinstance(self.up_gate, nn.Linear):
            return self.down(by_hand.gated(self.up_gate(rows)))  # type: ignore[no-any-return]
        up_gate, down = in_eights(self.up_gate.weight, self.down.weight)
        return F.linear(by_hand.gated(F.linear(rows, up_gate)), down)

    def _attend(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        query = rearrange(self.to_query(self.norm(rows)), "s n (h c) -> s n h c", h=self.heads)
        # Quirk of the published code: keys and values are computed from the input before the norm.
        key, value = rearrange(self.to_key_value(rows), "s n (two h c) -> two s n h c", two=2, h=self.heads)
        query = by_hand.unit(query, self.query_scale).transpose(1, 2)
        key, value = by_hand.unit(key, self.key_scale).transpose(1, 2), value.transpose(1, 2)
        mixed = self.attention(query, key, value, bias=bias, scale=ATTENTION_SCALE)
        return self.out(rearrange(mixed, "s h n c -> s n (h c)"))


def in_eights(up_gate: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Pad weights (2 n, C) and (C, n) with zeros until n is a multiple of 8, because the fast matrix products of GPUs
    do not support the published n = 1,365. The result does not change."""
    short = -down.shape[1] % 8
    halves = F.pad(up_gate.view(2, down.shape[1], -1), (0, 0, 0, short))
    return halves.flatten(0, 1), F.pad(down, (0, short))


class RelativeBias(nn.Module):
    """A bias per head for each pair of positions in a slab, from their offset in logarithmic steps (Liu et al.
    2022)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.1), nn.Linear(width, width), nn.LeakyReLU(0.1), nn.Linear(width, heads)
        )
        self.kept: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, height: int, width: int) -> Tensor:
        """The bias (heads, height * width, height * width). It depends only on the grid, and is computed once at
        inference."""
        if (
            not torch.is_grad_enabled()
            and not self.training
            and self.kept is not None
            and self.kept[0] == (height, width)
        ):
            return self.kept[1]
        weight = next(self.net.parameters())
        device = weight.device
        # Only (2h - 1)(2w - 1) offsets are distinct, of (hw) squared pairs.
        steps = [torch.arange(1 - extent, extent, device=device, dtype=torch.float32) for extent in (height, width)]
        offsets = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1)
        # Exact even under autocast, because the bias is cached and reused outside of it.
        with autocast_off(weight):
            values = self.net((torch.sign(offsets) * torch.log(offsets.abs() + 1)).to(weight.dtype))
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
        places = places.reshape(-1, 2).to(device)
        pair = places[:, None] - places[None, :]
        # Contiguous in the order of reading; otherwise the fused attention of GPUs falls back to materialising all
        # score matrices.
        bias = values[pair[..., 0] + height - 1, pair[..., 1] + width - 1].permute(2, 0, 1).contiguous()
        self.kept = None if torch.is_grad_enabled() or self.training else ((height, width), bias)
        return bias


class Codebook(nn.Module):
    """Vector quantisation by cosine similarity; in training, rows are updated by an exponential moving average once per
    step (``update_ema``)."""

    rows: Tensor
    sums: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, width), dim=-1))
        # Sums and counts of the tokens assigned to each row since the last step.
        self.register_buffer("sums", torch.zeros(size, width), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) -> quantised tokens (..., C) and the codes' indices (...). Gradients pass straight through."""
        # bfloat16 is too coarse to find the nearest of thousands of rows; blocks avoid holding all similarities at
        # once.
        with torch.no_grad(), float32_exactly(tokens):
            flat = F.normalize(tokens.detach().reshape(-1, tokens.shape[-1]).float(), dim=-1)
            rows = F.normalize(self.rows.float(), dim=-1)
            codes = torch.cat([(some @ rows.T).argmax(dim=-1) for some in flat.split(TOKENS_AT_ONCE)])
        quantised = self.rows[codes].reshape(tokens.shape).to(tokens.dtype)
        # Only passes with gradients count: the second of two passes over a batch.
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.sums.index_add_(0, codes, flat)
        if self.training:
            quantised = tokens + (quantised - tokens).detach()
        return quantised, codes.reshape(tokens.shape[:-1])

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the rows with the tokens of all micro-batches and ranks of the step. The codebook is constant during a
        step, so that splitting a batch does not change the result. A collective operation."""
        distributed.sum_over_ranks(self.sums)
        rows = self.rows.float()
        moved = F.normalize(rows * CODEBOOK_DECAY + F.normalize(self.sums, dim=-1) * (1 - CODEBOOK_DECAY), dim=-1)
        # A sum of unit vectors is zero only for a row without tokens.
        self.rows.copy_(torch.where((self.sums != 0).any(dim=-1, keepdim=True), moved, rows))
        self.sums.zero_()
