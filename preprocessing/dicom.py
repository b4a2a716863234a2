"""DICOM series: choosing one, ordering its slices by position, and checking that they make a volume."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.identifiers import TAGS, is_directory_record, masked, read_header
from ctclip.preprocessing.volume import Volume

MOST_FILES = 20000
EVEN_GAPS = 0.02
LARGEST_GAP_RATIO = 3.0
MOST_MISSING = 0.1
# What makes numbers of a slice's bits: one series has one of each.
VALUES = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept")
JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70))
LOSSY = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81))
GEOMETRY = [
    "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImageType", "Modality",
    "SamplesPerPixel", "NumberOfFrames", "PatientIdentityRemoved", "LossyImageCompression",
    *VALUES,
]  # fmt: skip


@dataclass
class Slice:
    """One file of a series: ``place`` (3,) mm and ``turn`` (6,) direction cosines if it has a position."""

    path: Path
    header: Any
    shape: tuple[int, int]
    spacing: tuple[float, float]
    place: np.ndarray
    turn: np.ndarray


def read_series(folder: Path, series: str | None = None, only: Path | None = None, name: Path | None = None) -> Volume:
    """See ``readers.read_dicom``; ``name`` is what messages call the series (a zip, instead of where it was unpacked)."""
    headers = _headers(folder)
    said = str(name or only or folder)
    if not headers:
        raise PreprocessingError(f"{said}: no DICOM slices found; name a DICOM folder, .nii.gz, .nrrd or .mha file")
    groups: dict[str, list[tuple[Any, Path]]] = {}
    for header, path in headers:
        groups.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((header, path))
    for members in groups.values():
        said = masked(said, members[0][0])
    if only is not None:
        groups = {uid: members for uid, members in groups.items() if any(path == only for _, path in members)}
        if not groups:
            raise PreprocessingError(f"{said}: not a DICOM slice, nor any other format that is read")
    if series is not None:
        if series not in groups:
            listed = ", ".join(f"{uid} ({len(members)} files)" for uid, members in sorted(groups.items()))
            raise PreprocessingError(f"{said}: has no series {series}; it has {listed}")
        chosen = groups[series]
    else:
        chosen = max(groups.values(), key=lambda members: (len(_slices(members)), str(members[0][1])))
    volume = _volume(said, chosen)
    if left := _unread(chosen, {path for _, path in headers}):
        volume.warnings.append(f"{left} files beside the slices look like some of them but cannot be read: left out")
    if len(groups) > 1 and series is None:
        volume.warnings.append(f"{len(groups)} series in the folder: took the one with most slices (--series chooses)")
    return volume


def _headers(folder: Path) -> list[tuple[Any, Path]]:
    """Headers of the DICOM images under a folder, pixels unread; other files are passed over."""
    files = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)
    if len(files) > MOST_FILES:
        raise PreprocessingError(f"{folder}: holds {len(files)} files, more than one study; name a series' folder")
    found = ((read_header(path, [*TAGS, *GEOMETRY]), path) for path in files)
    return [(h, path) for h, path in found if h is not None and "Rows" in h and not is_directory_record(h)]


def _unread(members: list[tuple[Any, Path]], read: set[Path]) -> int:
    """Files that lie beside slices, are called as they are, as large or marked as DICOM, and yet were not read."""
    usual = float(np.median([path.stat().st_size for _, path in members]))
    found = 0
    for folder, suffix in {(path.parent, path.suffix) for _, path in members}:
        for path in folder.iterdir():
            if path in read or path.suffix != suffix or not path.is_file():
                continue
            size = path.stat().st_size
            with path.open("rb") as stream:
                head = stream.read(132)
            # A preamble is zeros: so is what is left of a file that was cut short in it.
            marked = head[128:] == b"DICM" or not head.strip(b"\0")
            found += (marked or size > usual / 2) and not is_directory_record(read_header(path, TAGS))
    return found


def _slices(members: list[tuple[Any, Path]]) -> list[Slice]:
    """Members that are axial CT slices with a place in the patient: no localizers, no screenshots."""
    kept = []
    for header, path in members:
        try:
            kinds = [str(kind).upper() for kind in header.get("ImageType", None) or []]
            if "LOCALIZER" in kinds or int(header.get("SamplesPerPixel", 1) or 1) != 1:
                continue
            place, turn, spacing = (
                np.array([float(value) for value in header[keyword].value])
                for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
            )
            shape = int(header.Rows), int(header.Columns)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        usable = (len(place), len(turn), len(spacing)) == (3, 6, 2) and min(shape) > 1 and spacing.min() > 0
        if usable and np.isfinite([*place, *turn, *spacing]).all():
            kept.append(Slice(path, header, shape, (float(spacing[0]), float(spacing[1])), place, turn))
    return kept


def _volume(said: str, listed: list[tuple[Any, Path]]) -> Volume:
    members = _slices(listed)
    if len(members) < 3:
        frames = any(str(header.get("NumberOfFrames", "") or "1") != "1" for header, _ in listed)
        raise PreprocessingError(
            f"{said}: an enhanced multi-frame series; convert it with dcm2niix" if frames else
            f"{said}: {len(members)} of {len(listed)} files of the series are CT slices with a position; a localizer, "
            f"screenshots or a derived series are not a volume"
        )  # fmt: skip
    modality = str(members[0].header.get("Modality", "CT") or "CT")
    if modality != "CT":
        raise PreprocessingError(f"{said}: its modality is not CT" + f" ({modality})" * (len(modality) == 2))
    row, column, normal = _plane(said, members)
    depth = np.array([member.place @ normal for member in members])
    order = np.argsort(depth, kind="stable")
    members, depth = [members[i] for i in order], depth[order]
    warnings: list[str] = []
    if len(members) < len(listed):
        warnings.append(f"{len(listed) - len(members)} files of the series have no place among its slices: left out")
    differing = [word for word in VALUES if len({str(member.header.get(word)) for member in members}) > 1]
    if differing:
        warnings.append(f"slices differ in {', '.join(differing)}: values of some may be wrong")
    if any(_lossy(member.header) for member in members):
        warnings.append("compressed with loss: HU are approximate")
    members, depth = _without_duplicates(said, members, depth, warnings)
    gaps = np.diff(depth)
    usual = float(np.median(gaps))
    _missing(said, gaps, usual, warnings)
    array = np.stack([_pixels(said, member) for member in members])
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
    # Along a row the column index grows, in the direction `row`.
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, column * spacing[0], row * spacing[1]
    affine[:3, 3] = positions[0]
    return Volume(array, affine, said, warnings)


def _plane(said: str, members: list[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of rows, columns and the normal that all slices share."""
    turns = np.array([member.turn for member in members])
    spacings = np.array([member.spacing for member in members])
    if len({member.shape for member in members}) > 1 or np.abs(turns - turns[0]).max() > 1e-3:
        raise PreprocessingError(f"{said}: slices of different sizes or orientations: not one volume")
    if np.abs(spacings / spacings[0] - 1).max() > 1e-3:
        raise PreprocessingError(f"{said}: slices of different pixel spacing: not one volume")
    row, column = turns[0][:3], turns[0][3:]
    normal = np.cross(row, column)
    if abs(np.linalg.norm(normal) - 1) > 0.01:
        raise PreprocessingError(f"{said}: its header's orientation is degenerate; export the series again")
    return row, column, normal


