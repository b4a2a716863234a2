"""From the grid of a map to any other grid, through the millimetres of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Prepared


def resample(
    values: np.ndarray, affine: np.ndarray, shape: Sequence[int], onto: np.ndarray, *, order: int = 1
) -> np.ndarray:
    """values (d, h, w) on a grid of ``affine``, read at every voxel of a grid of ``shape`` and affine ``onto``: float32.

    Both affines (4, 4) lead from index to the same millimetres. Linear (``order`` 1) or nearest (0); beyond the outermost
    cells' centres the value is that of the outermost.
    """
    from scipy import ndimage

    leads = np.linalg.inv(affine) @ onto
    turn, offset = leads[:3, :3], leads[:3, 3]
    along = np.abs(turn).argmax(axis=1)
    straight = len(set(along)) == 3 and np.allclose(turn * (np.arange(3) != along[:, None]), 0, atol=1e-6)
    options = {"order": order, "mode": "nearest", "output": values.dtype if order == 0 else np.float32}
    if not straight:
        result: np.ndarray = ndimage.affine_transform(values, turn, offset, output_shape=tuple(shape), **options)
        return result
    # Axes that run along each other: one after the other is several times faster than all three at once.
    steps = turn[np.arange(3), along]
    scaled = tuple(int(shape[axis]) for axis in along)
    result = ndimage.affine_transform(values, steps, offset, output_shape=scaled, **options)
    return result.transpose(np.argsort(along))


def in_scan(
    values: np.ndarray, affine: np.ndarray, prepared: Prepared, shape: Sequence[int], onto: np.ndarray
) -> np.ndarray:
    """A map (d, h, w) of ``Maps.affine`` on a grid of the scan's own space (``onto``: index to LPS+ mm), float32; 0 where
    the grid lies outside of what the model was given."""
    spread = resample(values, prepared.token_affine(affine), shape, onto)
    spread[~seen(prepared, shape, onto)] = 0
    return spread


def seen(prepared: Prepared, shape: Sequence[int], onto: np.ndarray) -> np.ndarray:
    """Bool of ``shape``: the voxels of a grid that lie in the volume that the model was given."""
    leads = np.linalg.inv(prepared.affine) @ onto
    inside = np.ones(tuple(shape), bool)
    given = [np.arange(extent) for extent in shape]
    extents = prepared.spec.shape
    if prepared.spec.published_geometry:
        extents = (extents[0], extents[2], extents[1])
    for axis in range(3):
        # One coordinate of the prepared volume at every voxel; all three at once would take 24 bytes a voxel.
        place = leads[axis, 3] + sum(
            (leads[axis, other] * given[other]).reshape([-1 if d == other else 1 for d in range(3)])
            for other in range(3)
            if abs(leads[axis, other]) > 1e-9
        )
        inside &= (place >= -0.5) & (place <= extents[axis] - 0.5)
    return inside


def centres(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """(..., 3) of ``shape``: where each cell's centre lies, in the millimetres of ``affine``."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]
