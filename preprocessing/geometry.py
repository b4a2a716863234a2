"""Orientation, resampling, crop and pad; separable, in float32, computing only the voxels that are kept."""

from __future__ import annotations

import numba
import numpy as np

from preprocessing.errors import PreprocessingError
from preprocessing.spec import PreprocessingSpec
from preprocessing.volume import Volume

AIR, METAL = -1024.0, 3071.0
OBLIQUE_DEGREES = 0.5
LPS = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def orient(volume: Volume) -> Volume:
    """Permute and flip axes so that slices run up, rows to the back and columns to the left.

    Oblique volumes are resampled onto the axis-aligned grid that holds them.
    """
    direction = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    if not np.isfinite(direction).all() or abs(np.linalg.det(direction)) < 0.5:
        raise PreprocessingError(
            f"{volume.source}: its header's orientation is degenerate; convert it from DICOM again"
        )
    axes = _nearest_axes(direction)
    # World axis (z, y, x) of LPS for the output's (slice, row, column), and the input axis that runs along it.
    order = [int(np.flatnonzero(axes == world)[0]) for world in (2, 1, 0)]
    array = volume.array.transpose(order)
    affine = np.eye(4)
    affine[:3, :3] = volume.affine[:3, order]
    affine[:3, 3] = volume.affine[:3, 3]
    for axis, world in enumerate((2, 1, 0)):
        if affine[world, axis] < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    turned = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    degrees = float(np.degrees(np.arccos(np.clip((turned * LPS).sum(axis=0), -1, 1))).max())
    oriented = Volume(array, affine, volume.source, volume.warnings)
    return oriented if degrees <= OBLIQUE_DEGREES else straighten(oriented, degrees)


def _nearest_axes(direction: np.ndarray) -> np.ndarray:
    """For each array axis the world axis (0 x, 1 y, 2 z) it runs along, each world axis once."""
    from itertools import permutations

    best = max(permutations(range(3)), key=lambda world: sum(abs(direction[w, a]) for a, w in enumerate(world)))
    return np.array(best)


def straighten(volume: Volume, degrees: float) -> Volume:
    """Resample an oblique volume onto an axis-aligned grid of the same spacing that holds all of it."""
    from scipy.ndimage import affine_transform

    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in volume.array.shape], indexing="ij")).reshape(3, -1)
    world = volume.affine[:3, :3] @ corners + volume.affine[:3, 3:]
    low, high = world.min(axis=1), world.max(axis=1)
    step = np.array(volume.spacing)[::-1]
    size = np.maximum(1, np.round((high - low) / step)).astype(int)
    if np.prod(size, dtype=float) > 8 * np.prod(volume.array.shape, dtype=float):
        raise PreprocessingError(f"{volume.source}: too oblique ({degrees:.0f} degrees) for its slice distance")
    origin = (low + high) / 2 - (size - 1) / 2 * step
    fill = float(min(AIR, volume.array.min()))
    affine = np.eye(4)
    affine[:3, :3] = np.diag(step)[:, ::-1]
    affine[:3, 3] = origin
    # ITK's resampler is not used: its decomposition of some small rotations fails, and every voxel is then fill.
    to_source = np.linalg.inv(volume.affine) @ affine
    moved = affine_transform(
        volume.array, to_source[:3, :3], to_source[:3, 3], tuple(size[::-1]), np.float32, order=1, cval=fill
    )
    warning = f"oblique by {degrees:.1f} degrees: resampled onto the axis-aligned grid"
    return Volume(moved, affine, volume.source, [*volume.warnings, warning])


