"""Resample a map from its own grid to any other grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Prepared


def resample(
    values: np.ndarray, affine: np.ndarray, shape: Sequence[int], onto: np.ndarray, *, order: int = 1
) -> np.ndarray:
    """Values (d, h, w) on the grid of ``affine``, interpolated at every voxel of a grid of ``shape`` and affine
    ``onto``.

    Both affines (4, 4) lead from an index to the same space in mm. ``order`` 1 is linear and gives float32; 0 takes the
    nearest cell. Beyond the centres of the outermost cells, their values are repeated.
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
    # Parallel axes: interpolating one after the other is several times faster than all three at once.
    steps = turn[np.arange(3), along]
    scaled = tuple(int(shape[axis]) for axis in along)
    result = ndimage.affine_transform(values, steps, offset, output_shape=scaled, **options)
    return result.transpose(np.argsort(along))


def in_scan(
    values: np.ndarray, affine: np.ndarray, prepared: Prepared, shape: Sequence[int], onto: np.ndarray
) -> np.ndarray:
    """A map (d, h, w) with the affine of ``Maps`` on a grid of the scan's space (``onto``: index to LPS mm), float32; 0
    outside the volume that the model saw."""
    spread = resample(values, prepared.token_affine(affine), shape, onto)
    spread[~seen(prepared, shape, onto)] = 0
    return spread


def seen(prepared: Prepared, shape: Sequence[int], onto: np.ndarray) -> np.ndarray:
    """Which voxels of a grid lie in the volume that the model saw: bool of ``shape``."""
    leads = np.linalg.inv(prepared.affine) @ onto
    inside = np.ones(tuple(shape), bool)
    given = [np.arange(extent) for extent in shape]
    extents = prepared.spec.shape
    if prepared.spec.published_geometry:
        extents = (extents[0], extents[2], extents[1])
    for axis in range(3):
        # One coordinate of the prepared volume at a time; all three would take 24 bytes per voxel.
        place = leads[axis, 3] + sum(
            (leads[axis, other] * given[other]).reshape([-1 if d == other else 1 for d in range(3)])
            for other in range(3)
            if abs(leads[axis, other]) > 1e-9
        )
        inside &= (place >= -0.5) & (place <= extents[axis] - 0.5)
    return inside


def centres(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """The centre of each cell in mm of ``affine``: (..., 3)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]
