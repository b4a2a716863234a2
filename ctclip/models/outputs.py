"""What every volume encoder returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class VolumeTokens(NamedTuple):
    """tokens (B, N, C) in slice, row, column order of ``grid`` (d, h, w), d * h * w = N; pooled (B, P)."""

    tokens: Tensor
    grid: tuple[int, int, int]
    pooled: Tensor
