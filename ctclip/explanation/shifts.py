"""Finer maps by shifting the volume: the encoder's cells are shifted by fractions of their size, and the maps are
combined.

Shift-and-stitch (Long, Shelhamer and Darrell 2015, "Fully Convolutional Networks for Semantic Segmentation", section
3.2). It needs no training. Each location gets the mean of all cells that cover it, so that a structure smaller than a
cell appears where the cells that contain it overlap.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ctclip.errors import ExplanationError
from ctclip.explanation.detail import shifted, with_detail
from ctclip.explanation.method import SLOW, Maps, Method, Subject
from ctclip.models.encoded import axis_spacing
from ctclip.preprocessing.progress import track

# Show progress for maps that take longer than this.
LONG_SECONDS = 10.0


def maps_of(looking: Method, subject: Subject, shifts: int | None = None, *, progress: bool = False) -> Maps:
    """The maps of a method, with ``shifts`` positions of the cells along each axis (by default the method's own number):
    ``shifts`` cubed times the encodings, for cells of a ``shifts``-th of the size along each axis.

    If the voxels of a cell cannot be divided by ``shifts`` along an axis, the next smaller divisor is used. Methods with
    ``slopes`` also show detail within cells (``ctclip.explanation.detail``).
    ``progress``: show progress if the maps take long. Raises ExplanationError if the method does not support the
    encoder or the head, or already encodes the scan many times.
    """
    count = looking.shifts if shifts is None else shifts
    if count > 1 and looking.name in SLOW:
        raise ExplanationError(
            f"--shifts {count}: {looking.name} already encodes a scan many times; leave out --shifts"
        )
    began = time.perf_counter()
    first = looking.maps(subject)
    seconds = time.perf_counter() - began
    spacing = np.array(axis_spacing(subject.model.volume_encoder.spec))
    cell = [round(float(mm)) for mm in np.diag(first.affine)[:3] / spacing]
    parts = [max(n for n in range(1, count + 1) if extent % n == 0) for extent in cell]
    steps = [extent // n for extent, n in zip(cell, parts, strict=True)]
    shape = [extent * n for extent, n in zip(first.values.shape[1:], parts, strict=True)]
    stitched = np.empty((len(first.values), *shape), np.float32)
    places: Iterable[tuple[int, ...]] = itertools.product(*map(range, parts))
    if progress and seconds * math.prod(parts) > LONG_SECONDS:
        places = track(places, math.prod(parts), "mapping", "encodings")
    for place in places:
        shift = [number * step for number, step in zip(place, steps, strict=True)]
        moved = looking.maps(replace(subject, volume=shifted(subject.volume, shift))) if any(shift) else first
        z, y, x = (slice(number, None, n) for number, n in zip(place, parts, strict=True))
        stitched[:, z, y, x] = moved.values
    maps = first if math.prod(parts) == 1 else Maps(*_means(stitched, first.affine, parts), first.notes)
    # Gradients cost more than maps and change less, so only positions along the diagonal have them.
    diagonal = [
        [min(number, n - 1) * step for n, step in zip(parts, steps, strict=True)] for number in range(max(parts))
    ]
    return with_detail(maps, looking, subject, cell, diagonal)


def _means(stitched: np.ndarray, affine: np.ndarray, parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values (F, d, h, w) of overlapping cells, one at each of ``parts`` positions in a cell, and their affine -> for
    each part of a cell, the mean of the cells that cover it, and the affine of the parts."""
    from scipy import ndimage

    means = ndimage.uniform_filter(stitched, size=(1, *parts), mode="nearest")
    fine = affine.copy()
    for axis, count in enumerate(parts):
        fine[:3, axis] /= count
    # For an even number of cells, the filter is centred half a step before the middle.
    half = [0.5 * (count % 2 == 0) for count in parts]
    fine[:3, 3] -= fine[:3, :3] @ half
    return means, fine


def check_shifts(shifts: object) -> None:
    """Raise ExplanationError unless ``shifts`` is None or a whole number from 1 to 8."""
    if shifts is not None and (isinstance(shifts, bool) or not isinstance(shifts, int) or not 1 <= shifts <= 8):
        raise ExplanationError(f"shifts={str(shifts)[:40]}: give a whole number from 1 to 8")
