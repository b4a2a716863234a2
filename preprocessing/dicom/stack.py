"""Stack the slices of one acquisition into a volume: order, copies, gaps and tilt, by their positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctclip.preprocessing.dicom.headers import VALUES
from ctclip.preprocessing.dicom.missing import MOST_MISSING
from ctclip.preprocessing.dicom.pixels import UndecodableSlices, bytes_behind, hounsfield, lossy
from ctclip.preprocessing.dicom.slices import Slice
from ctclip.preprocessing.errors import PreprocessingError, counted, were
from ctclip.preprocessing.volume import Volume

EVEN_GAPS = 0.02
LARGEST_GAP_RATIO = 3.0
# Upper limit of voxels per compressed byte.
LARGEST_RATIO = 1100
# Limit of the ratio of differences between adjacent slices to differences between slices two apart.
ALTERNATING = 1.15


def volume(source: str, members: list[Slice], numbers_missing: int, warnings: list[str], largest: int) -> Volume:
    """The volume [slice, row, column] in HU of at least three slices that share orientation, size and pixel spacing.

    Copies are left out, single missing slices interpolated, uneven gaps resampled and a gantry tilt corrected, each
    with a warning; larger defects are refused. ``numbers_missing`` is the number of slices missing by their numbering,
    ``largest`` bounds the bytes of the voxels. Values are rescaled slice by slice.
    """
    _plausible(source, members, largest)
    row, column, normal = _plane(source, members)
    depth = np.array([member.place @ normal for member in members])
    order = np.argsort(depth, kind="stable")
    members, depth = [members[i] for i in order], depth[order]
    _differences(members, warnings)
    members, depth = _without_copies(source, members, depth, warnings)
    gaps = np.diff(depth)
    usual = float(np.median(gaps))
    _missing(source, gaps, usual, numbers_missing, warnings)
    array = _array(source, members, largest)
    if _alternating(array):
        warnings.append("adjacent slices differ more than slices two apart: two interleaved acquisitions?")
    positions = np.array([member.place for member in members])
    if np.abs(gaps - usual).max() > EVEN_GAPS * usual:
        array, positions = _even(array, positions, depth, usual)
        warnings.append(f"slice gaps of {gaps.min():.2f} to {gaps.max():.2f} mm: resampled to {usual:.2f} mm")
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    spacing = members[0].spacing
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > 0.2:
        array, step = _untilt(array, step, normal, row, column, spacing)
        warnings.append(f"gantry tilt of {tilt:.1f} degrees corrected")
    affine = np.eye(4)
    # The column index increases along a row, in the direction `row`.
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, column * spacing[0], row * spacing[1]
    affine[:3, 3] = positions[0]
    return Volume(array, affine, source, warnings, fixed_geometry=True, headers=[_header(member) for member in members])


def _header(member: Slice) -> dict[str, Any]:
    """The header of a slice's image, and its frame number, counted from 1, if its file has several."""
    image = member.image
    return {**image.header, **({"frame": image.frame + 1} if image.frames > 1 else {})}


