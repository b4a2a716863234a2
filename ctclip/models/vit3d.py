"""A 3-D vision transformer for CT: convolutional stem, positions in millimetres, attention pooling.

The stem cuts the volume into small cells (a linear map of each cell in several HU windows, like the display windows of
a radiologist), mixes neighbours by residual convolutions, and merges cells into tokens. The transformer has rotary
positions over three axes in mm (Su et al. 2021, extended to 3-D), normalised queries and keys (Dehghani et al. 2023),
SwiGLU (Shazeer 2020) and register tokens (Darcet et al. 2023). Long grids can be attended to in windows, with every few
layers a global one, over all tokens or over windows (``windows.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip.config import Count, EncoderConfig, HuWindow
from ctclip.data.air import BodyTokens
from ctclip.errors import ConfigError
from ctclip.models.attention import Attention
from ctclip.models.encoded import (
    Encoded,
    Evidence,
    Level,
    VolumeEncoder,
    axis_shape,
    axis_spacing,
    beside,
    check_shape,
)
from ctclip.models.pooling import air_where_padded, at_tokens, largest_token, mean_token, real_cells
from ctclip.models.stem import Stem
from ctclip.models.windows import Windows, cut, means, to_tokens, within
from ctclip.preprocessing.spec import PreprocessingSpec

LONGEST_WAVE_MM = 800.0
SHORTEST_WAVE_MM = 12.0


class ViT3DConfig(EncoderConfig):
    """Our 3-D vision transformer with a convolutional stem (``ctclip/models/vit3d.py``)."""

    kind: Literal["vit3d"] = Field("vit3d", description="our 3-D vision transformer with a convolutional stem")
    patch: tuple[Count, Count, Count] = Field((4, 4, 4), description="voxels [slice, row, column] of one stem cell")
    stages: tuple[tuple[Count, Annotated[int, Field(ge=0, le=64)]], ...] = Field(
        ((64, 1), (128, 1)),
        description="width and number of 3x3x3 residual convolutions of each stem stage; each stage ends with a "
        "strided convolution that halves the axes. No stages: a linear patch embedding",
    )
    width: int = Field(192, ge=1, le=2**16, description="channels of a token; an even multiple of heads")
    depth: int = Field(4, ge=1, le=512, description="transformer layers")
    heads: int = Field(6, ge=1, le=1024, description="attention heads")
    registers: int = Field(4, ge=0, le=4096, description="number of additional learned tokens (registers)")
    windows: tuple[HuWindow, ...] = Field(
        ((-1000.0, 1000.0),), min_length=1, description="HU windows that become the input channels"
    )
    pooling: tuple[Literal["attention", "mean", "max"], ...] = Field(
        ("attention", "mean"),
        min_length=1,
        description="how tokens are pooled into one vector; several results are concatenated",
    )
    extremes: bool = Field(
        False,
        description="also use the maximum and minimum of each patch in each window: for small bright or dark spots "
        "anywhere in the patch",
    )
    pool_stem: bool = Field(False, description="also pool the mean and maximum of every stem stage: for small findings")
    window: tuple[Count, Count, Count] | None = Field(
        None, description="size of local attention windows in tokens [slice, row, column]; null: full attention"
    )
    global_every: int = Field(4, ge=1, le=512, description="if window is set: every n-th layer is global")
    global_over: Literal["tokens", "windows"] = Field(
        "tokens",
        description="what a global layer attends to: all tokens, or the mean of each window (windows), which is much "
        "cheaper",
    )
    drop_air: bool = Field(False, description="leave out tokens that contain only air outside the body")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ViT3DConfig:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _windows_to_be_global_over(self) -> ViT3DConfig:
        if self.global_over == "windows" and self.window is None:
            raise ValueError("global_over=windows needs window: without it, every layer attends to all tokens")
        return self


class ViT3D(VolumeEncoder):
    """volume (B, 1, D, H, W) in [-1, 1] -> Encoded; ``width`` is the size of the pooled vector."""

    Config: ClassVar[type[EncoderConfig]] = ViT3DConfig
    lora_targets = ("qkv", "out", "gate_up", "down")
    config: ViT3DConfig

    def __init__(self, config: ViT3DConfig, spec: PreprocessingSpec) -> None:
        super().__init__(config, spec)
        extents, size = axis_shape(spec), self.token_voxels
        if any(extent % step for extent, step in zip(extents, size, strict=True)):
            raise ConfigError(
                f"model.volume: tokens of {' x '.join(map(str, size))} voxels (patch times the stem's strides) do not divide "
                f"the volumes of spec {spec.name!r} ({' x '.join(map(str, extents))} voxels): prepare them with another "
                "spec, or choose another patch or other stages"
            )
        self.stem = Stem(config, spec.hu_window)
        self.registers = nn.Parameter(torch.randn(config.registers, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.query = nn.Parameter(torch.randn(config.width) * 0.02) if "attention" in config.pooling else None
        self.token_width = config.width
        self.width = config.width * len(config.pooling) + self.stem.pooled_width
        self.pools_finer_grids = self.stem.pooled_width > 0

    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        """volume (B, 1, D, H, W) in [-1, 1]; mask (B, 1, D, H, W) bool, true where voxels are real; body (B, N) bool on
        the host, with ``drop_air`` (found here if not given).

        Returns tokens (B, N, width) in slice, row, column order of ``grid``. Tokens that contain only padding (and,
        with ``drop_air``, only air outside the body) are left out and returned as zeros.
        """
        return self._encode(volume, mask, body)

    def evidence(self, volume: Tensor, mask: Tensor | None = None) -> Evidence:
        """The tokens, and with ``pool_stem`` the cells of each stage of the stem."""
        stages: list[Tensor] = []
        encoded = self._encode(volume, mask, None, stages)
        levels = [Level(encoded.tokens, encoded.grid, encoded.affine, encoded.real)]
        for number, cells in enumerate(stages):
            step = [extent * 2**number for extent in self.config.patch]
            grid = (cells.shape[2], cells.shape[3], cells.shape[4])
            affine = self.affine(step, [(extent - 1) / 2 for extent in step])
            levels.append(Level(cells.flatten(2).transpose(1, 2), grid, affine, real_cells(mask, grid)))
        widths = [self.token_width * len(self.config.pooling), *(2 * level.features.shape[2] for level in levels[1:])]

        def pool(features: Sequence[Tensor]) -> Tensor:
            parts = [self._pool(features[0], encoded.real)]
            for cells, level in zip(features[1:], levels[1:], strict=True):
                parts += [mean_token(cells, level.real), largest_token(cells, level.real)]
            return torch.cat(parts, dim=1)

        def alone(features: Sequence[Tensor], directions: Tensor) -> list[Tensor]:
            return [beside(*pair) for pair in zip(features, directions.split(widths, dim=1), strict=True)]

        return Evidence(encoded, tuple(levels), pool, alone)

    def lift(self, tokens: Tensor) -> Tensor:
        """The part that is pooled from the stem does not depend on tokens and is 0."""
        return F.pad(tokens.repeat(1, 1, len(self.config.pooling)), (0, self.stem.pooled_width))

    def check_lift(self) -> None:
        """Always supported, see ``lift``."""

    def _encode(
        self, volume: Tensor, mask: Tensor | None, body: Tensor | None, stages: list[Tensor] | None = None
    ) -> Encoded:
        """``stages``: filled with the cells of each stage of the stem that are pooled."""
        self._check(volume)
        volume = air_where_padded(volume, mask)
        if stages is None and not self.training:
            stages = []
        cells, pooled_stem = self.stem(volume, mask, stages)
        grid = (cells.shape[2], cells.shape[3], cells.shape[4])
        local = at_tokens(stages, grid) if stages else None
        tokens = rearrange(cells, "b c d h w -> b (d h w) c")
        keep = self._kept(volume, mask, body)
        positions = self._positions(grid, tokens.device)
        affine = self.affine(self.token_voxels, [(extent - 1) / 2 for extent in self.config.patch])
        if keep is None:
            flat = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
            encoded = self._transform(tokens, positions[None], flat, None, grid)
            pooled = torch.cat([self._pool(encoded, None), *pooled_stem], dim=1)
            return Encoded(encoded, grid, pooled, affine, local=local)
        places, is_real = _compact(keep)
        device = tokens.device
        order, valid = (torch.from_numpy(part).to(device, non_blocking=True) for part in (places, is_real))
        packed = torch.gather(tokens, 1, order[..., None].expand(-1, -1, tokens.shape[2]))
        encoded = self._transform(packed, positions[order], places, is_real, grid, valid) * valid[..., None]
        pooled = torch.cat([self._pool(encoded, valid), *pooled_stem], dim=1)
        full = torch.zeros_like(tokens).scatter(1, order[..., None].expand_as(encoded), encoded)
        real = torch.from_numpy(keep).to(device, non_blocking=True)
        return Encoded(full, grid, pooled, affine, real, local=None if local is None else local * real[..., None])

    def layers(self) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
        """The stem with the registers, then each block."""
        return [[self.stem, self.registers], *[[block] for block in self.blocks]]

    def body_tokens(self) -> BodyTokens | None:
        """With ``drop_air``, tokens of air outside the body are left out."""
        return BodyTokens(self.token_voxels, self.spec) if self.config.drop_air else None

    def _transform(
        self,
        tokens: Tensor,
        positions: Tensor,
        places: np.ndarray,
        is_real: np.ndarray | None,
        grid: tuple[int, int, int],
        valid: Tensor | None = None,
    ) -> Tensor:
        """``tokens`` (B, M, C), of which ``valid`` (B, M) are real (``is_real`` is a copy on the host); ``places`` (B,
        M): their indices in the grid, row by row."""
        batch, registers = len(tokens), len(self.registers)
        tokens = torch.cat([self.registers.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)
        head_width = self.config.width // self.config.heads
        rotation = _rotation(positions, head_width, registers)
        attends = _attends(valid, registers)
        windows, between = None, None
        if self.config.window is not None:
            windows = cut(places, is_real, grid, self.config.window, tokens.device)
            if self.config.global_over == "windows":
                turn = _rotation(means(positions, windows, batch), head_width, registers)
                between = (turn, _attends(windows.there, registers), windows)
        for depth, block in enumerate(self.blocks, start=1):
            everywhere = depth % self.config.global_every == 0
            layer: Callable[..., Tensor] = block
            given: tuple[Any, ...] = (rotation, attends, None if everywhere else windows)
            if everywhere and between is not None:
                layer, given = block.between, between  # type: ignore[assignment]
            if self.config.activation_checkpointing and self.training:
                tokens = checkpoint(layer, tokens, *given, use_reentrant=False)
            else:
                tokens = layer(tokens, *given)
        return self.norm(tokens[:, registers:])

    def _pool(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """(B, N, C) -> (B, C * kinds of pooling)."""
        pooled = []
        for kind in self.config.pooling:
            if kind == "attention":
                score = tokens @ self.query.to(tokens.dtype) / math.sqrt(tokens.shape[-1])  # type: ignore[union-attr]
                if valid is not None:
                    score = score.masked_fill(~valid, float("-inf"))
                pooled.append(torch.einsum("bn,bnc->bc", score.softmax(dim=1), tokens))
            else:
                pooled.append(mean_token(tokens, valid) if kind == "mean" else largest_token(tokens, valid))
        return torch.cat(pooled, dim=1)

    def _kept(self, volume: Tensor, mask: Tensor | None, body: Tensor | None) -> np.ndarray | None:
        """The tokens that are used, (B, N) bool, or None for all."""
        keep = None
        if mask is not None:
            keep = (F.max_pool3d(mask.to(volume.dtype), self.token_voxels) > 0).flatten(1).cpu().numpy()
        finder = self.body_tokens()
        if body is not None and finder is not None:
            keep = body.numpy() if keep is None else keep & body.numpy()
        elif finder is not None and type(volume) is Tensor and not volume.is_meta:
            inside = finder.of_volumes(volume)
            keep = inside if keep is None else keep & inside
        return None if keep is None or keep.all() else keep

    def _positions(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """(N, 3) centre of each token in mm from the centre of the volume."""
        axes = []
        for count, size in zip(grid, self._token_mm(), strict=True):
            axes.append((torch.arange(count, device=device) - (count - 1) / 2) * size)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)

    def _token_mm(self) -> list[float]:
        return [extent * mm for extent, mm in zip(self.token_voxels, axis_spacing(self.spec), strict=True)]

    @property
    def token_voxels(self) -> tuple[int, int, int]:
        """Voxels [slice, row, column] of a token."""
        depth, height, width = (extent * 2 ** len(self.config.stages) for extent in self.config.patch)
        return depth, height, width

    def _check(self, volume: Tensor) -> None:
        size = self.token_voxels
        check_shape(volume)
        if any(extent % step for extent, step in zip(volume.shape[2:], size, strict=True)):
            raise ValueError(
                f"volume of {tuple(volume.shape[2:])} voxels [slice, row, column] cannot be cut into tokens of "
                f"{tuple(size)}: check the axis order and the preprocessing spec"
            )


class RMSNorm(nn.RMSNorm):
    """RMS norm with its weight in the precision of the tokens: PyTorch has one kernel for equal precisions, but several
    for mixed ones."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(tokens, self.normalized_shape, self.weight.to(tokens.dtype), self.eps)


