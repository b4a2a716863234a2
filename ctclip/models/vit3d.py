"""A 3-D vision transformer for CT: convolutional stem, positions in millimetres, attention pooling.

The stem cuts the volume into small cells (a linear map of each cell under several HU windows, as a reader
looks through several windows), mixes neighbours by residual convolutions, and merges cells into tokens. The
transformer has rotary positions over three axes in mm (Su et al. 2021, extended to 3-D), normalised queries
and keys (Dehghani et al. 2023), SwiGLU (Shazeer 2020) and register tokens (Darcet et al. 2023). Long grids can be
attended to in windows, with every few layers a global one, over all tokens or over windows (``windows.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip.config import ViT3DConfig
from ctclip.models.batchnorm import GlobalBatchNorm3d
from ctclip.models.outputs import VolumeTokens, air_where_padded, check_volume, largest_token, mean_token, real_cells
from ctclip.models.windows import Windows, cut, means, to_tokens, within

LONGEST_WAVE_MM = 800.0
SHORTEST_WAVE_MM = 12.0
# Lung is emphysema below -950 HU (Gevenois et al. 1995); the air around a patient is -1000 with some noise.
AIR_HU = -950.0


class ViT3D(nn.Module):
    """volume (B, 1, D, H, W) in [-1, 1] -> VolumeTokens; ``width`` is the size of the pooled vector."""

    def __init__(self, config: ViT3DConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.registers = nn.Parameter(torch.randn(config.registers, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.query = nn.Parameter(torch.randn(config.width) * 0.02) if "attention" in config.pooling else None
        self.token_width = config.width
        self.width = config.width * len(config.pooling) + self.stem.pooled_width

    def forward(self, volume: Tensor, mask: Tensor | None = None) -> VolumeTokens:
        """volume (B, 1, D, H, W) in [-1, 1]; mask (B, 1, D, H, W) bool, true where voxels are real.

        Returns tokens (B, N, width) in slice, row, column order of ``grid``. Tokens of nothing but padding
        (and, with ``drop_air``, of nothing but air outside the body) take no part and come back as zeros.
        """
        self._check(volume)
        volume = air_where_padded(volume, mask)
        cells, pooled_stem = self.stem(volume, mask)
        grid = (cells.shape[2], cells.shape[3], cells.shape[4])
        tokens = rearrange(cells, "b c d h w -> b (d h w) c")
        keep = self._kept(volume, mask)
        positions = self._positions(grid, tokens.device)
        if keep is None:
            flat = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
            encoded = self._transform(tokens, positions[None], flat, None, grid)
            return VolumeTokens(encoded, grid, torch.cat([self._pool(encoded, None), *pooled_stem], dim=1))
        order, valid = _compact(keep)
        packed = torch.gather(tokens, 1, order[..., None].expand(-1, -1, tokens.shape[2]))
        encoded = self._transform(packed, positions[order], order, valid, grid) * valid[..., None]
        pooled = torch.cat([self._pool(encoded, valid), *pooled_stem], dim=1)
        full = torch.zeros_like(tokens).scatter(1, order[..., None].expand_as(encoded), encoded)
        return VolumeTokens(full, grid, pooled)

    def _transform(
        self, tokens: Tensor, positions: Tensor, order: Tensor, valid: Tensor | None, grid: tuple[int, int, int]
    ) -> Tensor:
        """tokens (B, M, C), of which ``valid`` are real; ``order`` (B, M): their places in the grid, row by row."""
        batch, registers = len(tokens), len(self.registers)
        tokens = torch.cat([self.registers.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)
        head_width = self.config.width // self.config.heads
        rotation = _rotation(positions, head_width, registers)
        attends = _attends(valid, registers)
        windows, between = None, None
        if self.config.window is not None:
            windows = cut(order, valid, grid, self.config.window)
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

    def _kept(self, volume: Tensor, mask: Tensor | None) -> Tensor | None:
        """(B, N) bool of the tokens that take part, or None if all do."""
        size = self.token_voxels
        keep = None
        if mask is not None:
            keep = F.max_pool3d(mask.to(volume.dtype), size) > 0
        if self.config.drop_air and type(volume) is Tensor and not volume.is_meta:
            inside = ~outside_air(volume, size, self.config.hu_window)
            keep = inside if keep is None else keep & inside
        if keep is None or bool(keep.all()):
            return None
        return keep.flatten(1)

    def _positions(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """(N, 3) centre of each token in mm from the centre of the volume."""
        axes = []
        for count, size in zip(grid, self._token_mm(), strict=True):
            axes.append((torch.arange(count, device=device) - (count - 1) / 2) * size)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)

    def _token_mm(self) -> list[float]:
        return [extent * mm for extent, mm in zip(self.token_voxels, self.config.spacing, strict=True)]

    @property
    def token_voxels(self) -> tuple[int, ...]:
        """Voxels [slice, row, column] of a token."""
        return tuple(extent * 2 ** len(self.config.stages) for extent in self.config.patch)

    def _check(self, volume: Tensor) -> None:
        size = self.token_voxels
        check_volume(volume)
        if any(extent % step for extent, step in zip(volume.shape[2:], size, strict=True)):
            raise ValueError(
                f"volume of {tuple(volume.shape[2:])} voxels [slice, row, column] cannot be cut into tokens of "
                f"{tuple(size)}: check the axis order and the preprocessing spec"
            )


class Stem(nn.Module):
    """Volume -> tokens' cells: HU windows, a linear map of each patch, then stages of convolutions.

    With ``extremes`` the smallest and largest voxel of each patch and window are mapped beside its voxels: a fleck of
    calcium is lost in a weighted sum of 64. Each stage mixes neighbours by 3x3x3 convolutions and ends with a strided
    one that halves each axis. With ``pool_stem`` the mean and the largest of each channel before that are given out too:
    what is small need not survive the way to a token to be seen.
    """

    def __init__(self, config: ViT3DConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.hu_window, self.windows = config.hu_window, config.windows
        widths = [width for width, _ in config.stages] + [config.width]
        self.embed = nn.Linear(math.prod(config.patch) * len(config.windows), widths[0])
        self.extremes = nn.Linear(2 * len(config.windows), widths[0], bias=False) if config.extremes else None
        self.embed_norm = GlobalBatchNorm3d(widths[0]) if config.stages else nn.Identity()
        layers: list[nn.Module] = []
        for (width, depth), after in zip(config.stages, widths[1:], strict=True):
            layers += [Convolution(width, width) for _ in range(depth)]
            layers.append(Convolution(width, after, stride=2))
        self.convolutions = nn.Sequential(*layers)
        self.pools = config.pool_stem
        self.pooled_width = 2 * sum(widths[:-1]) if config.pool_stem else 0

    def forward(self, volume: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """volume and mask (B, 1, D, H, W) -> (B, C, d, h, w), and what was pooled on the way, (B, ...) each."""
        pd, ph, pw = self.patch
        patches = rearrange(volume, "b 1 (d pd) (h ph) (w pw) -> b d h w (pd ph pw)", pd=pd, ph=ph, pw=pw)
        shown = [self._window(patches, low, high) for low, high in self.windows]
        embedded = self.embed(torch.cat(shown, dim=-1))
        if self.extremes is not None:
            spots = [extreme for window in shown for extreme in (window.amin(dim=-1), window.amax(dim=-1))]
            embedded = embedded + self.extremes(torch.stack(spots, dim=-1))
        # The channel axis stays innermost in memory: convolutions and linear maps both want it there.
        cells = rearrange(embedded, "b d h w c -> b c d h w")
        if len(self.convolutions):
            cells = F.relu(self.embed_norm(cells))
        pooled: list[Tensor] = []
        for layer in self.convolutions:
            if self.pools and layer.halves:
                real = real_cells(mask, cells.shape[2:])
                tokens = rearrange(cells, "b c d h w -> b (d h w) c")
                pooled += [mean_token(tokens, real), largest_token(tokens, real)]
            cells = layer(cells)
        return cells, pooled

    def _window(self, values: Tensor, low: float, high: float) -> Tensor:
        """Show HU from ``low`` to ``high`` as -1 to 1, clipped; values stand for ``hu_window``."""
        bottom, top = self.hu_window
        if (low, high) == (bottom, top):
            return values
        gain = (top - bottom) / (high - low)
        offset = (bottom + top - low - high) / (high - low)
        return torch.add(values.new_tensor(offset), values, alpha=gain).clamp_(-1, 1)


class Convolution(nn.Module):
    """relu(norm(conv(x))), 3x3x3; added to x where the shapes allow."""

    def __init__(self, width: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(width, after, 3, stride, padding=1, bias=False)
        self.norm = GlobalBatchNorm3d(after)
        self.residual = width == after and stride == 1
        self.halves = stride == 2

    def forward(self, cells: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, after, D / stride, H / stride, W / stride)."""
        mixed = self.norm(self.convolution(cells))
        return F.relu(cells + mixed if self.residual else mixed)


