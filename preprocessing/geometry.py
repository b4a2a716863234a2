"""Orient, resample, crop and pad; separable, in float32, computing only the voxels that are kept."""

from __future__ import annotations

from typing import Literal

import numba
import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import Volume

Kind = Literal["hu", "stored", "voxels"]
AIR, METAL = -1024.0, 3071.0
OBLIQUE_DEGREES = 0.5
LPS = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def orient(volume: Volume) -> Volume:
    """Permute and flip axes so that slices run to the head, rows to the back and columns to the patient's left.

    Oblique volumes are resampled onto an axis-aligned grid that contains them.
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
    """For each array axis, the world axis (0 x, 1 y, 2 z) along it; each world axis occurs once."""
    from itertools import permutations

    best = max(permutations(range(3)), key=lambda world: sum(abs(direction[w, a]) for a, w in enumerate(world)))
    return np.array(best)


def straighten(volume: Volume, degrees: float) -> Volume:
    """Resample an oblique volume onto an axis-aligned grid with the same spacing that contains all of it."""
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
    # ITK's resampler is not used, because its decomposition of some small rotations fails and fills every voxel.
    to_source = np.linalg.inv(volume.affine) @ affine
    moved = affine_transform(
        # Padding below air would be interpolated into neighbouring voxels.
        np.maximum(volume.array, np.asarray(AIR, volume.array.dtype)),
        to_source[:3, :3], to_source[:3, 3], tuple(size[::-1]), np.float32, order=1, cval=AIR,
    )  # fmt: skip
    warning = f"oblique by {degrees:.1f} degrees: resampled onto the axis-aligned grid"
    return Volume(moved, affine, volume.source, [*volume.warnings, warning])


Centre = tuple[float, float, float]


def bounds(volume: Volume, spec: PreprocessingSpec, centre: Centre | None = None) -> list[tuple[float, float]]:
    """The range of voxel indices of an oriented volume that the grid covers along each axis, measured to the outer
    faces of its voxels."""
    ends = []
    for positions, target, spacing in zip(
        source_positions(volume, spec, centre), spec.spacing, volume.spacing, strict=True
    ):
        ends.append((float(positions[0] - target / spacing / 2), float(positions[-1] + target / spacing / 2)))
    return ends


def resampled_affine(volume: Volume, spec: PreprocessingSpec, centre: Centre | None = None) -> np.ndarray:
    """(4, 4) from voxel indices of the result of ``resample`` to LPS+ mm. Raises PreprocessingError if volume and grid
    do not overlap."""
    affine = volume.affine.copy()
    for axis, positions in enumerate(source_positions(volume, spec, centre)):
        _inside(positions, volume.array.shape[axis])
        step = positions[1] - positions[0] if len(positions) > 1 else spec.spacing[axis] / volume.spacing[axis]
        affine[:3, 3] += volume.affine[:3, axis] * positions[0]
        affine[:3, axis] = volume.affine[:3, axis] * step
    return affine[:, [0, 2, 1, 3]] if spec.published_geometry else affine


def grid_affine(spec: PreprocessingSpec) -> np.ndarray:
    """(4, 4) from [slice, row, column] of the grid of ``spec`` to LPS+ mm relative to the grid's centre. It gives the
    relative positions of the voxels of a stored volume, whose position in the scan is not stored."""
    affine = np.eye(4)
    # Columns run to the patient's left, rows to the back, slices to the head.
    affine[:3, :3] = np.diag(spec.spacing)[:, ::-1].T
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(spec.shape) - 1) / 2)
    return affine


def resample(volume: Volume, spec: PreprocessingSpec, kind: Kind = "hu", centre: Centre | None = None) -> np.ndarray:
    """An oriented volume in HU on the grid of ``spec``, centred on the volume or on the voxel index ``centre``: float32
    HU of ``spec.shape``; or ``stored``, int16 HU; or ``voxels``, float32 in [-1, 1].

    Each is written once in its final form, because at the published size, touching new memory is half of the work.
    """
    clip = spec.hu_window if spec.published_geometry else (AIR, METAL)
    array = volume.array if volume.array.dtype in (np.int16, np.float32) else volume.array.astype(np.float32)
    taps, kept = [], []
    for axis, (positions, target) in enumerate(zip(source_positions(volume, spec, centre), spec.spacing, strict=True)):
        width = max(1.0, target / volume.spacing[axis]) if spec.interpolation == "antialiased" else 1.0
        inside = _inside(positions, array.shape[axis])
        first, weights = _taps(positions[inside], array.shape[axis], width)
        if array.strides[axis] < 0:
            # The axis is only reversed: read it as stored, from the other end.
            first, weights = array.shape[axis] - first - weights.shape[1], weights[:, ::-1]
        taps.append((np.ascontiguousarray(first), np.ascontiguousarray(weights)))
        kept.append((inside.start, inside.stop))
    unturned = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
    # CT-CLIP indexes its volumes [slice, column, row].
    turned = spec.published_geometry
    order = (0, 2, 1) if turned else (0, 1, 2)
    placed = np.empty([spec.shape[axis] for axis in order], np.int16 if kind == "stored" else np.float32)
    fill = np.full((1, 1, 1), round(spec.fill) if kind == "stored" else spec.fill, np.float32)
    if kind == "voxels":
        fill = spec.normalise(fill)
    window = {"hu": (-np.inf, np.inf, 0.0, 1.0), "stored": (-32768.0, 32767.0, 0.0, 1.0), "voxels": spec.window}[kind]
    z, y, x = taps
    _separable(
        np.ascontiguousarray(unturned), z, y, x, _float32(clip), _float32(window), kind == "stored", turned,
        fill[0, 0, 0], placed, tuple(kept[axis] for axis in order),
    )  # fmt: skip
    return placed


def _float32(values: tuple[float, ...]) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, values))


def source_positions(volume: Volume, spec: PreprocessingSpec, centre: Centre | None = None) -> list[np.ndarray]:
    """Source index (float) of each output voxel, along each axis. The published geometry is always centred on the
    volume."""
    positions = []
    sides = zip(volume.array.shape, volume.spacing, spec.spacing, spec.shape, strict=True)
    for axis, (size, spacing, target, count) in enumerate(sides):
        output = np.arange(count, dtype=np.float64)
        if not spec.published_geometry:
            middle = (size - 1) / 2 if centre is None else centre[axis]
            positions.append((output - (count - 1) / 2) * (target / spacing) + middle)
            continue
        resized = int(size * spacing / target)
        if resized < 1:
            raise PreprocessingError(
                f"{volume.source}: an axis of {size} voxels of {spacing:g} mm is shorter than one voxel of {target:g} mm"
            )
        start = (resized - count) // 2 if resized >= count else -((count - resized) // 2)
        positions.append((output + start + 0.5) * (size / resized) - 0.5)
    return positions


def _inside(positions: np.ndarray, size: int) -> slice:
    """The output voxels that lie inside the source."""
    inside = np.flatnonzero((positions > -0.5 - 1e-6) & (positions < size - 0.5 + 1e-6))
    if len(inside) == 0:
        raise PreprocessingError("the volume does not overlap the grid of the spec")
    return slice(int(inside[0]), int(inside[-1]) + 1)


def _taps(positions: np.ndarray, size: int, width: float) -> tuple[np.ndarray, np.ndarray]:
    """First source index and weights of a triangle filter of half-width ``width`` source voxels about positions inside
    the source."""
    centre = np.clip(positions, 0, size - 1)
    count = min(size, int(np.ceil(2 * width)) + 1)
    first = np.clip(np.floor(centre - width).astype(np.int64) + 1, 0, size - count)
    index = first[:, None] + np.arange(count)
    weights = np.maximum(0.0, 1 - np.abs(index - centre[:, None]) / width)
    weights /= weights.sum(axis=1, keepdims=True)
    if width > 1:
        # The centroid of a sampled triangle deviates from its centre; weights a + b * distance correct this, so that a
        # ramp stays a ramp. At the border, where part of the filter lies outside, weights are not corrected.
        distance = index - centre[:, None]
        first_moment, second_moment = (weights * distance).sum(axis=1), (weights * distance**2).sum(axis=1)
        whole = (centre - width >= 0) & (centre + width <= size - 1)
        scale = np.where(whole, 1 / (1 - first_moment**2 / second_moment), 1.0)
        tilt = np.where(whole, -scale * first_moment / second_moment, 0.0)
        weights *= scale[:, None] + tilt[:, None] * distance
    return first, weights.astype(np.float32)


@numba.njit(cache=True, fastmath=False, nogil=True)
def _separable(source, z, y, x, clip, window, rounded, turned, fill, placed, kept):  # type: ignore[no-untyped-def]
    """Weighted sums along the three axes; ``z``, ``y``, ``x`` are (first index, weights) of each.

    ``source`` (n, H, W) of HU; ``placed`` (slices, rows, columns), or (slices, columns, rows) if ``turned``, is written
    once, in order: ``fill`` outside ``kept`` (begin, end along each axis), and inside it values mapped through
    ``window`` (low, high, middle, gain), ``rounded`` for integers. One slice is processed at a time, so that
    intermediate results stay in cache; z comes first if that leaves fewer slices, else last.
    """
    z_first, z_weights = z
    low, high, middle, gain = window
    (above, below), (before, behind), (begin, end) = kept
    shrinks = z_first.max() + z_weights.shape[1] - z_first.min() > below - above
    count = 1 if shrinks else z_weights.shape[1]
    slab = np.empty(source.shape[1:], np.float32)
    planes = np.empty((count, behind - before, end - begin), np.float32)
    cached = np.full(count, -1)
    line = np.empty(end - begin, np.float32)
    # Rows have an odd number of cache lines, so that a column does not map to a single cache set.
    lines = np.empty((len(y[0]), (source.shape[2] // 16 | 1) * 16 + 16), np.float32)
    placed[:above] = fill
    for k in range(below - above):
        if shrinks:
            _blended(source, z_first[k], z_weights[k], clip, slab)
            _in_plane(slab, y, x, (-np.inf, np.inf), turned, lines, planes[0])
        else:
            for index in range(z_first[k], z_first[k] + count):
                if cached[index % count] != index and z_weights[k, index - z_first[k]] != 0:
                    _in_plane(source[index], y, x, clip, turned, lines, planes[index % count])
                    cached[index % count] = index
        result = placed[above + k]
        result[:before] = fill
        for i in range(behind - before):
            line[:] = 0
            for t in range(count):
                weight = np.float32(1) if shrinks else z_weights[k, t]
                if weight != 0:
                    plane = planes[(z_first[k] + t) % count, i]
                    for j in range(len(line)):
                        line[j] += weight * plane[j]
            written = result[before + i]
            written[:begin] = fill
            if rounded:
                for j in range(len(line)):
                    written[begin + j] = np.rint(min(max(line[j], low), high))
            else:
                for j in range(len(line)):
                    written[begin + j] = (min(max(line[j], low), high) - middle) * gain
            written[end:] = fill
        result[behind:] = fill
    placed[below:] = fill


@numba.njit(cache=True, fastmath=False, nogil=True)
def _blended(source, first, weights, clip, slab):  # type: ignore[no-untyped-def]
    """``slab`` (H, W): the weighted sum of a few slices, clipped as they are read."""
    low, high = clip
    for y in range(slab.shape[0]):
        line = slab[y]
        line[:] = 0
        for t in range(len(weights)):
            weight = weights[t]
            if weight != 0:
                read = source[first + t, y]
                for x in range(len(line)):
                    line[x] += weight * min(max(np.float32(read[x]), low), high)


@numba.njit(cache=True, fastmath=False, nogil=True)
def _in_plane(source, y, x, clip, turned, lines, plane):  # type: ignore[no-untyped-def]
    """One slice (H, W), clipped as it is read, to ``plane`` (rows, columns), or (columns, rows) if ``turned``."""
    (y_first, y_weights), (x_first, x_weights) = y, x
    low, high = clip
    for i in range(len(y_first)):
        line = lines[i]
        line[:] = 0
        for t in range(y_weights.shape[1]):
            weight = y_weights[i, t]
            if weight != 0:
                read = source[y_first[i] + t]
                for j in range(len(read)):
                    line[j] += weight * min(max(np.float32(read[j]), low), high)
    if turned:
        for j in range(len(x_first)):
            begin = x_first[j]
            for i in range(len(y_first)):
                total = np.float32(0)
                for t in range(x_weights.shape[1]):
                    total += x_weights[j, t] * lines[i, begin + t]
                plane[j, i] = total
    else:
        for i in range(len(y_first)):
            for j in range(len(x_first)):
                total = np.float32(0)
                for t in range(x_weights.shape[1]):
                    total += x_weights[j, t] * lines[i, x_first[j] + t]
                plane[i, j] = total
