"""Detect missing slices of a series from unreadable files, counts in headers, and numbering."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ctclip.preprocessing.dicom.headers import Image
from ctclip.preprocessing.dicom.slices import Slice
from ctclip.preprocessing.errors import PreprocessingError

MOST_MISSING = 0.1


def check_count(
    source: str, slices: list[Slice], series: list[Image], folder: list[Image], damaged: int, warnings: list[str]
) -> None:
    """Compare the number of files with the number of unreadable ones (``damaged``) and with ImagesInAcquisition.

    ``series`` are all images of the series, ``folder`` all images that were read. If a tenth or more is missing the
    series is refused, otherwise there is a warning.
    """
    if damaged:
        _tell(source, damaged, len(folder) + damaged, "files look like DICOM but cannot be read", warnings)
    expected, present = 0, 0
    for number in {_acquisition(member.image) for member in slices}:
        stated = Counter(
            _integer(member.image.header.get("ImagesInAcquisition", None))
            for member in slices
            if _acquisition(member.image) == number
        )
        count = stated.most_common(1)[0][0]
        same = sum(image.frame == 0 or image.frames > 1 for image in series if _acquisition(image) == number)
        if count is None or same >= count or _count_of_study(slices[0].image, folder, number) == count:
            continue
        expected, present = expected + count, present + same
    if expected > present:
        _tell(source, expected - present, expected, "images of ImagesInAcquisition are missing", warnings)


def by_number(series: list[Image], warnings: list[str]) -> int:
    """The number of gaps between the lowest and highest InstanceNumber of a series; 0, with a warning in ``warnings``,
    if numbers do not increase by one."""
    numbers = [_integer(image.header.get("InstanceNumber", None)) for image in series]
    known = np.unique([number for number in numbers if number is not None])
    if None in numbers or len(known) < 3:
        return 0
    step = int(np.gcd.reduce(np.diff(known)))
    if step > 1:
        warnings.append(f"InstanceNumber counts in steps of {step}: slices between may be missing")
        return 0
    return int(known[-1] - known[0] + 1 - len(known))


def _tell(source: str, missing: int, whole: int, what: str, warnings: list[str]) -> None:
    if missing > MOST_MISSING * whole:
        raise PreprocessingError(f"{source}: {missing} of {whole} {what}: slices are missing; export the series again")
    warnings.append(f"{missing} of {whole} {what}")


def _count_of_study(image: Image, folder: list[Image], number: str) -> int:
    study = str(image.header.get("StudyInstanceUID", ""))
    return sum(
        _acquisition(other) == number and str(other.header.get("StudyInstanceUID", "")) == study for other in folder
    )


def _acquisition(image: Image) -> str:
    return str(image.header.get("AcquisitionNumber", "") or "")


def _integer(value: object) -> int | None:
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError):
        return None