class RMSNorm(nn.RMSNorm):
    """Under autocast with its weight in the tokens' precision: PyTorch has one kernel for both alike, several for both mixed."""

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
        """tokens (B, N, C); rotation: cos and sin (B or 1, 1, N, C / heads / 2); attends: which are real (B, 1, 1, N)
        bool, None for all; windows: attend within them alone."""
        query, key, value = rearrange(
            self.qkv(self.norm_attention(tokens)), "b n (three h c) -> three b h n c", three=3, h=self.heads
        )
        query = _Turned.apply(self.norm_query(query), *rotation)  # type: ignore[no-untyped-call]
        key = _Turned.apply(self.norm_key(key), *rotation)  # type: ignore[no-untyped-call]
        if windows is None:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attends)
        else:
            mixed = within(query, key, value, attends, windows)
        tokens = tokens + self.out(rearrange(mixed, "b h n c -> b n (h c)"))
        gate, up = self.gate_up(self.norm_mlp(tokens)).chunk(2, dim=-1)
        return tokens + self.down(F.silu(gate) * up)

    def between(
        self, tokens: Tensor, rotation: tuple[Tensor, Tensor], attends: Tensor | None, windows: Windows
    ) -> Tensor:
        """tokens (B, registers + M, C): the layer over registers and the windows' means; rotation and attends are of those."""
        registers = tokens.shape[1] - len(windows.back) // len(tokens)
        before = torch.cat([tokens[:, :registers], means(tokens[:, registers:], windows, len(tokens))], dim=1)
        after = self(before, rotation, attends)
        change = to_tokens((after - before)[:, registers:], windows)
        return torch.cat([after[:, :registers], tokens[:, registers:] + change], dim=1)


