"""DICOM series built in memory from known voxels, for tests of reading."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SPACING = (2.5, 0.75, 0.875)
ORIGIN = (-31.5, 17.25, -200.0)
SERIES, STUDY, FRAME = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.9", "1.2.826.0.1.3680043.8.498.8"

Edit = Callable[[int, Any], None]


def truth(slices: int = 24, rows: int = 40, columns: int = 36, move: float = 0.0) -> np.ndarray:
    """HU [slice, row, column] that every rotation or flip changes: a ramp with a dense spot and a spot of low density.

    ``move`` shifts the content along the rows by this many pixels, as if the patient had moved.
    """
    z, y, x = np.mgrid[:slices, :rows, :columns].astype(float)
    x = x + move
    values = -900 + 12 * z + 9 * y + 7 * x
    values += 1500 * np.exp(-((z - 0.7 * slices) ** 2 / 8 + (y - 9) ** 2 / 12 + (x - 25) ** 2 / 20))
    values -= 120 * np.exp(-((z - 0.3 * slices) ** 2 / 8 + (y - 28) ** 2 / 30 + (x - 8) ** 2 / 30))
    return np.clip(np.rint(values), -1000, 2900).astype(np.int16)


def affine() -> np.ndarray:
    """The default affine of ``series``: (slice, row, column, 1) to LPS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[0, 0, SPACING[2]], [0, SPACING[1], 0], [SPACING[0], 0, 0]])
    matrix[:3, 3] = ORIGIN
    return matrix


def series(hu: np.ndarray, edit: Edit | None = None, *, start: float = 0.0, first: int = 1, **tags: Any) -> list[Any]:
    """HU as single-frame CT images, unsigned 12 bits at an intercept of -1024; ``start`` slices above the origin.

    ``edit(index, data)`` changes an image; ``tags`` are set in all of them, None deletes one.
    """
    images = []
    for index, plane in enumerate(hu):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{SERIES}.{first + index}.{id(hu) % 10**6}"
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = SERIES, STUDY, FRAME
        data.Modality, data.PatientID, data.PatientName = "CT", "PHANTOM", ""
        data.StudyDate, data.StudyTime, data.SeriesNumber = "20200101", "120000", 3
        data.InstanceNumber, data.ImageType = first + index, ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns = plane.shape
        data.PixelSpacing, data.SliceThickness = [SPACING[1], SPACING[2]], SPACING[0]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + (start + index) * SPACING[0]]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        store(data, plane.astype(int) + 1024)
        for keyword, value in tags.items():
            change(data, keyword, value)
        if edit is not None:
            edit(index, data)
        images.append(data)
    return images


def store(data: Any, stored: np.ndarray, **tags: Any) -> None:
    """Put stored values into an image, in the type that its header (after ``tags``) states."""
    for keyword, value in tags.items():
        change(data, keyword, value)
    kind = f"<{'i' if data.PixelRepresentation else 'u'}{data.BitsAllocated // 8}"
    content = (np.asarray(stored).astype(np.int64) % 2**data.BitsAllocated).astype(kind.replace("i", "u")).tobytes()
    data.PixelData = content + b"\0" * (len(content) % 2)
    data["PixelData"].VR = "OB" if data.BitsAllocated == 8 else "OW"


def change(data: Any, keyword: str, value: Any) -> None:
    """Set a value, or delete it if it is None."""
    if value is None:
        if keyword in data:
            delattr(data, keyword)
    else:
        setattr(data, keyword, value)


