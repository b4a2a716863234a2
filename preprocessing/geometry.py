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
    affine = np.eye(4)
    affine[:3, :3] = np.diag(step)[:, ::-1]
    affine[:3, 3] = origin
    # ITK's resampler is not used: its decomposition of some small rotations fails, and every voxel is then fill.
    to_source = np.linalg.inv(volume.affine) @ affine
    moved = affine_transform(
        # Padding below air would bleed into what it borders on.
        np.maximum(volume.array, np.asarray(AIR, volume.array.dtype)),
        to_source[:3, :3], to_source[:3, 3], tuple(size[::-1]), np.float32, order=1, cval=AIR,
    )  # fmt: skip
    warning = f"oblique by {degrees:.1f} degrees: resampled onto the axis-aligned grid"
    return Volume(moved, affine, volume.source, [*volume.warnings, warning])


def resample(volume: Volume, spec: PreprocessingSpec) -> tuple[np.ndarray, np.ndarray]:
    """An oriented volume in HU on the grid of ``spec``, centred: float32 HU of ``spec.shape``, and its affine."""
    low, high = spec.hu_window if spec.published_geometry else (AIR, METAL)
    array = volume.array if volume.array.dtype in (np.int16, np.float32) else volume.array.astype(np.float32)
    sources = [
        _source_positions(n, s, target, count, spec.published_geometry)
        for n, s, target, count in zip(array.shape, volume.spacing, spec.spacing, spec.shape, strict=True)
    ]
    taps = []
    for axis, (positions, target) in enumerate(zip(sources, spec.spacing, strict=True)):
        width = max(1.0, target / volume.spacing[axis]) if spec.interpolation == "antialiased" else 1.0
        (first, weights), begin, end = _taps(positions, array.shape[axis], width)
        if array.strides[axis] < 0:
            # The axis was only turned round: read it as it lies, from its other end.
            first, weights = array.shape[axis] - first - weights.shape[1], weights[:, ::-1]
        taps.append((np.ascontiguousarray(first), np.ascontiguousarray(weights), slice(begin, end)))
    unturned = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
    # CT-CLIP indexes its volumes [slice, column, row].
    turned = spec.published_geometry
    placed = np.empty([spec.shape[axis] for axis in ((0, 2, 1) if turned else (0, 1, 2))], np.float32)
    inside = tuple(taps[axis][2] for axis in ((0, 2, 1) if turned else (0, 1, 2)))
    _fill_outside(placed, inside, spec.fill)
    (zf, zw, _), (yf, yw, _), (xf, xw, _) = taps
    _separable(
        np.ascontiguousarray(unturned),
        zf,
        zw,
        yf,
        yw,
        xf,
        xw,
        np.float32(low),
        np.float32(high),
        turned,
        placed[inside],
    )
    affine = volume.affine.copy()
    for axis, positions in enumerate(sources):
        step = positions[1] - positions[0] if len(positions) > 1 else 1.0
        affine[:3, 3] += volume.affine[:3, axis] * positions[0]
        affine[:3, axis] = volume.affine[:3, axis] * step
    return placed, affine[:, [0, 2, 1, 3]] if turned else affine


def _fill_outside(placed: np.ndarray, inside: tuple[slice, ...], fill: float) -> None:
    """Only the margins: every page of a volume that is touched twice costs as much as its resampling."""
    for axis, kept in enumerate(inside):
        before = inside[:axis]
        placed[(*before, slice(0, kept.start))] = fill
        placed[(*before, slice(kept.stop, None))] = fill


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
def _separable(  # type: ignore[no-untyped-def]
    source, z_first, z_weights, y_first, y_weights, x_first, x_weights, low, high, turned, result
):
    """Weighted sums along the three axes, one output slice at a time: what lies between the passes stays in cache.

    ``source`` (n, H, W) of HU, clipped to [low, high] as it is read; ``result`` (slices, rows, columns), or (slices,
    columns, rows) if ``turned``.
    """
    _, height, width = source.shape
    rows, columns = len(y_first), len(x_first)
    # Rows of an odd number of cache lines: a column of them must not fall into one set of the cache.
    stride = (width // 16 | 1) * 16 + 16
    slab = np.empty((height, width), np.float32)
    lines = np.empty((rows, stride), np.float32)
    for k in range(len(z_first)):
        for y in range(height):
            line = slab[y]
            line[:] = 0
            for t in range(z_weights.shape[1]):
                weight = z_weights[k, t]
                if weight != 0:
                    read = source[z_first[k] + t, y]
                    for x in range(width):
                        line[x] += weight * min(max(np.float32(read[x]), low), high)
        for i in range(rows):
            line = lines[i]
            line[:] = 0
            for t in range(y_weights.shape[1]):
                weight = y_weights[i, t]
                if weight != 0:
                    read_slab = slab[y_first[i] + t]
                    for x in range(width):
                        line[x] += weight * read_slab[x]
        if turned:
            for j in range(columns):
                begin = x_first[j]
                for i in range(rows):
                    total = np.float32(0)
                    for t in range(x_weights.shape[1]):
                        total += x_weights[j, t] * lines[i, begin + t]
                    result[k, j, i] = total
        else:
            for i in range(rows):
                for j in range(columns):
                    total = np.float32(0)
                    for t in range(x_weights.shape[1]):
                        total += x_weights[j, t] * lines[i, x_first[j] + t]
                    result[k, i, j] = total