def _plane(source: str, members: list[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of rows, columns and the normal that all slices share."""
    row, column, normal = members[0].turn[:3], members[0].turn[3:], members[0].normal
    if abs(np.linalg.norm(normal) - 1) > 0.01:
        raise PreprocessingError(
            f"{source}: its header's orientation (ImageOrientationPatient) is degenerate; export the series again"
        )
    return row, column, normal


def _differences(members: list[Slice], warnings: list[str]) -> None:
    """Warn of attributes that slices of one series usually share, but these do not."""
    headers = [member.image.header for member in members]
    differing = [word for word in VALUES if len({str(header.get(word)) for header in headers}) > 1]
    rescaled = [word for word in differing if word.startswith("Rescale")]
    if rescaled:
        warnings.append(f"slices differ in {', '.join(rescaled)}: each slice is rescaled with its own")
    if others := [word for word in differing if word not in rescaled]:
        warnings.append(f"slices differ in {', '.join(others)}: values of some may be wrong")
    if len({str(header.get("PhotometricInterpretation")) for header in headers}) > 1:
        warnings.append("slices differ in PhotometricInterpretation: it concerns display, values are taken as stored")
    if count := sum(bytes_behind(member.image) for member in members):
        warnings.append(
            f"bytes follow the pixels of {counted(count, 'slice')}: if bytes were inserted before them, values are wrong"
        )
    if any(lossy(member.image) for member in members):
        warnings.append("lossy compression: HU are approximate")


def _without_copies(
    source: str, members: list[Slice], depth: np.ndarray, warnings: list[str]
) -> tuple[list[Slice], np.ndarray]:
    """One slice per position. Copies are left out; different slices at the same position mean that the series contains
    two volumes."""
    copied = np.concatenate([[False], np.diff(depth) < 1e-3])
    if copied.sum() == len(members) - 1:
        raise PreprocessingError(
            f"{source}: ImagePositionPatient is the same in all {len(members)} slices (screenshots, or a scan of one "
            f"place over time?): not a volume"
        )
    for index in np.flatnonzero(copied):
        one, other = (hounsfield(source, member.image) for member in members[index - 1 : index + 1])
        if not np.array_equal(one, other):
            raise PreprocessingError(
                f"{source}: {counted(int(copied.sum()), 'position', 'holds|hold')} more than one slice, and they differ: several phases or "
                f"reconstructions in one series; put each into a separate folder"
            )
    if count := int(copied.sum()):
        warnings.append(
            f"{counted(count, 'slice', 'is a copy of another|are copies of others')} and {were(count)} left out"
        )
    members = [member for member, copy in zip(members, copied, strict=True) if not copy]
    if len(members) < 3:
        raise PreprocessingError(f"{source}: fewer than 3 slices at different positions (screenshots?): not a volume")
    return members, depth[~copied]


def _missing(source: str, gaps: np.ndarray, usual: float, numbers_missing: int, warnings: list[str]) -> None:
    """Single missing slices are interpolated with a warning; more are refused, naming slices that were left out
    before."""
    left_out = f" ({'; '.join(warnings)})" if any("left out" in warning for warning in warnings) else ""
    if gaps.max() > LARGEST_GAP_RATIO * usual:
        raise PreprocessingError(
            f"{source}: a gap of {gaps.max():.1f} mm where slices lie {usual:.1f} mm apart: slices are missing"
            f"{left_out}; export the series again"
        )
    ratio = gaps / usual
    whole = np.round(ratio)
    even = np.abs(ratio - whole).max() < EVEN_GAPS
    missing = int((whole - 1).sum()) if even else numbers_missing
    count = len(gaps) + 1 + missing
    if missing > MOST_MISSING * count:
        raise PreprocessingError(
            f"{source}: {missing} of {count} slices are missing{left_out}; export the series again"
        )
    if missing:
        warnings.append(f"{counted(missing, 'slice', 'is|are')} missing: interpolated from the neighbours")
    elif numbers_missing:
        warnings.append(
            f"InstanceNumber skips {counted(numbers_missing, 'number')}, although no slice is missing by position"
        )


def _plausible(source: str, members: list[Slice], largest: int) -> None:
    """Refuse implausible sizes in headers before memory is allocated; all frames of a file count."""
    rows, columns = members[0].shape
    frames = {member.image.path: member.image.frames for member in members}
    voxels = sum(frames.values()) * rows * columns
    if voxels > LARGEST_RATIO * sum(path.stat().st_size for path in frames):
        raise PreprocessingError(
            f"{source}: its headers claim {sum(frames.values())} x {rows} x {columns} voxels, more than its files hold"
        )
    _within(source, voxels, np.dtype(np.int16), largest)


def _within(source: str, voxels: int, dtype: np.dtype, largest: int) -> None:
    if (size := voxels * dtype.itemsize) > largest:
        raise PreprocessingError(
            f"{source}: {size / 1e9:.3g} GB of voxels, more than {largest / 1e9:g} GB; --largest-gb raises the limit"
        )


def _array(source: str, members: list[Slice], largest: int) -> np.ndarray:
    """[slice, row, column] in HU, int16 if that holds all slices, else float32. Raises UndecodableSlices, which lists
    all of them, or as many as make the series unusable."""
    array = np.empty((len(members), *members[0].shape), np.int16)
    failed: UndecodableSlices | None = None
    for index, member in enumerate(members):
        try:
            plane = hounsfield(source, member.image)
        except UndecodableSlices as error:
            failed = failed or error
            failed.images += error.images if failed is not error else []
            if len(failed.images) > MOST_MISSING * len(members):
                raise failed from None
            continue
        if plane.dtype != array.dtype and array.dtype == np.int16:
            _within(source, array.size, np.dtype(np.float32), largest)
            array = array.astype(np.float32)
        array[index] = plane
    if failed:
        raise failed
    return array


def _alternating(array: np.ndarray) -> bool:
    """Whether slices resemble slices two apart more than adjacent ones, as in two interleaved acquisitions."""
    if len(array) < 8:
        return False
    step = [max(1, size // 128) for size in array.shape[1:]]
    coarse = np.clip(array[:, :: step[0], :: step[1]], -1024, 1000).astype(np.float32)
    near, far = (np.median(np.abs(coarse[k:] - coarse[:-k]).mean(axis=(1, 2))) for k in (1, 2))
    return bool(near > ALTERNATING * far)


def _even(array: np.ndarray, positions: np.ndarray, depth: np.ndarray, usual: float) -> tuple[np.ndarray, np.ndarray]:
    """Slices linearly interpolated at equally spaced positions."""
    count = round((depth[-1] - depth[0]) / usual) + 1
    target = np.linspace(depth[0], depth[-1], count)
    upper = np.clip(np.searchsorted(depth, target), 1, len(depth) - 1)
    share = ((target - depth[upper - 1]) / (depth[upper] - depth[upper - 1])).astype(np.float32)
    even = np.empty((count, *array.shape[1:]), dtype=np.float32)
    for index in range(count):
        even[index] = array[upper[index] - 1] * (1 - share[index]) + array[upper[index]] * share[index]
    places = np.stack([np.interp(target, depth, positions[:, axis]) for axis in range(3)], axis=1)
    return even, places


def _untilt(
    array: np.ndarray,
    step: np.ndarray,
    normal: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    spacing: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Undo the shear of a tilted gantry: shift each slice in its plane so that slices stack along their normal."""
    from scipy.ndimage import shift

    drift = step - (step @ normal) * normal
    rows, columns = float(drift @ column) / spacing[0], float(drift @ row) / spacing[1]
    straight = np.empty(array.shape, dtype=np.float32)
    for index, plane in enumerate(array):
        # The drift of slice i is i * (rows, columns) pixels; the content is moved back by the same amount.
        # Padding below air would be interpolated into neighbouring voxels.
        plane = np.maximum(plane, -1024).astype(np.float32)
        straight[index] = shift(plane, (index * rows, index * columns), order=1, mode="constant", cval=-1024.0)
    return straight, (step @ normal) * normal