def resample(volume: Volume, spec: PreprocessingSpec) -> tuple[np.ndarray, np.ndarray]:
    """An oriented volume in HU on the grid of ``spec``, centred: float32 HU of ``spec.shape``, and its affine."""
    array, spacing = volume.array, volume.spacing
    low, high = spec.hu_window if spec.published_geometry else (AIR, METAL)
    sources = [
        _source_positions(n, s, target, count, spec.published_geometry)
        for n, s, target, count in zip(array.shape, spacing, spec.spacing, spec.shape, strict=True)
    ]
    taps = [
        _taps(positions, n, 1.0 if spec.published_geometry else max(1.0, target / step))
        for positions, n, target, step in zip(sources, array.shape, spec.spacing, spacing, strict=True)
    ]
    # The axis that shrinks most goes first: every later pass touches fewer voxels.
    order = sorted(range(3), key=lambda axis: (taps[axis][2] - taps[axis][1]) / array.shape[axis])
    result: np.ndarray = array if array.dtype in (np.int16, np.float32) else array.astype(np.float32)
    for number, axis in enumerate(order):
        (first, weights), inside_first, inside_last = taps[axis]
        shaped = np.ascontiguousarray(result).reshape(
            int(np.prod(result.shape[:axis])), result.shape[axis], int(np.prod(result.shape[axis + 1 :]))
        )
        clip = (low, high) if number == 0 else (-np.inf, np.inf)
        passed = _pass(shaped, first, weights, np.float32(clip[0]), np.float32(clip[1]))  # type: ignore[arg-type]
        result = passed.reshape(*result.shape[:axis], inside_last - inside_first, *result.shape[axis + 1 :])
    placed = np.full(spec.shape, spec.fill, dtype=np.float32)
    placed[tuple(slice(a, b) for _, a, b in taps)] = result
    affine = volume.affine.copy()
    for axis, positions in enumerate(sources):
        step = positions[1] - positions[0] if len(positions) > 1 else 1.0
        affine[:3, 3] += volume.affine[:3, axis] * positions[0]
        affine[:3, axis] = volume.affine[:3, axis] * step
    if spec.published_geometry:
        # CT-CLIP indexes its volumes [slice, column, row].
        return np.ascontiguousarray(placed.transpose(0, 2, 1)), affine[:, [0, 2, 1, 3]]
    return placed, affine


def _source_positions(size: int, spacing: float, target: float, count: int, published: bool) -> np.ndarray:
    """Source index (float) of each of ``count`` output voxels along one axis."""
    output = np.arange(count, dtype=np.float64)
    if not published:
        return (output - (count - 1) / 2) * (target / spacing) + (size - 1) / 2
    resized = int(size * spacing / target)
    if resized < 1:
        raise PreprocessingError(
            f"an axis of {size} voxels of {spacing:g} mm is shorter than one voxel of {target:g} mm"
        )
    start = (resized - count) // 2 if resized >= count else -((count - resized) // 2)
    return (output + start + 0.5) * (size / resized) - 0.5


def _taps(positions: np.ndarray, size: int, width: float) -> tuple[tuple[np.ndarray, np.ndarray], int, int]:
    """First source index and weights of a triangle filter of half-width ``width`` source voxels for the output
    voxels that lie inside the source; and the range of those."""
    inside = np.flatnonzero((positions > -0.5 - 1e-6) & (positions < size - 0.5 + 1e-6))
    if len(inside) == 0:
        raise PreprocessingError("the volume does not meet the grid of the spec")
    centre = np.clip(positions[inside], 0, size - 1)
    count = min(size, int(np.ceil(2 * width)) + 1)
    first = np.clip(np.floor(centre - width).astype(np.int64) + 1, 0, size - count)
    index = first[:, None] + np.arange(count)
    weights = np.maximum(0.0, 1 - np.abs(index - centre[:, None]) / width)
    weights /= weights.sum(axis=1, keepdims=True)
    if width > 1:
        # A sampled triangle's centroid strays from its centre; a + b * distance brings it back, so that a ramp
        # stays a ramp. At the border, where part of the filter lies outside, its weights are left as they are.
        distance = index - centre[:, None]
        first_moment, second_moment = (weights * distance).sum(axis=1), (weights * distance**2).sum(axis=1)
        whole = (centre - width >= 0) & (centre + width <= size - 1)
        scale = np.where(whole, 1 / (1 - first_moment**2 / second_moment), 1.0)
        tilt = np.where(whole, -scale * first_moment / second_moment, 0.0)
        weights *= scale[:, None] + tilt[:, None] * distance
    return (first, weights.astype(np.float32)), int(inside[0]), int(inside[-1]) + 1


@numba.njit(cache=True, fastmath=False, nogil=True)
def _pass(source: np.ndarray, first: np.ndarray, weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weighted sums along the middle axis of (A, n, B), values clipped to [low, high] as they are read."""
    before, _, after = source.shape
    count, taps = weights.shape
    result = np.empty((before, count, after), dtype=np.float32)
    for a in range(before):
        for i in range(count):
            if after == 1:
                total = np.float32(0)
                for t in range(taps):
                    total += weights[i, t] * min(max(np.float32(source[a, first[i] + t, 0]), low), high)
                result[a, i, 0] = total
                continue
            row = result[a, i]
            row[:] = 0
            for t in range(taps):
                weight = weights[i, t]
                if weight == 0:
                    continue
                line = source[a, first[i] + t]
                for b in range(after):
                    row[b] += weight * min(max(np.float32(line[b]), low), high)
    return result