class Block(nn.Module):
    """Pre-norm transformer layer: attention with normalised queries and keys, then SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 8 * ((width * 8 // 3 + 7) // 8)
        self.heads = heads
        self.norm_attention = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_query = RMSNorm(width // heads)
        self.norm_key = RMSNorm(width // heads)
        self.attention = Attention()
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        tokens: Tensor,
        rotation: tuple[Tensor, Tensor],
        attends: Tensor | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """tokens (B, N, C); rotation: cos and sin (B or 1, 1, N, C / heads / 2); attends: which tokens are real (B, 1,
        1, N) bool, None for all; windows: attend only within these."""
        query, key, value = rearrange(
            self.qkv(self.norm_attention(tokens)), "b n (three h c) -> three b h n c", three=3, h=self.heads
        )
        query = _Rotate.apply(self.norm_query(query), *rotation)  # type: ignore[no-untyped-call]
        key = _Rotate.apply(self.norm_key(key), *rotation)  # type: ignore[no-untyped-call]
        if windows is None:
            mixed = self.attention(query, key, value, mask=attends)
        else:
            mixed = within(query, key, value, attends, windows)
        tokens = tokens + self.out(rearrange(mixed, "b h n c -> b n (h c)"))
        gate, up = self.gate_up(self.norm_mlp(tokens)).chunk(2, dim=-1)
        return tokens + self.down(F.silu(gate) * up)

    def between(
        self, tokens: Tensor, rotation: tuple[Tensor, Tensor], attends: Tensor | None, windows: Windows
    ) -> Tensor:
        """tokens (B, registers + M, C): apply the layer to registers and window means; rotation and attends refer to
        these."""
        registers = tokens.shape[1] - len(windows.back) // len(tokens)
        before = torch.cat([tokens[:, :registers], means(tokens[:, registers:], windows, len(tokens))], dim=1)
        after = self(before, rotation, attends)
        change = to_tokens((after - before)[:, registers:], windows)
        return torch.cat([after[:, :registers], tokens[:, registers:] + change], dim=1)


def _attends(valid: Tensor | None, registers: int) -> Tensor | None:
    """(B, N) bool -> (B, 1, 1, registers + N)."""
    return None if valid is None else F.pad(valid, (registers, 0), value=True)[:, None, None, :]


def _compact(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (B, M) with the kept tokens first, and which of them (B, M) are real; M is the largest count in the
    batch."""
    most = int(keep.sum(axis=1).max())
    order = np.argsort(~keep, axis=1, kind="stable")[:, :most]
    return order, np.take_along_axis(keep, order, axis=1)


