"""Files with several frames: Enhanced CT, and files of older software."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.preprocessing.dicom_builder import change, enhanced, reencoded, series, store, write
from tests.unit.preprocessing.dicom_situations import CHOSEN, HU, MOVED, OTHER, TWO, Row, both, check, rle


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
        refused="69120 bytes of pixels, but its header states 86400"),
]  # fmt: skip


@pytest.mark.parametrize("row", FRAMES, ids=lambda row: row.name)
def test_what_is_right(tmp_path: Path, row: Row) -> None:
    check(row, tmp_path)
