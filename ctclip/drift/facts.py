"""Describe a prepared scan in a few dozen numbers that need no model: densities, layout, noise, and acquisition."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ctclip.preprocessing.spec import PreprocessingSpec

# Bounds in HU of the density classes: air, emphysema, lung, fat, fluid, soft tissue, contrast medium, bone, metal.
EDGES = (-1025, -980, -900, -800, -650, -450, -200, -120, -60, -10, 30, 70, 120, 200, 350, 600, 3100)
TISSUES = {"lung": (-950.0, -500.0), "soft tissue": (-200.0, 200.0), "bone": (200.0, 4000.0)}
# Number of parts along each axis [slice, row, column] in which tissues are counted.
PARTS = (8, 6, 6)
AXES = ("from feet to head", "from front to back", "from right to left")
COARSE_MM, FINE_MM = 8.0, 3.0
# Noise is measured in homogeneous soft tissue within these bounds.
EVEN = (-60.0, 130.0)
# Number of lines along each of the other axes in which noise is measured.
LINES = 40
SIDES = ("slice", "row", "column")
# The density class of each integer HU.
_BIN_OF = np.searchsorted(EDGES, np.arange(EDGES[0], EDGES[-1]), side="right") - 1


@dataclass(frozen=True)
class Source:
    """The scan before resampling: spacing in mm and number of voxels along [slice, row, column]."""

    spacing: tuple[float, ...]
    shape: tuple[int, ...]

    @property
    def facts(self) -> np.ndarray:
        """Spacing and extent in mm (6,)."""
        return np.array([*self.spacing, *(step * count for step, count in zip(self.spacing, self.shape, strict=True))])

    @classmethod
    def of_notes(cls, notes: Mapping[str, str]) -> Source | None:
        """The source of a volume as recorded in a store; None if there is no readable record."""
        spacing, shape = (
            [float(number) for number in re.findall(r"\d+(?:\.\d+)?", notes.get(f"source_{kind}", ""))]
            for kind in ("spacing", "shape")
        )
        if len(spacing) != 3 or len(shape) != 3 or not all(spacing) or not all(shape):
            return None
        return cls(tuple(spacing), tuple(int(count) for count in shape))


SOURCE_NAMES = tuple([f"{side} spacing" for side in SIDES] + [f"extent along the {side}s" for side in SIDES])


def fact_names() -> dict[str, list[str]]:
    """Names of the numbers of each group of ``scan_facts``."""
    between = [f"share of voxels from {low} to {high} HU" for low, high in itertools.pairwise(EDGES)]
    layout = [
        f"{tissue} in part {part + 1} of {parts} {axis}"
        for tissue in TISSUES
        for axis, parts in zip(AXES, PARTS, strict=True)
        for part in range(parts)
    ]
    return {"densities": between, "layout": layout, "noise": [f"noise along the {side}s" for side in SIDES]}


def scan_facts(voxels: np.ndarray, spec: PreprocessingSpec) -> dict[str, np.ndarray]:
    """Voxels float32 [slice, row, column] in [-1, 1], as the model gets them -> one vector for each group of numbers.

    Fractions are given as square roots, which stabilises their variance (Bartlett 1936); noise is the logarithm of the
    median absolute second difference of neighbouring voxels in HU.
    """
    low, high = spec.hu_window
    steps = tuple(max(1, round(FINE_MM / step)) for step in spec.spacing)
    fine = _hu(voxels[tuple(slice(None, None, step) for step in steps)], low, high)
    spacing = tuple(step * mm for step, mm in zip(steps, spec.spacing, strict=True))
    counts = np.bincount(
        _BIN_OF[np.clip(fine, EDGES[0], EDGES[-1] - 1).astype(np.int16) - EDGES[0]].ravel(), minlength=len(EDGES) - 1
    )
    coarse = _blocks(fine, tuple(max(1, round(COARSE_MM / step)) for step in spacing))
    layout = [
        share
        for least, most in TISSUES.values()
        for axis in range(3)
        for share in _along((coarse >= least) & (coarse < most), axis)
    ]
    return {
        "densities": np.sqrt(counts / max(1, counts.sum())),
        "layout": np.sqrt(np.array(layout)),
        "noise": np.array([_noise(voxels, axis, low, high) for axis in range(3)]),
    }


def _hu(voxels: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.float32(low) + (voxels + 1) * np.float32((high - low) / 2)


def _along(mask: np.ndarray, axis: int) -> list[float]:
    """For each part along an axis, the fraction of all voxels that belong to a tissue and lie in that part."""
    counts = mask.sum(axis=tuple({0, 1, 2} - {axis}))
    return [float(part.sum()) / mask.size for part in np.array_split(counts, PARTS[axis])]


def _blocks(array: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """Means over blocks. Incomplete blocks are dropped, except along an axis that is shorter than one block."""
    sides = tuple(min(side, count) for side, count in zip(sides, array.shape, strict=True))
    whole = array[tuple(slice(0, count // side * side) for count, side in zip(array.shape, sides, strict=True))]
    d, h, w = (count // side for count, side in zip(whole.shape, sides, strict=True))
    blocks: np.ndarray = whole.reshape(d, sides[0], h, sides[1], w, sides[2]).mean(axis=(1, 3, 5), dtype=np.float32)
    return blocks


def _noise(voxels: np.ndarray, axis: int, low: float, high: float) -> float:
    """log(1 + median |a - 2 b + c|) over three neighbours along an axis in homogeneous soft tissue, in HU; 0 if there
    is none."""
    some = tuple(
        slice(None) if own == axis else slice(None, None, max(1, n // LINES)) for own, n in enumerate(voxels.shape)
    )
    line = _hu(np.moveaxis(voxels[some], axis, 0), low, high)
    if len(line) < 3:
        return 0.0
    even = (line > EVEN[0]) & (line < EVEN[1])
    places = np.flatnonzero(even[:-2] & even[1:-1] & even[2:])
    if not len(places):
        return 0.0
    plane, values = line[0].size, line.ravel()
    difference = values[places] - 2 * values[places + plane] + values[places + 2 * plane]
    return float(np.log1p(np.median(np.abs(difference))))
