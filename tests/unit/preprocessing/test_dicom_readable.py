"""Series that seem unreadable but can be read, and missing geometry, which is refused with the name of its tag."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from tests.unit.preprocessing.dicom_builder import ORIGIN, SPACING, bare, reencoded, series, store, write
from tests.unit.preprocessing.dicom_situations import ALL, HU, MOVED, Row, at, check, each, edited


def odd_one(folder: Path, **tags: Any) -> None:
    write(folder, series(HU))
    extra = series(MOVED[:1], first=99)[0]
    store(extra, np.zeros((int(tags.get("Rows", 40)), 36)), **tags)
    write(folder, [extra], "X")


def viewer_files(folder: Path) -> None:
    """A patient CD: a viewer, its pages and pictures, and a DICOMDIR under another name."""
    write(folder, series(HU))
    size = next(folder.glob("IM*")).stat().st_size
    for name, head in {"VIEWER.EXE": b"MZ\x90", "index.html": b"<html>", "README": b"Read me\r\n", "viewer.dll": b"MZ",
                       "logo.png": b"\x89PNG\r\n", "autorun.inf": b"[autorun]\r\n", "IM00001": b"%PDF-1.4",
                       "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1", "._IM00000.dcm": b"\0\5\x16\7", "jre.jar": b"PK\3\4",
                       "page.dcm": b"<!DOCTYPE html>", "setup.dcm": b"MZ\x90\0"}.items():  # fmt: skip
        text = head[:1] in b"<R["
        (folder / name).write_bytes(head + (b" " if text else b"\x80\1\0\0") * (size // (1 if text else 4)))


READABLE = [
    Row("no preamble", each(lambda path: bare(path, meta=True)),
        differ={"sitk": "refuses what many archives export"}),
    Row("neither preamble nor group 2", each(lambda path: bare(path, meta=False))),
    Row("neither, implicit", each(lambda path: (reencoded(path, "1.2.840.10008.1.2"), bare(path, meta=False)))),
    Row("neither, big endian", each(lambda path: (reencoded(path, "1.2.840.10008.1.2.2"), bare(path, meta=False)))),
    Row("MONOCHROME1", edited(PhotometricInterpretation="MONOCHROME1"), same=("dcm2niix", "pydicom"),
        differ={"sitk": "inverts what concerns display only: PS3.3 C.7.6.3.1.2"}),
    Row("MONOCHROME1 in one slice", edited(at((3,), PhotometricInterpretation="MONOCHROME1")), same=("pydicom",),
        says=("slices differ in PhotometricInterpretation: it concerns display",)),
    Row("one coronal image", lambda f: odd_one(f, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
        says=("1 slice with another ImageOrientationPatient was left out", "InstanceNumber skips 74")),
    Row("one image of another size", lambda f: odd_one(f, Rows=20),
        says=(r"1 slice with another size \(Rows, Columns\) was left out", "InstanceNumber skips 74")),
    Row("one image of another pixel spacing", lambda f: odd_one(f, PixelSpacing=[1, 1]),
        says=("1 slice with another PixelSpacing was left out", "InstanceNumber skips 74")),
    Row("one image without a position", lambda f: odd_one(f, ImagePositionPatient=None),
        says=("1 without ImagePositionPatient", "InstanceNumber skips 74")),
    Row("viewer files", viewer_files),
    Row("a DICOMDIR of any name beside", lambda f: (write(f, series(HU)), (f / "IMDIR.dcm").write_bytes(directory()))),
    Row("turned about the head: rows from left to right", edited(ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]),
        affine=np.array([[0, 0, -SPACING[2], ORIGIN[0]], [0, -SPACING[1], 0, ORIGIN[1]], [SPACING[0], 0, 0, ORIGIN[2]],
                         [0, 0, 0, 1]]), same=ALL),
    Row("rescaled by another slope and intercept in each slice", edited(lambda i, d: rescaled(i, d)),
        says=("slices differ in RescaleSlope, RescaleIntercept: each slice is rescaled with its own",), same=("pydicom",)),
    Row("a slope that is no whole number", edited(lambda i, d: (setattr(d, "RescaleSlope", "0.1"), setattr(d, "RescaleIntercept", "-1024"))),
        hu=((HU.astype(float) + 1024) * 0.1 - 1024).astype(np.float32), same=ALL),
    Row("neither slope nor intercept", edited(RescaleSlope=None, RescaleIntercept=None),
        hu=HU + 1024, same=ALL),
    Row("ImagePositionPatient missing", edited(ImagePositionPatient=None), refused="24 without ImagePositionPatient"),
    Row("ImagePositionPatient of two numbers", edited(ImagePositionPatient=[1, 2]),
        refused="24 without ImagePositionPatient"),
    Row("ImagePositionPatient all equal", edited(ImagePositionPatient=[0, 0, 0]),
        refused="ImagePositionPatient is the same in all 24 slices"),
    Row("PixelSpacing missing", edited(PixelSpacing=None), refused="24 without PixelSpacing"),
    Row("PixelSpacing 0", edited(PixelSpacing=[0, 0]), refused="24 with a PixelSpacing that is not positive"),
    Row("ImageOrientationPatient missing", edited(ImageOrientationPatient=None), refused="24 without ImageOrientationPatient"),
    Row("ImageOrientationPatient degenerate", edited(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
        refused=r"\(ImageOrientationPatient\) is degenerate"),
    Row("RescaleSlope 0", edited(RescaleSlope=0), refused="its RescaleSlope is 0"),
]  # fmt: skip


def rescaled(index: int, data: Any) -> None:
    """Even slices have even stored values and another slope; odd slices have another intercept."""
    if index % 2:
        store(data, HU[index].astype(int) + 1100, RescaleIntercept=-1100)
    else:
        store(data, (HU[index].astype(int) + 1100) * 2, RescaleSlope="0.5", RescaleIntercept="-1100")


def directory() -> bytes:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.FileSetID = "CD"
    data.DirectoryRecordSequence = []
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, data, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.parametrize("row", READABLE, ids=lambda row: row.name)
def test_what_is_right(tmp_path: Path, row: Row) -> None:
    check(row, tmp_path)
