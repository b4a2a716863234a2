"""Masks of voxels and tokens, and means and maxima over real tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def air_where_padded(volume: Tensor, mask: Tensor | None) -> Tensor:
    """``volume`` with -1 wherever ``mask`` (B, 1, D, H, W) bool is false: the content of padding has no effect."""
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
    """Like ``mean_token``, with the maximum of each channel."""
    candidates = tokens if real is None else tokens.masked_fill(~real[..., None], float("-inf"))
    # max instead of amax, whose gradient compares every token with the largest.
    return candidates.max(dim=1).values


def at_tokens(levels: Sequence[Tensor], grid: tuple[int, int, int]) -> Tensor:
    """Finer grids, (B, C, d, h, w) each -> (B, N, 2 * sum of C): the mean and maximum of each channel within each token
    of ``grid``, in slice, row, column order."""
    parts = [
        part for cells in levels for part in (F.adaptive_avg_pool3d(cells, grid), F.adaptive_max_pool3d(cells, grid))
    ]
    return torch.cat(parts, dim=1).flatten(2).transpose(1, 2)
