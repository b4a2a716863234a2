"""Select the images of a series that are CT slices with a position in the patient, and state why others are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctclip.preprocessing.dicom.headers import Image
from ctclip.preprocessing.dicom.kinds import image_types

PLACING = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


@dataclass
class Slice:
    """One image of a series: ``place`` (3,) mm of its first pixel, ``turn`` (6,) direction cosines of rows and columns,
    ``spacing`` mm between rows and between columns."""

    image: Image
    shape: tuple[int, int]
    spacing: tuple[float, float]
    place: np.ndarray
    turn: np.ndarray

    @property
    def normal(self) -> np.ndarray:
        """(3,) normal of the slice."""
        (a, b, c), (d, e, f) = self.turn[:3], self.turn[3:]
        return np.array([b * f - c * e, c * d - a * f, a * e - b * d])


def placed(images: list[Image]) -> tuple[list[Slice], Counter[str]]:
    """The slices among images, and counts of the other images by reason."""
    slices, reasons = [], Counter[str]()
    for image in images:
        reason = _not_a_slice(image)
        if reason is not None:
            reasons[reason] += 1
            continue
        values = {keyword: _numbers(image, keyword) for keyword in PLACING}
        absent = [keyword for keyword, count in PLACING.items() if len(values[keyword]) != count]
        if absent:
            reasons[f"without {absent[0]}"] += 1
        elif values["PixelSpacing"].min() <= 0:
            reasons["with a PixelSpacing that is not positive"] += 1
        else:
            place, turn, (rows, columns) = values.values()
            shape = int(image.header["Rows"]), int(image.header["Columns"])
            slices.append(Slice(image, shape, (float(rows), float(columns)), place, turn))
    return slices, reasons


def modality(image: Image) -> str:
    """The modality (two letters); an image without one is assumed to be a CT."""
    return str(image.header.get("Modality", "") or "CT").strip().upper()


def _not_a_slice(image: Image) -> str | None:
    header = image.header
    if "LOCALIZER" in image_types(header):
        return "localizers"
    if modality(image) != "CT":
        return "not of modality CT"
    if str(header.get("SamplesPerPixel", 1) or 1) != "1" or "PALETTE" in str(
        header.get("PhotometricInterpretation", "")
    ):
        return "colour pictures"
    if image.pixels is None:
        return "without pixel data"
    if min(int(header.get(keyword, 0) or 0) for keyword in ("Rows", "Columns")) < 2:
        return "without Rows and Columns"
    return None


def _numbers(image: Image, keyword: str) -> np.ndarray:
    try:
        values = np.array([float(value) for value in _several(image.header.get(keyword, None))])
    except (TypeError, ValueError):
        return np.zeros(0)
    return values if np.isfinite(values).all() and np.abs(values).max(initial=0) < 1e6 else np.zeros(0)


def _several(value: Any) -> list[Any]:
    if value is None or isinstance(value, str | bytes | float | int):
        return [] if value is None or value == "" else [value]
    return list(value)