def _without_duplicates(
    said: str, members: list[Slice], depth: np.ndarray, warnings: list[str]
) -> tuple[list[Slice], np.ndarray]:
    """One slice a position. Copies are left out; two different slices at one place are two volumes in one series."""
    again = np.concatenate([[False], np.diff(depth) < 1e-3])
    for index in np.flatnonzero(again):
        if not np.array_equal(_pixels(said, members[index]), _pixels(said, members[index - 1])):
            raise PreprocessingError(
                f"{said}: {int(again.sum())} positions hold more than one slice, and they differ: several phases or "
                f"reconstructions in one series; put each into a folder of its own"
            )
    if again.any():
        warnings.append(f"{int(again.sum())} slices are copies of others and were left out")
    members = [member for member, copy in zip(members, again, strict=True) if not copy]
    if len(members) < 3:
        raise PreprocessingError(f"{said}: fewer than 3 slices at different positions (screenshots?): not a volume")
    return members, depth[~again]


def _missing(said: str, gaps: np.ndarray, usual: float, warnings: list[str]) -> None:
    """Single slices missing here and there are interpolated aloud; more are refused."""
    if gaps.max() > LARGEST_GAP_RATIO * usual:
        raise PreprocessingError(
            f"{said}: a gap of {gaps.max():.1f} mm where slices lie {usual:.1f} mm apart: slices are missing; "
            f"export the series again"
        )
    ratio = gaps / usual
    whole = np.round(ratio)
    if np.abs(ratio - whole).max() < EVEN_GAPS and whole.max() > 1:
        missing = int((whole - 1).sum())
        if missing > MOST_MISSING * (len(gaps) + 1 + missing):
            raise PreprocessingError(
                f"{said}: {missing} of {len(gaps) + 1 + missing} slices are missing; export the series again"
            )
        warnings.append(f"{missing} slices are missing: interpolated from their neighbours")


