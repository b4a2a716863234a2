"""A smooth change of a volume: parameters on coarse grids, interpolated to the voxels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A cell whose maximum, in [-1, 1], is not above this value is air.
AIR = -0.95


class SmoothEdit(nn.Module):
    """The sum of one linearly interpolated grid for each of ``cells_mm``; initially 0, and always 0 where ``where`` is
    0.

    ``shape`` (D, H, W) and ``spacing`` (mm along each axis) of the volume; ``where`` (1, 1, D, H, W) in [0, 1].
    """

    where: Tensor

    def __init__(
        self, shape: Sequence[int], spacing: Sequence[float], cells_mm: Sequence[float], where: Tensor
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("where", where.float())
        self.grids = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, *grid_of(shape, spacing, mm), device=where.device)) for mm in cells_mm
        )

    def forward(self) -> Tensor:
        """(1, 1, D, H, W)."""
        total = torch.zeros_like(self.where)
        for grid in self.grids:
            total = total + F.interpolate(grid, self.shape, mode="trilinear", align_corners=False)
        return total * self.where


def grid_of(shape: Sequence[int], spacing: Sequence[float], cell_mm: float) -> tuple[int, int, int]:
    """The number of cells of about ``cell_mm`` along each axis of a volume."""
    d, h, w = (max(1, round(extent * mm / cell_mm)) for extent, mm in zip(shape, spacing, strict=True))
    return d, h, w


def total_variation(volume: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring voxels (Rudin, Osher & Fatemi 1992, anisotropic), summed over the
    axes.

    volume (1, 1, D, H, W).
    """
    total = volume.new_zeros(())
    for axis in (2, 3, 4):
        if volume.shape[axis] > 1:
            total = total + volume.diff(dim=axis).abs().mean()
    return total


def body(volume: Tensor, grid: Sequence[int]) -> Tensor:
    """1 at the voxels of ``volume`` (1, 1, D, H, W), with values in [-1, 1], whose cell of ``grid`` contains more than
    air."""
    held = F.adaptive_max_pool3d(volume.float(), list(grid)) > AIR
    return F.interpolate(held.float(), volume.shape[2:], mode="nearest")