def outside_air(volume: Tensor, size: tuple[int, ...], hu_window: tuple[float, float]) -> Tensor:
    """Tokens of nothing but air outside the body.

    volume (B, 1, D, H, W) in [-1, 1]; size: voxels of a token. (B, 1, d, h, w) bool. A token is air if the
    mean of each of its eighths is below -950 HU, and outside if it joins the edge of its own axial slab through
    such tokens: lungs, emphysematous ones too, lie within the body wall and are never reached.
    """
    bottom, top = hu_window
    threshold = 2 * (AIR_HU - bottom) / (top - bottom) - 1
    half = tuple(max(1, extent // 2) for extent in size)
    densest = F.max_pool3d(F.avg_pool3d(volume.float(), half), tuple(s // h for s, h in zip(size, half, strict=True)))
    air = densest < threshold
    border = torch.zeros_like(air)
    border[..., 0, :] = border[..., -1, :] = border[..., :, 0] = border[..., :, -1] = True
    reached = air & border
    for _ in range(air.shape[-1] + air.shape[-2]):
        grown = (F.max_pool3d(reached.float(), (1, 3, 3), stride=1, padding=(0, 1, 1)) > 0) & air
        if bool((grown == reached).all()):
            break
        reached = grown
    return reached


def _attends(valid: Tensor | None, registers: int) -> Tensor | None:
    """(B, N) bool -> (B, 1, 1, registers + N)."""
    return None if valid is None else F.pad(valid, (registers, 0), value=True)[:, None, None, :]


def _compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B, M) of the kept tokens first, and which of them (B, M) are real; M is the batch's largest count."""
    most = int(keep.sum(dim=1).max())
    order = torch.argsort(keep.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    return order, torch.gather(keep, 1, order)


def _rotation(positions: Tensor, head_width: int, registers: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, registers + N, head_width / 2) for positions (B, N, 3) in mm; registers are not turned."""
    pairs = head_width // 2
    axis = torch.arange(pairs, device=positions.device) % 3
    step = torch.arange(pairs, device=positions.device) // 3
    steps = max(1, math.ceil(pairs / 3) - 1)
    waves = SHORTEST_WAVE_MM * (LONGEST_WAVE_MM / SHORTEST_WAVE_MM) ** (step / steps)
    angle = 2 * math.pi * positions[..., axis] / waves
    angle = F.pad(angle, (0, 0, registers, 0))[:, None]
    return angle.cos(), angle.sin()


class _Turned(torch.autograd.Function):
    """Pairs of channels (i and i + c / 2) turned by an angle; the gradient is turned back, in fewer passes over memory
    than autograd would make."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(vectors, cos, sin)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(slope, cos, -sin), None, None


def _turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32 as the angles are, whatever the vectors (B, heads, N, c) are."""
    made = torch.empty_like(vectors)
    (even, odd), (turned_even, turned_odd) = vectors.chunk(2, dim=-1), made.chunk(2, dim=-1)
    turned_even.copy_(even * cos - odd * sin)
    turned_odd.copy_(even * sin + odd * cos)
    return made
