"""Detail within the cells of a map: the voxels on which the value of a cell depends.

A map says which cells hold a finding, not where in a cell it lies. How much the map would change if a voxel had the
mean of its surroundings is its difference from them times the mean gradient on the way (integrated gradients,
Sundararajan et al. 2017), here by the midpoint rule: the gradient of the volume halfway to its smoothed self. At the
volume itself, the whole gradient of a maximum would fall on a single voxel, such as one of a rib. Narrow surroundings
show edges and thin structures, wide ones show what fills a cell; a voxel counts as far as both agree on it. Voxels that
raise the map most keep its value; those that do not are lowered to a third of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.explanation.method import Gradient, Maps, Method, Subject
from ctclip.explanation.space import resample
from ctclip.models.encoded import axis_spacing

# A cell is divided into at most this many blocks along each axis, and a map into at most this many in all.
PARTS, MOST_BLOCKS = 4, 2**22
# Extents of a block's surroundings, and standard deviation of the smoothing, in blocks.
SURROUNDINGS, SMOOTH = (3, 9), 1.0
# Influence is full from this quantile of the influences in the region that reaches half of the peak.
FULL = 0.997
# Weight of blocks without influence; full influence adds 1.
LEAST = 0.5


def with_detail(
    maps: Maps, looking: Method, subject: Subject, cell: Sequence[int], shifts: Sequence[Sequence[int]]
) -> Maps:
    """``maps`` of a method on a finer grid, each value weighted by the influence of its block on the map.

    ``cell`` (3,): voxels of the cells along each axis, the first of which begins at the first voxel; ``shifts``:
    positions of the cells at which the gradient is taken. Returns ``maps`` unchanged if the method has no gradient, or if
    the cells do not fill the volume.
    """
    from scipy import ndimage

    gradient = looking.slopes(subject)
    if gradient is None:
        return maps
    voxels = subject.volume[0, 0].float().cpu().numpy()
    if any(extent % step for extent, step in zip(voxels.shape, cell, strict=True)):
        return maps
    shape = [extent // step for extent, step in zip(voxels.shape, cell, strict=True)]
    parts = _parts(cell, shape)
    block = [extent // count for extent, count in zip(cell, parts, strict=True)]
    fine = [extent // step for extent, step in zip(voxels.shape, block, strict=True)]
    spacing = axis_spacing(subject.model.volume_encoder.spec)
    affine = np.diag([*(step * mm for step, mm in zip(block, spacing, strict=True)), 1.0])
    affine[:3, 3] = [(step - 1) / 2 * mm for step, mm in zip(block, spacing, strict=True)]
    whole = np.stack([resample(values, maps.affine, fine, affine) for values in maps.values])
    shares = np.ones_like(whole)
    for extent in SURROUNDINGS:
        around = ndimage.uniform_filter(voxels, [extent * step for step in block], mode="nearest")
        halfway = torch.from_numpy((voxels + around) / 2)[None, None].to(subject.volume)
        influences = _influences(gradient, halfway, voxels - around, shifts, block)
        for number, influence in enumerate(influences):
            smooth = ndimage.gaussian_filter(influence.clip(min=0), SMOOTH, mode="nearest")
            full = np.quantile(smooth[whole[number] >= whole[number].max() / 2], FULL)
            shares[number] = np.minimum(shares[number], smooth / max(float(full), 1e-30))
    detailed = whole * (LEAST + np.sqrt(shares)) / (LEAST + 1)
    return maps._replace(values=detailed, affine=affine)


def shifted(volume: Tensor, shift: Sequence[int]) -> Tensor:
    """The volume (1, 1, D, H, W) shifted so that it begins ``shift`` voxels later along each axis; its last voxels are
    repeated."""
    z, y, x = shift
    return F.pad(volume, (0, x, 0, y, 0, z), mode="replicate")[:, :, z:, y:, x:]


def _influences(
    gradient: Gradient, volume: Tensor, difference: np.ndarray, shifts: Sequence[Sequence[int]], block: Sequence[int]
) -> list[np.ndarray]:
    """For each finding, the sums over blocks of the gradients at all positions of the cells times the ``difference`` (D,
    H, W)."""
    total: list[np.ndarray] = []
    for shift in shifts:
        z, y, x = shift
        d, h, w = (extent - step for extent, step in zip(difference.shape, shift, strict=True))
        for number, slope in enumerate(gradient(shifted(volume, shift))):
            moved = np.zeros_like(difference)
            moved[z:, y:, x:] = slope[:d, :h, :w].float().cpu().numpy()
            sums = _sums(moved * difference, block)
            if number == len(total):
                total.append(sums)
            else:
                total[number] += sums
    return total


def _parts(cell: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Number of blocks of a cell along each axis: divisors of its voxels."""
    for most in range(PARTS, 0, -1):
        parts = [max(n for n in range(1, most + 1) if extent % n == 0) for extent in cell]
        if math.prod(parts) * math.prod(shape) <= MOST_BLOCKS:
            break
    return parts


def _sums(values: np.ndarray, block: Sequence[int]) -> np.ndarray:
    """Sums over the voxels of each block."""
    d, h, w = (extent // step for extent, step in zip(values.shape, block, strict=True))
    total: np.ndarray = values.reshape(d, block[0], h, block[1], w, block[2]).sum(axis=(1, 3, 5))
    return total
