"""Detail within the cells of a map: the voxels on which the value of a cell depends.

A map says which cells hold a finding, not where in a cell it lies. If a voxel had the mean of its surroundings, the map
would change, to first order, by its gradient times the difference: gradient times input (Shrikumar et al. 2016), with
the surroundings as the reference. Voxels that raise the map the most keep its value; those that do not are lowered to a
third of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ctclip.explanation.method import Maps
from ctclip.explanation.space import resample

# A cell is divided into at most this many blocks along each axis, and a map into at most this many in all.
PARTS, MOST_BLOCKS = 4, 2**22
# Extent of a block's surroundings, and standard deviation of the smoothing, in blocks.
SURROUNDINGS, SMOOTH = 3, 1.0
# Influence is full from this quantile of the influences in the region that reaches half of the peak.
FULL = 0.997
# Weight of blocks without influence; full influence adds 1.
LEAST = 0.5


def with_detail(maps: Maps, slopes: Tensor, volume: Tensor, cell: Sequence[int], cells: Maps) -> Maps:
    """``maps`` on a finer grid, each value weighted by the influence of its block on the map.

    ``slopes`` (F, D, H, W): the gradient of the sum of each map with respect to ``volume`` (1, 1, D, H, W); ``cells``:
    the maps of cells of ``cell`` voxels (3,), the first of which begins at the first voxel. Returns ``maps`` unchanged if
    these cells do not fill the volume.
    """
    from scipy import ndimage

    shape = cells.values.shape[1:]
    if any(count * extent != all_ for count, extent, all_ in zip(shape, cell, volume.shape[2:], strict=True)):
        return maps
    parts = _parts(cell, shape)
    block = [extent // count for extent, count in zip(cell, parts, strict=True)]
    voxels = volume[0, 0].float().cpu().numpy()
    unlike = voxels - ndimage.uniform_filter(voxels, [SURROUNDINGS * extent for extent in block], mode="nearest")
    fine = [extent * count for extent, count in zip(shape, parts, strict=True)]
    affine = _divided(cells.affine, parts)
    detailed = np.empty((len(maps.values), *fine), np.float32)
    for number, (values, slope) in enumerate(zip(maps.values, slopes, strict=True)):
        influence = _sums(slope.float().cpu().numpy() * unlike, block)
        influence = ndimage.gaussian_filter(influence.clip(min=0), SMOOTH, mode="nearest")
        whole = resample(values, maps.affine, fine, affine)
        full = np.quantile(influence[whole >= whole.max() / 2], FULL)
        share = np.minimum(influence / max(float(full), 1e-30), 1)
        detailed[number] = whole * (LEAST + np.sqrt(share)) / (LEAST + 1)
    return maps._replace(values=detailed, affine=affine)


def _parts(cell: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Number of blocks of a cell along each axis: divisors of its voxels."""
    for most in range(PARTS, 0, -1):
        parts = [max(n for n in range(1, most + 1) if extent % n == 0) for extent in cell]
        if math.prod(parts) * math.prod(shape) <= MOST_BLOCKS:
            break
    return parts


def _divided(affine: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """The affine of cells -> that of their blocks."""
    fine = affine.copy()
    for axis, count in enumerate(parts):
        fine[:3, axis] /= count
        fine[:3, 3] -= affine[:3, axis] * (1 - 1 / count) / 2
    return fine


def _sums(values: np.ndarray, block: Sequence[int]) -> np.ndarray:
    """Sums over the voxels of each block."""
    d, h, w = (extent // step for extent, step in zip(values.shape, block, strict=True))
    total: np.ndarray = values.reshape(d, block[0], h, block[1], w, block[2]).sum(axis=(1, 3, 5))
    return total