def _rotation(positions: Tensor, head_width: int, registers: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, registers + N, head_width / 2) for positions (B, N, 3) in mm; registers are not rotated."""
    pairs = head_width // 2
    axis = torch.arange(pairs, device=positions.device) % 3
    step = torch.arange(pairs, device=positions.device) // 3
    steps = max(1, math.ceil(pairs / 3) - 1)
    waves = SHORTEST_WAVE_MM * (LONGEST_WAVE_MM / SHORTEST_WAVE_MM) ** (step / steps)
    angle = 2 * math.pi * positions[..., axis] / waves
    angle = F.pad(angle, (0, 0, registers, 0))[:, None]
    return angle.cos(), angle.sin()


class _Rotate(torch.autograd.Function):
    """Rotate pairs of channels (i and i + c / 2) by an angle. The gradient is rotated back, in fewer passes over memory
    than autograd needs."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(vectors, cos, sin)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(slope, cos, -sin), None, None


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate vectors (B, heads, N, c) of any precision in float32, the precision of the angles."""
    result = torch.empty_like(vectors)
    (even, odd), (turned_even, turned_odd) = vectors.chunk(2, dim=-1), result.chunk(2, dim=-1)
    turned_even.copy_(even * cos - odd * sin)
    turned_odd.copy_(even * sin + odd * cos)
    return result