def write(folder: Path, images: Iterable[Any], name: str = "IM") -> Path:
    """Write images under numbers that do not follow their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(images):
        data.save_as(folder / f"{name}{(index * 7919) % 10007:05d}.dcm", enforce_file_format=True)
    return folder


def bare(path: Path, *, meta: bool) -> None:
    """Rewrite a file without its preamble, and without its group 2 unless ``meta``."""
    content = path.read_bytes()[132:]
    if not meta:
        content = content[12 + int.from_bytes(content[8:12], "little") :]
    path.write_bytes(content)


def reencoded(path: Path, syntax: str) -> None:
    """Rewrite a file in another of the transfer syntaxes without compression of pixels."""
    data = pydicom.dcmread(path)
    for element in data.iterall():
        # Decode every element: elements that are still raw would be written as they were read.
        assert element.tag
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    if syntax == pydicom.uid.ExplicitVRBigEndian:
        # pydicom writes pixels as they are in memory.
        data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
        data.set_original_encoding(False, False)
    data.save_as(path, enforce_file_format=True)


def deflated(path: Path, data_set: bytes) -> None:
    """A file whose data set is a deflated stream of arbitrary bytes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    meta.FileMetaInformationVersion = b"\0\1"
    meta.ImplementationClassUID = "1.2.3"
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    with path.open("wb") as stream:
        stream.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(stream, meta)
        stream.write(deflater.compress(data_set) + deflater.flush())


def enhanced(
    hu: np.ndarray,
    order: Iterable[int] | None = None,
    *,
    phases: int = 1,
    shared: bool = True,
    start: int = 0,
    number: int = 1,
    offset: int | None = None,
) -> Any:
    """One Enhanced CT image of HU, frames in any order; ``phases`` copies of it, each 100 HU above the one before, as
    temporal positions. ``start`` is the position of the first slice in a series, ``number`` the file's InstanceNumber
    and ``offset`` that of its frames in a concatenation. ``shared`` stores attributes common to all frames in the
    shared functional groups."""
    order = list(range(len(hu))) if order is None else list(order)
    data = series(hu[:1])[0]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
                    "RescaleIntercept", "SliceThickness"):  # fmt: skip
        delattr(data, keyword)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    common, frames, planes = pydicom.Dataset(), [], []
    where = common if shared else None
    for phase in range(phases):
        for index in order:
            own = pydicom.Dataset()
            own.PlanePositionSequence = Sequence([pydicom.Dataset()])
            place = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + (start + index) * SPACING[0]]
            own.PlanePositionSequence[0].ImagePositionPatient = place
            own.FrameContentSequence = Sequence([pydicom.Dataset()])
            own.FrameContentSequence[0].TemporalPositionIndex = phase + 1
            own.FrameContentSequence[0].FrameAcquisitionNumber = phase + 1
            own.FrameContentSequence[0].StackID = "1"
            own.FrameContentSequence[0].InStackPositionNumber = index + 1
            own.FrameContentSequence[0].DimensionIndexValues = [1, index + 1, phase + 1]
            _common_groups(own if where is None else where)
            frames.append(own)
            planes.append(hu[index].astype(int) + 1024 + 100 * phase)
    data.SharedFunctionalGroupsSequence = Sequence([common])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.DimensionIndexSequence = Sequence([pydicom.Dataset() for _ in range(3)])
    for item, keyword in zip(
        data.DimensionIndexSequence, ("StackID", "InStackPositionNumber", "TemporalPositionIndex"), strict=True
    ):
        item.DimensionIndexPointer = pydicom.tag.Tag(keyword)
        item.FunctionalGroupPointer = pydicom.tag.Tag("FrameContentSequence")
    data.NumberOfFrames, data.InstanceNumber = len(frames), number
    change(data, "ConcatenationFrameOffsetNumber", offset)
    store(data, np.stack(planes))
    return data


def _common_groups(groups: Any) -> None:
    groups.PlaneOrientationSequence = Sequence([pydicom.Dataset()])
    groups.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    groups.PixelMeasuresSequence = Sequence([pydicom.Dataset()])
    groups.PixelMeasuresSequence[0].PixelSpacing = [SPACING[1], SPACING[2]]
    groups.PixelMeasuresSequence[0].SliceThickness = SPACING[0]
    groups.PixelValueTransformationSequence = Sequence([pydicom.Dataset()])
    values = groups.PixelValueTransformationSequence[0]
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
