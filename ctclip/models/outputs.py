"""What every volume encoder takes and returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class VolumeTokens(NamedTuple):
    """tokens (B, N, C) in slice, row, column order of ``grid`` (d, h, w), d * h * w = N; pooled (B, P)."""

    tokens: Tensor
    grid: tuple[int, int, int]
    pooled: Tensor


def exactly(given: Tensor) -> torch.autocast:
    """What is done within is done in the precision of its operands, on ``given``'s device, under autocast too."""
    return torch.autocast("cpu" if given.is_meta else given.device.type, enabled=False)


def check_volume(volume: Tensor) -> None:
    """Raise ValueError unless ``volume`` is (B, 1, D, H, W) in [-1, 1]."""
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise ValueError(f"expected a volume (B, 1, D, H, W), found shape {tuple(volume.shape)}")
    if type(volume) is not Tensor or volume.is_meta:
        # Only its shape is known: sizes or a plan are being counted.
        return
    low, high = (float(v) for v in torch.aminmax(volume.detach()))
    # Written so that NaN is refused too.
    if not (low >= -1.5 and high <= 1.5):
        raise ValueError(
            f"voxels range over [{low:.4g}, {high:.4g}], expected [-1, 1]: these look like unscaled Hounsfield units; "
            f"prepare the scan with ctclip.preprocessing.prepare"
        )


def air_where_padded(volume: Tensor, mask: Tensor | None) -> Tensor:
    """``volume`` with -1 wherever ``mask`` (B, 1, D, H, W) bool is false: what padding holds cannot matter."""
    return volume if mask is None else volume.masked_fill(~mask, -1.0)


def real_cells(mask: Tensor | None, grid: tuple[int, ...]) -> Tensor | None:
    """mask (B, 1, D, H, W) bool -> (B, N) bool: cells of ``grid`` (d, h, w) in which any voxel is real; None: all."""
    return None if mask is None else F.adaptive_max_pool3d(mask.float(), grid).flatten(1) > 0


def mean_token(tokens: Tensor, real: Tensor | None) -> Tensor:
    """tokens (B, N, C) -> (B, C), over those of ``real`` (B, N) bool; None: all."""
    if real is None:
        return tokens.mean(dim=1)
    return tokens.masked_fill(~real[..., None], 0.0).sum(dim=1) / real.sum(dim=1, keepdim=True)


def largest_token(tokens: Tensor, real: Tensor | None) -> Tensor:
    """As ``mean_token``, the largest of each channel."""
    shown = tokens if real is None else tokens.masked_fill(~real[..., None], float("-inf"))
    # Not amax, whose gradient compares every token with the largest.
    return shown.max(dim=1).values
