"""DICOM series: choosing one, ordering its slices by position, and checking that they make a volume."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from preprocessing.errors import PreprocessingError
from preprocessing.volume import Volume

MOST_FILES = 20000
EVEN_GAPS = 0.02
LARGEST_GAP_RATIO = 3.0
CT_IMAGE_STORAGE = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1")


def read_series(folder: Path, series: str | None, only: Path | None) -> Volume:
    """See ``readers.read_dicom``."""
    slices = _headers(folder)
    if not slices:
        raise PreprocessingError(f"{folder}: no DICOM slices found; name a DICOM folder, .nii.gz, .nrrd or .mha file")
    groups: dict[str, list] = {}
    for header, path in slices:
        groups.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((header, path))
    if only is not None:
        groups = {uid: members for uid, members in groups.items() if any(path == only for _, path in members)}
        if not groups:
            raise PreprocessingError(f"{only}: not a DICOM slice, nor any other format that is read")
    if series is not None:
        if series not in groups:
            raise PreprocessingError(f"{folder}: has no series {series}; it has {', '.join(sorted(groups))}")
        chosen = groups[series]
    else:
        chosen = max(groups.values(), key=lambda members: (len(_images(members)), str(members[0][1])))
    volume = _volume(folder, _images(chosen), len(chosen))
    if len(groups) > 1 and series is None:
        volume.warnings.append(f"{len(groups)} series in the folder: took the one with most slices (--series chooses)")
    return volume


def _headers(folder: Path) -> list[tuple]:
    """Headers of the DICOM files under a folder, pixels unread; other files are passed over."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    found = []
    files = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)
    if len(files) > MOST_FILES:
        raise PreprocessingError(f"{folder}: holds {len(files)} files, more than one study; name a series' folder")
    for path in files:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (
            InvalidDicomError,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
            RuntimeError,
        ):
            continue
        if "Rows" in header:
            found.append((header, path))
    return found


def _images(members: list) -> list:
    """Members that are axial CT slices with a place in the patient: no localizers, no screenshots."""
    kept = []
    for header, path in members:
        kinds = [str(kind).upper() for kind in header.get("ImageType", [])]
        placed = "ImagePositionPatient" in header and "ImageOrientationPatient" in header
        if placed and "LOCALIZER" not in kinds and int(header.get("SamplesPerPixel", 1)) == 1:
            kept.append((header, path))
    return kept


def _volume(folder: Path, members: list, listed: int) -> Volume:
    if len(members) < 3:
        raise PreprocessingError(
            f"{folder}: {len(members)} of {listed} files of the series are CT slices with a position; a localizer, "
            f"screenshots or a derived series are not a volume"
        )
    first = members[0][0]
    if str(first.get("Modality", "CT")) != "CT":
        raise PreprocessingError(f"{folder}: modality {first.get('Modality')}, not CT")
    sizes = {(int(header.Rows), int(header.Columns)) for header, _ in members}
    orientations = np.array([[float(v) for v in header.ImageOrientationPatient] for header, _ in members])
    if len(sizes) > 1 or np.abs(orientations - orientations[0]).max() > 1e-3:
        raise PreprocessingError(f"{folder}: slices of different sizes or orientations: not one volume")
    row, column = orientations[0][:3], orientations[0][3:]
    normal = np.cross(row, column)
    positions = np.array([[float(v) for v in header.ImagePositionPatient] for header, _ in members])
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    members, positions, depth = [members[i] for i in order], positions[order], depth[order]
    gaps = np.diff(depth)
    warnings: list[str] = []
    if (gaps < 1e-3).any():
        keep = np.concatenate([[True], gaps >= 1e-3])
        warnings.append(f"{int((~keep).sum())} slices share another's position and were left out")
        members = [member for member, kept in zip(members, keep, strict=True) if kept]
        positions, depth = positions[keep], depth[keep]
        gaps = np.diff(depth)
        if len(members) < 3:
            raise PreprocessingError(f"{folder}: fewer than 3 slices at different positions: not a volume")
    usual = float(np.median(gaps))
    uneven = np.abs(gaps - usual).max() > EVEN_GAPS * usual
    if gaps.max() > LARGEST_GAP_RATIO * usual:
        raise PreprocessingError(
            f"{folder}: a gap of {gaps.max():.1f} mm where slices lie {usual:.1f} mm apart: slices are missing; "
            f"export the series again"
        )
    array = np.stack([_pixels(path, header) for header, path in members])
    if uneven:
        array, positions = _even(array, positions, depth, usual)
        warnings.append(f"slice gaps of {gaps.min():.2f} to {gaps.max():.2f} mm: resampled to {usual:.2f} mm")
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    spacing = [float(v) for v in first.PixelSpacing]
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > 0.2:
        array, step = _untilt(array, step, normal, row, column, spacing)
        warnings.append(f"gantry tilt of {tilt:.1f} degrees corrected")
    affine = np.eye(4)
    # Along a row the column index grows, in the direction `row`.
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, column * spacing[0], row * spacing[1]
    affine[:3, 3] = positions[0]
    return Volume(array, affine, str(folder), warnings)


def _pixels(path: Path, header) -> np.ndarray:  # type: ignore[no-untyped-def]
    """One slice in HU, int16 where its rescaling is whole-numbered. GDCM (in SimpleITK) decodes compressed ones."""
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise PreprocessingError(f"{path}: slice cannot be decoded ({' '.join(str(error).split())[-120:]})") from error
    array = sitk.GetArrayFromImage(image)
    array = array[0] if array.ndim == 3 else array
    if array.shape != (int(header.Rows), int(header.Columns)):
        raise PreprocessingError(
            f"{path}: slice of shape {array.shape}, its header says {header.Rows} x {header.Columns}"
        )
    if array.dtype.kind in "iu" and array.min() >= -32768 and array.max() <= 32767:
        return array.astype(np.int16)
    return array.astype(np.float32)


def _even(array: np.ndarray, positions: np.ndarray, depth: np.ndarray, usual: float) -> tuple[np.ndarray, np.ndarray]:
    """Slices linearly interpolated at even depths."""
    count = round((depth[-1] - depth[0]) / usual) + 1
    wanted = np.linspace(depth[0], depth[-1], count)
    upper = np.clip(np.searchsorted(depth, wanted), 1, len(depth) - 1)
    share = ((wanted - depth[upper - 1]) / (depth[upper] - depth[upper - 1])).astype(np.float32)
    even = np.empty((count, *array.shape[1:]), dtype=np.float32)
    for index in range(count):
        even[index] = array[upper[index] - 1] * (1 - share[index]) + array[upper[index]] * share[index]
    places = np.stack([np.interp(wanted, depth, positions[:, axis]) for axis in range(3)], axis=1)
    return even, places


def _untilt(
    array: np.ndarray,
    step: np.ndarray,
    normal: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    spacing: list[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Undo the shear of a tilted gantry: shift each slice in its plane so that slices stack along their normal."""
    from scipy.ndimage import shift

    drift = step - (step @ normal) * normal
    rows, columns = float(drift @ column) / spacing[0], float(drift @ row) / spacing[1]
    straight = np.empty(array.shape, dtype=np.float32)
    for index, plane in enumerate(array.astype(np.float32)):
        # The drift of slice i is i * (rows, columns) pixels; content moves back by as much as the grid moved on.
        straight[index] = shift(plane, (index * rows, index * columns), order=1, mode="constant", cval=-1024.0)
    return straight, (step @ normal) * normal
