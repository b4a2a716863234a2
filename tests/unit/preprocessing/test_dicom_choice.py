"""The choice of the series in a folder, and missing slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from tests.unit.preprocessing.dicom_builder import ORIGIN, affine, series, write
from tests.unit.preprocessing.dicom_situations import (
    ALL,
    CHOSEN,
    HU,
    MOVED,
    Row,
    beside,
    both,
    check,
    edited,
    per_slice,
)


def coronal(count: int = 40, **tags: Any) -> list[Any]:
    images = beside(count, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], **tags)
    for index, data in enumerate(images):
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1] + 2 * index, 0]
    return images


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
        hu=np.resize(HU, (48, *HU.shape[1:])), says=("lossy compression", *CHOSEN)),
    Row("PET alone", edited(Modality="PT"), refused=r"its modality is not CT \(PT\)"),
    Row("an iodine map alone", edited(RescaleType="MGML", SeriesDescription="Iodine"),
        says=("RescaleType is MGML, not HU", "according to its header it is a material map")),
    Row("a MIP alone", edited(ImageType=["DERIVED", "SECONDARY", "MIP"]), says=(r"according to its header it is a projection \(MIP\)",)),
    Row("a localizer within the series",
        both(series(HU), [data for data in series(MOVED[:1], first=0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])]),
        says=(r"1 image of the series has no place among its slices: left out \(1 localizers\)",)),
]  # fmt: skip


def without(*indices: int) -> list[Any]:
    return [data for index, data in enumerate(series(HU)) if index not in indices]


def spoiled(count: int) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        for path in sorted(write(folder, series(HU)).iterdir())[:count]:
            path.write_bytes(path.read_bytes()[:300])

    return build


def cut(*slices: int) -> Callable[[Path], object]:
    """Files that end in the middle of their pixels."""

    def build(folder: Path) -> None:
        paths = sorted(write(folder, series(HU)).iterdir(), key=lambda path: int(dcmread(path).InstanceNumber))
        for index in slices:
            paths[index].write_bytes(paths[index].read_bytes()[:-100])

    return build


HOLE = HU.astype(np.float32)
HOLE[7] = (HOLE[6] + HOLE[8]) / 2
ODD = affine()
ODD[:3, 0] *= 2
MISSING = [
    Row("a slice within", lambda f: write(f, without(7)), hu=HOLE,
        says=("1 slice is missing: interpolated", "slice gaps of 2.50 to 5.00 mm")),
    Row("many slices within", lambda f: write(f, without(3, 7, 11)), refused="3 of 24 slices are missing"),
    Row("two files cut short in their headers", spoiled(2), hu=HU[:0],
        says=("2 of 24 files look like DICOM", "1 slice is missing", "slice gaps")),
    Row("five files cut short in their headers", spoiled(5), refused=r"5 of 24 files look like DICOM.*missing"),
    Row("a file cut short in its pixels", cut(7), hu=HOLE,
        says=(r"1 of 24 slices cannot be decoded \(damaged\): left out", "1 slice is missing: interpolated", "slice gaps")),
    Row("the last two cut short in their pixels", cut(22, 23), hu=HU[:22],
        says=(r"2 of 24 slices cannot be decoded \(damaged\): left out",)),
    Row("three files cut short in their pixels", cut(3, 7, 11), refused=r"cannot be decoded \(cut short\); it is damaged"),
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
        says=("InstanceNumber skips 5 numbers",), same=ALL),
    Row("numbers from 200 on", edited(first=200), same=ALL),
    Row("no numbers", edited(InstanceNumber=None), same=("sitk", "pydicom")),
]  # fmt: skip


@pytest.mark.parametrize("row", WHICH + MISSING, ids=lambda row: row.name)
def test_what_is_right(tmp_path: Path, row: Row) -> None:
    check(row, tmp_path)