def _pixels(said: str, member: Slice) -> np.ndarray:
    """One slice in HU, int16 where its rescaling is whole-numbered. GDCM (in SimpleITK) decodes compressed ones."""
    import SimpleITK as sitk

    file = masked(member.path.name, member.header)
    syntax = _syntax(member.header)
    try:
        if syntax in JPEG and not 2 <= _jpeg_precision(member.path.read_bytes()) <= 16:
            # In a lossless stream GDCM ends the process over it.
            raise RuntimeError("JPEG of an impossible precision")
        image = sitk.ReadImage(str(member.path))
    except RuntimeError as error:
        raise PreprocessingError(
            f"{said}: slice {file} cannot be decoded; it is damaged, or its transfer syntax ({_named(syntax)}) is not one "
            f"that is read: export the series again, uncompressed"
        ) from error
    array = sitk.GetArrayFromImage(image)
    array = array[0] if array.ndim == 3 else array
    if array.shape != member.shape:
        raise PreprocessingError(f"{said}: slice {file} of shape {array.shape}, its header says {member.shape}")
    if array.dtype.kind in "iu" and array.min() >= -32768 and array.max() <= 32767:
        return array.astype(np.int16)
    return array.astype(np.float32)


def _jpeg_precision(content: bytes) -> int:
    """Bits a sample of the first JPEG stream in a DICOM file, by its frame header (ITU-T T.81, B.2.2); 0 without one."""
    at = content.find(b"\xff\xd8", content.rfind(b"\xe0\x7f\x10\x00"))
    while 0 <= at < len(content) - 5 and content[at] == 0xFF:
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return content[at + 4]
        alone = {0xD8: 2, 0xFF: 1}.get(marker)
        at += alone or 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return 0


def _syntax(header: Any) -> str:
    return str(getattr(header, "file_meta", {}).get("TransferSyntaxUID", "none"))


def _lossy(header: Any) -> bool:
    return _syntax(header) in LOSSY or str(header.get("LossyImageCompression", "")).strip() == "01"


def _named(syntax: str) -> str:
    import pydicom

    # pydicom warns of a value it finds odd, and quotes it.
    name = pydicom.uid.UID(syntax, validation_mode=pydicom.config.IGNORE).name
    return syntax if name == syntax else f"{name}, {syntax}"


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
    spacing: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Undo the shear of a tilted gantry: shift each slice in its plane so that slices stack along their normal."""
    from scipy.ndimage import shift

    drift = step - (step @ normal) * normal
    rows, columns = float(drift @ column) / spacing[0], float(drift @ row) / spacing[1]
    straight = np.empty(array.shape, dtype=np.float32)
    for index, plane in enumerate(array):
        # The drift of slice i is i * (rows, columns) pixels; content moves back by as much as the grid moved on.
        # Padding below air would bleed into what it borders on.
        plane = np.maximum(plane, -1024).astype(np.float32)
        straight[index] = shift(plane, (index * rows, index * columns), order=1, mode="constant", cval=-1024.0)
    return straight, (step @ normal) * normal
