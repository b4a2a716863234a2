"""Several acquisitions, reconstructions or patients in one series: one of them becomes the volume, with a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.preprocessing.dicom_builder import affine, series, write
from tests.unit.preprocessing.dicom_situations import ALL, HU, MOVED, TWO, Row, at, both, check, edited, per_slice


def blocks(overlap: int) -> list[Any]:
    """Two acquisitions: the second continues the first, except that slices at the seam are duplicated with other
    voxels."""
    return [
        *series(HU[:14], AcquisitionNumber=1, AcquisitionTime="120001"),
        *series(HU[14 - overlap :] + 0 * HU[14 - overlap :], start=14 - overlap, first=15, AcquisitionNumber=2,
                AcquisitionTime="120009"),
    ]  # fmt: skip


def passes(second: np.ndarray, start: float, backwards: bool = False) -> list[Any]:
    """Two passes that only their numbering separates."""
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


def told_apart(keyword: str, one: str, other: str) -> list[Any]:
    """Two passes at the same positions, numbered alternately: only ``keyword`` separates them."""
    images = interleaved_numbers(0)
    for index, data in enumerate(images):
        setattr(data, keyword, one if index < 24 else other)
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
        says=(TWO.format("AcquisitionNumber"),)),
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
        says=("differ in AcquisitionNumber: used 24 of 34 slices",)),
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
        says=("adjacent slices differ more than",)),
    *(Row(f"two passes of which {keyword} tells, numbered in turn", lambda f, keyword=keyword, values=values: write(
        f, told_apart(keyword, *values)), says=(TWO.format(keyword),))
      for keyword, values in {
          "SeriesTime": ("120001", "120101"), "ProtocolName": ("lung", "soft"), "FilterType": ("A", "B"),
          "ReconstructionAlgorithm": ("FILTER_BACK_PROJ", "ITERATIVE"), "PatientPosition": ("HFS", "HFP"),
      }.items()),
    Row("blocks that follow each other", lambda f: write(f, blocks(0)), same=ALL),
    Row("blocks with a seam of one slice", lambda f: write(f, blocks(1)),
        says=("1 slice with another AcquisitionNumber, AcquisitionTime overlaps the others and was left out",)),
    Row("an acquisition number a slice", edited(per_slice("AcquisitionNumber", lambda i: i + 1)), same=ALL),
    Row("a thickness and a time that change half-way",
        edited(lambda i, d: at(tuple(range(12, 24)), SliceThickness=3, AcquisitionTime="130000")(i, d)), same=("sitk",)),
    Row("one slice of another kernel between two",
        both(series(HU, ConvolutionKernel="B30f"), series(MOVED[5:6], start=5.5, ConvolutionKernel="B70f")),
        says=("1 slice with another ConvolutionKernel overlaps the others and was left out",)),
    Row("one slice of another kernel in its place", edited(at((5,), ConvolutionKernel="B70f"), ConvolutionKernel="B30f"),
        says=("slices differ in ConvolutionKernel: 1 of them was kept because they fill gaps",), same=("sitk", "pydicom")),
    Row("two patients under one UID, one above the other",
        both(series(HU), series(MOVED[:12], start=24, first=25, PatientID="SOMEONE")),
        says=("12 slices with another PatientID were left out",),
        differ={"sitk": "stacks two patients"}),
    Row("two frames of reference", both(series(HU), series(MOVED[:12], start=24, FrameOfReferenceUID="1.2.3")),
        says=("12 slices with another FrameOfReferenceUID were left out",)),
    Row("another patient, study and frame of reference in each slice, as careless de-identification leaves them",
        edited(lambda i, d: [setattr(d, word, f"1.2.{i}") for word in
                             ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")])),
    Row("two patients in five slices",
        lambda f: write(f, series(HU[:6], per_slice("PatientID", lambda i: f"P{i // 3}"))[:5]),
        hu=HU[:3], says=("2 slices with another PatientID were left out",)),
    Row("numbers written in several ways", edited(at(tuple(range(0, 24, 2)), SliceThickness="2.50", KVP="120.0"), KVP="120"),
        same=("sitk", "pydicom")),
    Row("a copied series", lambda f: (write(f / "one", series(HU)), write(f / "two", series(HU))),
        says=("24 slices are copies of others",)),
    Row("a series over several folders",
        lambda f: [write(f / f"DIR{k:03d}", series(HU)[k::3]) for k in range(3)]),
]  # fmt: skip


@pytest.mark.parametrize("row", ACQUISITIONS, ids=lambda row: row.name)
def test_what_is_right(tmp_path: Path, row: Row) -> None:
    check(row, tmp_path)
