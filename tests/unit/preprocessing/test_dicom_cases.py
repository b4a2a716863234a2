"""Situations of DICOM series, one a row: how each is built, and what is right, in voxels, positions and words.

Other readers' answers stand beside ours where they decode the same input: ``same`` names those that must give our
voxels in our places, ``differ`` those that do not and why we are right all the same.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import RLELossless

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.volume import Volume
from tests.unit.preprocessing.dicom_builder import (
    ORIGIN,
    SPACING,
    affine,
    bare,
    change,
    deflated,
    enhanced,
    reencoded,
    series,
    store,
    truth,
    write,
)

HU = truth()
MOVED = truth(move=4.0)
OTHER = "1.2.826.0.1.3680043.8.498.2"
ALL = ("dcm2niix", "sitk", "pydicom")


@dataclass
class Row:
    """``build`` fills a folder; ``hu`` and ``affine`` are the truth, or ``refused`` the words of the refusal. ``says``
    are words of the warnings, of which there are none besides."""

    name: str
    build: Callable[[Path], object]
    hu: np.ndarray = field(default_factory=lambda: HU)
    affine: np.ndarray = field(default_factory=affine)
    says: tuple[str, ...] = ()
    refused: str = ""
    same: tuple[str, ...] = ()
    differ: dict[str, str] = field(default_factory=dict)


def both(one: list[Any], other: list[Any]) -> Callable[[Path], object]:
    """Two lists of images in one folder."""
    return lambda folder: (write(folder, one, "A"), write(folder, other, "B"))


def edited(
    edit: Callable[[int, Any], object] | None = None, hu: np.ndarray = HU, **tags: Any
) -> Callable[[Path], object]:
    return lambda folder: write(folder, series(hu, edit, **tags))


def each(change_file: Callable[[Path], object]) -> Callable[[Path], object]:
    """A good series whose files are rewritten."""

    def build(folder: Path) -> None:
        for path in write(folder, series(HU)).iterdir():
            change_file(path)

    return build


def at(indices: tuple[int, ...], **tags: Any) -> Callable[[int, Any], None]:
    """An edit of some slices."""

    def edit(index: int, data: Any) -> None:
        if index in indices:
            for keyword, value in tags.items():
                change(data, keyword, value)

    return edit


def per_slice(keyword: str, value: Callable[[int], Any]) -> Callable[[int, Any], None]:
    return lambda index, data: setattr(data, keyword, value(index))


def without(*indices: int) -> list[Any]:
    return [data for index, data in enumerate(series(HU)) if index not in indices]


def moved(start: float = 0.0) -> np.ndarray:
    matrix = affine()
    matrix[2, 3] += start * SPACING[0]
    return matrix


# Several acquisitions in one series.
TWO = "several acquisitions or reconstructions, which differ in {}: took 24 of 48 slices"


def blocks(overlap: int) -> list[Any]:
    """Two acquisitions, the second of which follows the first but for slices at the seam, with other voxels there."""
    return [
        *series(HU[:14], AcquisitionNumber=1, AcquisitionTime="120001"),
        *series(HU[14 - overlap :] + 0 * HU[14 - overlap :], start=14 - overlap, first=15, AcquisitionNumber=2,
                AcquisitionTime="120009"),
    ]  # fmt: skip


def passes(second: np.ndarray, start: float, backwards: bool = False) -> list[Any]:
    """Two passes of which nothing tells but their numbering."""
    images = [*series(HU), *series(second, start=start, first=25)]
    if backwards:
        for index, data in enumerate(images[24:]):
            data.InstanceNumber = 48 - index
    return images


def interleaved_numbers(start: float) -> list[Any]:
    images = [*series(HU), *series(MOVED, start=start)]
    for index, data in enumerate(images):
        data.InstanceNumber = 2 * (index % 24) + index // 24 + 1
    return images


ACQUISITIONS = [
    Row("plain", edited(), same=ALL),
    Row("two kernels half a slice apart",
        both(series(HU, ConvolutionKernel="B30f"), series(MOVED, start=0.5, ConvolutionKernel="B70f")),
        says=(TWO.format("ConvolutionKernel"),),
        differ={"sitk": "stacks both as one volume of 48 slices"}),
    Row("two kernels at the same positions",
        both(series(HU, ConvolutionKernel="B30f"), series(MOVED, ConvolutionKernel="B70f")),
        says=(TWO.format("ConvolutionKernel"),)),
    Row("two acquisitions, between which the patient moved",
        both(series(HU, AcquisitionNumber=1), series(MOVED, first=25, AcquisitionNumber=2)),
        says=(TWO.format("AcquisitionNumber, order of InstanceNumber").replace(", order of InstanceNumber", ""),)),
    Row("temporal positions",
        both(series(HU, TemporalPositionIdentifier=1), series(MOVED, TemporalPositionIdentifier=2)),
        says=(TWO.format("TemporalPositionIdentifier"),)),
    Row("two series numbers under one UID", both(series(HU), series(MOVED, SeriesNumber=4)),
        says=(TWO.format("SeriesNumber"),)),
    Row("original and virtual non-contrast under one UID",
        both(series(MOVED, ImageType=["DERIVED", "PRIMARY", "AXIAL", "VNC"]), series(HU)),
        says=(TWO.format("ImageType"),)),
    Row("two acquisition times", both(series(HU, AcquisitionTime="120001"), series(MOVED, AcquisitionTime="120101")),
        says=(TWO.format("AcquisitionTime"),)),
    Row("cardiac phases", both(series(HU, NominalPercentageOfCardiacPhase=30), series(MOVED, NominalPercentageOfCardiacPhase=75)),
        says=(TWO.format("NominalPercentageOfCardiacPhase"),)),
    Row("no SeriesInstanceUID, two kernels",
        both(series(HU, SeriesInstanceUID=None, ConvolutionKernel="B30f"),
             series(MOVED, SeriesInstanceUID=None, start=0.5, ConvolutionKernel="B70f")),
        says=(TWO.format("ConvolutionKernel"),)),
    Row("a longer and a shorter one: the longer",
        both(series(MOVED[:10], AcquisitionNumber=1), series(HU, AcquisitionNumber=2)),
        says=("differ in AcquisitionNumber: took 24 of 34 slices",)),
    Row("two passes half a slice apart by their numbers", lambda f: write(f, passes(MOVED, 0.5)),
        says=(TWO.format("order of InstanceNumber"),)),
    Row("two passes at the same positions by their numbers", lambda f: write(f, passes(MOVED, 0)),
        says=(TWO.format("order of InstanceNumber"),)),
    Row("a pass there and one back", lambda f: write(f, passes(MOVED, 0, backwards=True)),
        says=(TWO.format("order of InstanceNumber"),)),
    Row("two at each position, nothing tells them apart", lambda f: write(f, interleaved_numbers(0)),
        refused="24 positions hold more than one slice, and they differ"),
    Row("interleaved, nothing tells them apart", lambda f: write(f, interleaved_numbers(0.5)),
        hu=np.stack([HU, MOVED], 1).reshape(48, *HU.shape[1:]), affine=affine() @ np.diag([0.5, 1, 1, 1]),
        says=("every other slice differs more from its neighbours",)),
    Row("blocks that follow each other", lambda f: write(f, blocks(0)), same=ALL),
    Row("blocks with a seam of one slice", lambda f: write(f, blocks(1)),
        says=("1 slices that differ in AcquisitionNumber, AcquisitionTime overlap the others and were left out",)),
    Row("an acquisition number a slice", edited(per_slice("AcquisitionNumber", lambda i: i + 1)), same=ALL),
    Row("a thickness and a time that change half-way",
        edited(lambda i, d: at(tuple(range(12, 24)), SliceThickness=3, AcquisitionTime="130000")(i, d)), same=("sitk",)),
    Row("one slice of another kernel between two",
        both(series(HU, ConvolutionKernel="B30f"), series(MOVED[5:6], start=5.5, ConvolutionKernel="B70f")),
        says=("1 slices that differ in ConvolutionKernel overlap the others and were left out",)),
    Row("one slice of another kernel in its place", edited(at((5,), ConvolutionKernel="B70f"), ConvolutionKernel="B30f"),
        says=("slices differ in ConvolutionKernel: 1 of them were kept, which fill holes",), same=("sitk", "pydicom")),
    Row("two patients under one UID, one above the other",
        both(series(HU), series(MOVED[:12], start=24, first=25, PatientID="SOMEONE")),
        says=("12 slices of another PatientID were left out",),
        differ={"sitk": "stacks two patients"}),
    Row("two frames of reference", both(series(HU), series(MOVED[:12], start=24, FrameOfReferenceUID="1.2.3")),
        says=("12 slices of another FrameOfReferenceUID were left out",)),
    Row("another patient, study and frame of reference in each slice, as careless de-identification leaves them",
        edited(lambda i, d: [setattr(d, word, f"1.2.{i}") for word in
                             ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")])),
    Row("two patients in five slices",
        lambda f: write(f, series(HU[:6], per_slice("PatientID", lambda i: f"P{i // 3}"))[:5]),
        hu=HU[:3], says=("2 slices of another PatientID were left out",)),
    Row("numbers written in several ways", edited(at(tuple(range(0, 24, 2)), SliceThickness="2.50", KVP="120.0"), KVP="120"),
        same=("sitk", "pydicom")),
    Row("a copied series", lambda f: (write(f / "one", series(HU)), write(f / "two", series(HU))),
        says=("24 slices are copies of others",)),
    Row("a series over several folders",
        lambda f: [write(f / f"DIR{k:03d}", series(HU)[k::3]) for k in range(3)]),
]  # fmt: skip


# What scanners put where nothing was measured.
ROUND = np.hypot(*(np.mgrid[:40, :36] - np.array([19.5, 17.5])[:, None, None])) > 17
OUTSIDE = np.where(ROUND, -1024, HU)


def filled(value: int, where: np.ndarray = ROUND, *, intercept: int = -1024, **tags: Any) -> Callable[[int, Any], None]:
    """Puts a stored value where ``where`` says."""

    def edit(index: int, data: Any) -> None:
        for keyword, wanted in tags.items():
            change(data, keyword, wanted)
        data.RescaleIntercept = intercept
        store(data, np.where(where, value, HU[index].astype(int) - intercept))

    return edit


def with_vr(edit: Callable[[int, Any], None], keyword: str, vr: str, value: int) -> Callable[[int, Any], None]:
    def also(index: int, data: Any) -> None:
        edit(index, data)
        data.add_new(pydicom.datadict.tag_for_keyword(keyword), vr, value)

    return also


UNSIGNED = {"BitsStored": 16, "HighBit": 15}
SIGNED = {**UNSIGNED, "PixelRepresentation": 1}
INSIDE = np.zeros((40, 36), bool)
INSIDE[18:21, 15:18] = True


def one_filled(value: int) -> Callable[[int, Any], None]:
    """Padding of another value in every slice."""
    return lambda index, data: filled(value + index, **UNSIGNED, PixelPaddingValue=value + index)(index, data)


def cleared_and_filled(index: int, data: Any) -> None:
    """63536 in a header that says that 12 bits are used: cleared, it would be bone."""
    stored = np.where(ROUND, 63536, HU[index].astype(int) + 1024)
    data.PixelPaddingValue = 63536
    data.PixelData = stored.astype("<u2").tobytes()


PADDING = [
    Row("63536, unsigned", edited(filled(63536, **UNSIGNED, PixelPaddingValue=63536)), hu=OUTSIDE,
        differ={"sitk": "takes padding for bone of 62512 HU", "pydicom": "rescales padding as all else"}),
    Row("63536 in pixels, -2000 in the header",
        edited(with_vr(filled(63536, **UNSIGNED), "PixelPaddingValue", "SS", -2000)), hu=OUTSIDE),
    Row("-2000 in pixels, 63536 in the header",
        edited(with_vr(filled(-2000, **SIGNED, intercept=0), "PixelPaddingValue", "US", 63536)), hu=OUTSIDE),
    Row("-2000, signed", edited(filled(-2000, **SIGNED, intercept=0, PixelPaddingValue=-2000)), hu=OUTSIDE,
        differ={"sitk": "leaves -2000 HU"}),
    Row("4095", edited(filled(4095, PixelPaddingValue=4095)), hu=OUTSIDE),
    Row("0 at an intercept of 0: water inside stays",
        edited(filled(0, **SIGNED, intercept=0, PixelPaddingValue=0)), hu=OUTSIDE),
    Row("0 at -1024", edited(filled(0, PixelPaddingValue=0)), hu=OUTSIDE, same=("sitk", "pydicom")),
    Row("a range", edited(lambda i, d: filled(4000 + 4 * i, PixelPaddingValue=4095, PixelPaddingRangeLimit=4000)(i, d)),
        hu=OUTSIDE),
    Row("a range, signed, upside down",
        edited(lambda i, d: filled(-1900 - i, **SIGNED, intercept=0, PixelPaddingValue=-2000,
                                   PixelPaddingRangeLimit=-1500)(i, d)), hu=OUTSIDE),
    Row("another value in each slice", edited(one_filled(5000)), hu=OUTSIDE,
        says=("slices differ in PixelPaddingValue",)),
    Row("above the bits that are stored", edited(cleared_and_filled), hu=OUTSIDE),
    Row("metal of the padding value stays", edited(filled(4095, INSIDE, PixelPaddingValue=4095)),
        hu=np.where(INSIDE, 3071, HU), same=("sitk", "pydicom")),
    Row("what no CT measures is padding inside as well", edited(filled(63536, INSIDE, **UNSIGNED, PixelPaddingValue=63536)),
        hu=np.where(INSIDE, -1024, HU)),
    Row("implicit syntax, which states no type of the padding value",
        lambda f: [reencoded(path, "1.2.840.10008.1.2") for path in
                   write(f, series(HU, filled(-2000, **SIGNED, intercept=0, PixelPaddingValue=-2000))).iterdir()],
        hu=OUTSIDE),
]  # fmt: skip


# Which series.
def beside(count: int, hu: np.ndarray = MOVED, **tags: Any) -> list[Any]:
    """A second series."""
    return series(np.resize(hu, (count, *hu.shape[1:])), SeriesInstanceUID=OTHER, **tags)


def coronal(count: int = 40, **tags: Any) -> list[Any]:
    images = beside(count, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], **tags)
    for index, data in enumerate(images):
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1] + 2 * index, 0]
    return images


CHOSEN = ("2 series in the folder: took the best of them",)
WHICH = [
    Row(name, both(series(HU), other), says=CHOSEN)
    for name, other in {
        "a MIP with more slices": beside(60, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]),
        "a projection": beside(60, ImageType=["DERIVED", "PRIMARY", "PROJECTION IMAGE", "MAXIMUM"]),
        "a MIP by its description": beside(60, SeriesDescription="Thorax MIP 10/2"),
        "a coronal MPR": coronal(ImageType=["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]),
        "a coronal series that calls itself original": coronal(),
        "an axial MPR": beside(60, ImageType=["DERIVED", "SECONDARY", "MPR"]),
        "VNC": beside(60, ImageType=["DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 SPI", "VNC"]),
        "VNC by its description": beside(60, SeriesDescription="Chest VNC 1.0 Qr40"),
        "an iodine map": beside(60, SeriesDescription="Iodine Map"),
        "40 keV": beside(60, ImageType=["DERIVED", "PRIMARY", "AXIAL", "MONO_40KEV"]),
        "40 keV by its description": beside(60, SeriesDescription="MonoE 40 keV"),
        "a material by its units": beside(60, RescaleType="MGML"),
        "effective atomic numbers": beside(60, RescaleType="Z_EFF"),
        "derived, of equal length": beside(24, ImageType=["DERIVED", "SECONDARY", "AXIAL"]),
        "PET": beside(60, Modality="PT"),
        "a segmentation": beside(60, Modality="SEG"),
        "screenshots": beside(60, SamplesPerPixel=3),
        "localizers": beside(3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "a bolus tracking in one place": beside(40, ImagePositionPatient=[0, 0, 0]),
    }.items()
] + [
    Row("original but short, beside a long one that was compressed with loss",
        both(series(np.resize(HU, (48, *HU.shape[1:])), ImageType=["DERIVED", "PRIMARY", "AXIAL"],
                    LossyImageCompression="01"), beside(5)),
        hu=np.resize(HU, (48, *HU.shape[1:])), says=("compressed with loss", *CHOSEN)),
    Row("PET alone", edited(Modality="PT"), refused=r"its modality is not CT \(PT\)"),
    Row("an iodine map alone", edited(RescaleType="MGML", SeriesDescription="Iodine"),
        says=("RescaleType is MGML, not HU", "its header says a material map")),
    Row("a MIP alone", edited(ImageType=["DERIVED", "SECONDARY", "MIP"]), says=(r"its header says a projection \(MIP\)",)),
    Row("a localizer within the series",
        both(series(HU), [data for data in series(MOVED[:1], first=0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])]),
        says=(r"1 images of the series have no place among its slices: left out \(1 localizers\)",)),
]  # fmt: skip


# What is missing.
def spoiled(count: int) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        for path in sorted(write(folder, series(HU)).iterdir())[:count]:
            path.write_bytes(path.read_bytes()[:300])

    return build


HOLE = HU.astype(np.float32)
HOLE[7] = (HOLE[6] + HOLE[8]) / 2
ODD = affine()
ODD[:3, 0] *= 2
MISSING = [
    Row("a slice within", lambda f: write(f, without(7)), hu=HOLE,
        says=("1 slices are missing: interpolated", "slice gaps of 2.50 to 5.00 mm")),
    Row("many slices within", lambda f: write(f, without(3, 7, 11)), refused="3 of 24 slices are missing"),
    Row("two files cut short in their headers", spoiled(2), hu=HU[:0],
        says=("2 of 24 files are DICOM by their look", "1 slices are missing", "slice gaps")),
    Row("five files cut short in their headers", spoiled(5), refused=r"5 of 24 files are DICOM by their look.*missing"),
    Row("the last slices, by ImagesInAcquisition",
        lambda f: write(f, series(HU[:22], ImagesInAcquisition=24)), hu=HU[:22],
        says=("2 of 24 images of ImagesInAcquisition are missing",)),
    Row("the last third, by ImagesInAcquisition", lambda f: write(f, series(HU[:16], ImagesInAcquisition=24)),
        refused="8 of 24 images of ImagesInAcquisition are missing"),
    Row("ImagesInAcquisition of two reconstructions, both there",
        both(series(HU, ImagesInAcquisition=48), beside(24, ImagesInAcquisition=48)),
        hu=MOVED, says=CHOSEN),
    Row("every second slice", lambda f: write(f, series(HU)[::2]), hu=HU[::2], affine=ODD,
        says=("InstanceNumber counts in steps of 2",), same=ALL),
    Row("numbers without slices", edited(per_slice("InstanceNumber", lambda i: i + 1 + 5 * (i > 11))),
        says=("InstanceNumber leaves out 5 numbers",), same=ALL),
    Row("numbers from 200 on", edited(first=200), same=ALL),
    Row("no numbers", edited(InstanceNumber=None), same=("sitk", "pydicom")),
]  # fmt: skip


# Multi-frame files.
def rle(data: Any) -> Any:
    data.compress(RLELossless, generate_instance_uid=False)
    return data


def frames_alone(hu: np.ndarray) -> Any:
    """A multi-frame image as older software writes it: one header, many frames."""
    data = series(hu[:1])[0]
    data.NumberOfFrames = len(hu)
    store(data, hu.astype(int) + 1024)
    return data


SHUFFLED = [int(i) for i in np.random.default_rng(1).permutation(24)]
FRAMES = [
    Row("enhanced CT", lambda f: write(f, [enhanced(HU)]), same=("dcm2niix", "sitk")),
    Row("enhanced CT, frames in any order", lambda f: write(f, [enhanced(HU, SHUFFLED)]), same=("dcm2niix",),
        differ={"sitk": "stacks frames as they lie in the file, and loses their spacing"}),
    Row("enhanced CT, all in the groups of each frame", lambda f: write(f, [enhanced(HU, shared=False)]),
        same=("dcm2niix",)),
    Row("enhanced CT, implicit syntax",
        lambda f: [reencoded(path, "1.2.840.10008.1.2") for path in write(f, [enhanced(HU, SHUFFLED)]).iterdir()]),
    Row("enhanced CT of two temporal positions", lambda f: write(f, [enhanced(HU, phases=2)]),
        says=(TWO.format("AcquisitionNumber, TemporalPositionIndex"),)),
    Row("two enhanced files of one series", lambda f: write(f, [enhanced(HU), enhanced(MOVED)]),
        says=(TWO.format("file"),)),
    Row("enhanced CT, a file for each frame",
        lambda f: write(f, [enhanced(HU[i : i + 1], start=i, number=i + 1) for i in range(24)]), same=("dcm2niix",)),
    Row("enhanced CT in two files that follow each other",
        lambda f: write(f, [enhanced(HU[:10]), enhanced(HU[10:], start=10, offset=10)])),
    Row("enhanced CT, RLE", lambda f: write(f, [rle(enhanced(HU, SHUFFLED))]),
        differ={"dcm2niix": "does not read RLE of several frames"}),
    Row("frames without places", lambda f: write(f, [frames_alone(HU)]), refused="24 without ImagePositionPatient"),
    Row("a multi-frame file without places beside a good series",
        both(series(HU), [data for data in [frames_alone(HU)] if change(data, "SeriesInstanceUID", OTHER) is None]),
        says=CHOSEN),
    Row("fewer frames than the header says",
        lambda f: write(f, [data for data in [enhanced(HU)] if change(data, "NumberOfFrames", 30) is None]),
        refused="69120 bytes of pixels where its header says 86400"),
]  # fmt: skip


# Readable, though it looks otherwise.
def odd_one(folder: Path, **tags: Any) -> None:
    write(folder, series(HU))
    extra = series(MOVED[:1], first=99)[0]
    store(extra, np.zeros((int(tags.get("Rows", 40)), 36)), **tags)
    write(folder, [extra], "X")


def viewer_files(folder: Path) -> None:
    """A patient CD: a viewer, its pages and pictures, and a DICOMDIR of another name."""
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
        says=("1 slices of another ImageOrientationPatient were left out", "InstanceNumber leaves out 74")),
    Row("one image of another size", lambda f: odd_one(f, Rows=20),
        says=(r"1 slices of another size \(Rows, Columns\) were left out", "InstanceNumber leaves out 74")),
    Row("one image of another pixel spacing", lambda f: odd_one(f, PixelSpacing=[1, 1]),
        says=("1 slices of another PixelSpacing were left out", "InstanceNumber leaves out 74")),
    Row("one image without a position", lambda f: odd_one(f, ImagePositionPatient=None),
        says=("1 without ImagePositionPatient", "InstanceNumber leaves out 74")),
    Row("viewer files", viewer_files),
    Row("a DICOMDIR of any name beside", lambda f: (write(f, series(HU)), (f / "IMDIR.dcm").write_bytes(directory()))),
    Row("turned about the head: rows from left to right", edited(ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]),
        affine=np.array([[0, 0, -SPACING[2], ORIGIN[0]], [0, -SPACING[1], 0, ORIGIN[1]], [SPACING[0], 0, 0, ORIGIN[2]],
                         [0, 0, 0, 1]]), same=ALL),
    Row("rescaled by another slope and intercept in each slice", edited(lambda i, d: rescaled(i, d)),
        says=("slices differ in RescaleSlope, RescaleIntercept: each is rescaled by its own",), same=("pydicom",)),
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
    """Even slices at a slope of 2, where their values are even, odd ones with another intercept."""
    if index % 2:
        store(data, HU[index].astype(int) + 1100, RescaleIntercept=-1100)
    else:
        store(data, (HU[index].astype(int) + 1100) * 2, RescaleSlope="0.5", RescaleIntercept="-1100")


def directory() -> bytes:
    import io

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


# Bits and bytes of pixels.
def shifted(index: int, data: Any) -> None:
    """12 bits at the top of 16."""
    store(data, (HU[index].astype(int) + 1024) << 4, HighBit=15)


def overlaid(index: int, data: Any) -> None:
    """An overlay in the bits above those stored, as in older files."""
    stored = HU[index].astype(int) + 1024
    data.PixelData = (stored | (np.indices(stored.shape).sum(axis=0) % 2 << 15)).astype("<u2").tobytes()


def signed_12(index: int, data: Any) -> None:
    """12 signed bits, the unused ones not those of the sign."""
    data.PixelRepresentation, data.RescaleIntercept = 1, 0
    data.PixelData = (np.clip(HU[index], -1000, 2047).astype("<i2") & 0x0FFF).tobytes()


def compressed_wrongly(index: int, data: Any) -> None:
    """Encapsulated pixels under a syntax without compression."""
    data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
    data["PixelData"].VR = "OB"


def of_no_stated_length(path: Path) -> None:
    content = path.read_bytes()
    at = content.rindex(b"\xe0\x7f\x10\x00OB") + 8
    path.write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])


def under_rle(path: Path) -> None:
    content = path.read_bytes()
    native, claimed = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"
    path.write_bytes(content.replace(native, claimed))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def nested(depth: int, folder: Path) -> None:
    """A private sequence nested so deep that recursive parsers end, in each slice."""
    for path in write(folder, series(HU[:4])).iterdir():
        content = path.read_bytes()
        pixels = content.index(b"\xe0\x7f\x10\x00OW")
        opening = b"\x0b\x00\x01\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
        closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
        creator = b"\x0b\x00\x10\x00LO\x08\0PRIVATE "
        # Behind all other groups below the pixels.
        deep = opening * depth + closing * depth
        path.write_bytes(content[:pixels] + creator.replace(b"\x0b\0", b"\xe1\x7f", 1)[:0] + deep + content[pixels:])


def bomb(folder: Path) -> None:
    """A deflated slice of 2 GB of zeros behind a header of 40 x 36 pixels."""
    paths = sorted(write(folder, series(HU)).iterdir())
    content = paths[0].read_bytes()
    start = content.index(b"\x08\x00\x05\x00" if b"\x08\x00\x05\x00" in content else b"\x08\x00\x08\x00")
    deflated(paths[0], content[start:] + bytes(2**28))


BITS = [
    Row("implicit", each(lambda path: reencoded(path, "1.2.840.10008.1.2")), same=ALL),
    Row("big endian", each(lambda path: reencoded(path, "1.2.840.10008.1.2.2")), same=ALL),
    Row("deflated", each(lambda path: reencoded(path, "1.2.840.10008.1.2.1.99")), same=("sitk", "pydicom")),
    Row("8 bits", edited(lambda i, d: store(d, (HU[i] + 1000) // 16, BitsAllocated=8, BitsStored=8, HighBit=7,
                                            RescaleSlope=16, RescaleIntercept=-1000)),
        hu=(HU + 1000) // 16 * 16 - 1000, same=ALL),
    Row("32 bits, signed", edited(lambda i, d: store(d, HU[i], BitsAllocated=32, BitsStored=32, HighBit=31,
                                                     PixelRepresentation=1, RescaleIntercept=0)), same=ALL),
    Row("16 bits, signed", edited(lambda i, d: store(d, HU[i], **SIGNED, RescaleIntercept=0)), same=ALL),
    Row("16 bits, unsigned, at an intercept of -32768",
        edited(lambda i, d: store(d, HU[i].astype(int) + 32768, **UNSIGNED, RescaleIntercept=-32768)), same=ALL),
    Row("12 signed bits without their sign above", edited(signed_12), hu=np.clip(HU, -1000, 2047), same=("sitk", "pydicom")),
    Row("12 bits at the top", edited(shifted),
        differ=dict.fromkeys(ALL, "does not shift by HighBit: PS3.5, 8.1.1")),
    Row("12 bits at the bottom, whatever HighBit says", edited(HighBit=15), same=ALL),
    Row("neither at the top nor at the bottom", edited(lambda i, d: store(d, (HU[i].astype(int) + 1024) << 2, HighBit=15)),
        refused="12 bits stored below high bit 15, and others used"),
    Row("an overlay above the stored bits", edited(overlaid), same=ALL),
    Row("RLE of MONOCHROME1 with a slope", lambda f: write(f, [rle(d) for d in series(
        HU, lambda i, d: store(d, (HU[i].astype(int) + 1024) * 2, BitsStored=13, HighBit=12, RescaleSlope="0.5",
                               PhotometricInterpretation="MONOCHROME1"))]), same=("pydicom",)),
    Row("an odd number of bytes", edited(lambda i, d: store(d, (HU[i][:39, :35] + 1000) // 16, Rows=39, Columns=35,
                                                            BitsAllocated=8, BitsStored=8, HighBit=7)),
        hu=((HU[:, :39, :35] + 1000) // 16 - 1024).astype(np.int16), same=("sitk", "pydicom")),
    Row("compressed pixels under a syntax without compression",
        lambda f: [of_no_stated_length(path) for path in write(f, series(HU, compressed_wrongly)).iterdir()],
        refused="its pixels are compressed, and its transfer syntax says that they are not"),
    Row("pixels without compression under a syntax of one", each(under_rle),
        refused="its pixels are not compressed, and its transfer syntax says that they are"),
    Row("more bytes than rows and columns say", edited(lambda i, d: setattr(d, "PixelData", d.PixelData + b"\0\0")),
        refused="2882 bytes of pixels where its header says 2880"),
    Row("fewer bytes than rows and columns say", edited(lambda i, d: setattr(d, "PixelData", d.PixelData[:-2])),
        refused="2878 bytes of pixels where its header says 2880"),
    Row("files cut in their pixels", each(cut), refused="cut short"),
    Row("12 bits allocated", edited(BitsAllocated=12), refused="12 bits allocated, 12 stored, high bit 11"),
    Row("more bits stored than allocated", edited(BitsStored=17, HighBit=16), refused="16 bits allocated, 17 stored"),
    Row("nested 40 deep", lambda f: nested(40, f), hu=HU[:4]),
    Row("nested 20,000 deep", lambda f: nested(20000, f), refused="4 DICOM files, none of which can be read"),
    Row("a bomb among slices", bomb),
]  # fmt: skip

ROWS = ACQUISITIONS + PADDING + WHICH + MISSING + FRAMES + READABLE + BITS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_is_right(tmp_path: Path, row: Row) -> None:
    folder = tmp_path / "scan"
    row.build(folder)
    if row.refused:
        with pytest.raises(PreprocessingError, match=row.refused) as refusal:
            read(folder)
        assert str(refusal.value).startswith(f"{folder}: ")
        assert "\n" not in str(refusal.value)
        return
    volume = read(folder)
    assert len(volume.warnings) == len(row.says), volume.warnings
    for words, warning in zip(row.says, volume.warnings, strict=True):
        assert re.search(words, warning), (words, warning)
    if len(row.hu):
        assert volume.array.shape == row.hu.shape
        assert np.abs(volume.array.astype(float) - row.hu).max() < 1e-3
        assert np.allclose(volume.affine, row.affine, atol=1e-6)
    for name in (*row.same, *row.differ):
        others = OPINIONS[name](folder, tmp_path)
        agrees = any(_same(volume, array, matrix) for array, matrix in others)
        assert agrees == (name in row.same), f"{name}: {row.differ.get(name, 'is expected to agree')}"


def test_there_are_rows_enough() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 100


def _same(volume: Volume, array: np.ndarray, matrix: np.ndarray | None) -> bool:
    """Whether another reader has our value at each of our places. ``matrix``: its indices to LPS mm, or None."""
    if matrix is None:
        return array.shape == volume.array.shape and bool(np.abs(array - volume.array).max() < 1e-2)
    indices = np.indices(volume.array.shape).reshape(3, -1)
    places = (np.linalg.inv(matrix) @ volume.affine @ np.vstack([indices, np.ones(indices.shape[1])]))[:3]
    whole = np.rint(places).astype(int)
    if np.abs(places - whole).max() > 0.02 or sorted(array.shape) != sorted(volume.array.shape):
        return False
    if (whole < 0).any() or (whole >= np.array(array.shape)[:, None]).any():
        return False
    return bool(np.abs(array[tuple(whole)] - volume.array.ravel()).max() < 1e-2)


def _by_dcm2niix(folder: Path, out: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    program = pytest.importorskip("dcm2niix").bin
    (out / "nifti").mkdir()
    command = [program, "-z", "n", "-b", "n", "-o", str(out / "nifti"), str(folder)]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    images = [nib.load(path) for path in sorted((out / "nifti").glob("*.nii"))]
    flip = np.diag([-1.0, -1, 1, 1])
    return [(np.asarray(image.dataobj, dtype=float), flip @ image.affine) for image in images]  # type: ignore[attr-defined]


def _by_sitk(folder: Path, out: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    answers: list[tuple[np.ndarray, np.ndarray | None]] = []
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        try:
            image = sitk.ReadImage(names if len(names) > 1 else names[0])
        except RuntimeError:
            continue
        matrix = np.eye(4)
        matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        matrix[:3, 3] = image.GetOrigin()
        answers.append((sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(float), matrix))
    return answers


def _by_pydicom(folder: Path, out: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    files = [pydicom.dcmread(Path(root) / name) for root, _, names in os.walk(folder) for name in names]
    files.sort(key=lambda data: float(data.ImagePositionPatient[2]))
    planes = [
        data.pixel_array * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0)) for data in files
    ]
    return [(np.stack(planes), None)]


OPINIONS = {"dcm2niix": _by_dcm2niix, "sitk": _by_sitk, "pydicom": _by_pydicom}
