"""Find what a text describes: regions of its map, each with a score, a position and a size.

Regions are the connected components of the map of the text, so no list of classes is needed. This is the idea of ViLD
(Gu et al. 2022), with regions of the map instead of a trained proposal network. The model cannot measure: a size that
the text states ("larger than 10 mm") is applied to the regions.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.errors import ExplanationError
from ctclip.explanation.explain import FACTS, MASK, NOTE, Explanation, explain, write_nifti
from ctclip.explanation.place import LEVEL, Region, regions_of
from ctclip.explanation.space import in_scan
from ctclip.heads.head import Head
from ctclip.heads.locator import Locator
from ctclip.heads.prompts import PromptHead
from ctclip.heads.text import TextHead
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.pipeline import Prepared
from ctclip.report_reading.absence import states_absence

NUMBER = r"(?<![\w.,+-])(\d+(?:[.,]\d+)?)"
UNIT = r"\s*(mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)\b"
LARGER, SMALLER = "larger|bigger|greater|more|longer", "smaller|less|shorter"
# Each matches one way of stating limits; groups hold the numbers with their units.
BETWEEN = re.compile(rf"\bbetween\s+{NUMBER}(?:{UNIT})?\s+and\s+{NUMBER}{UNIT}", re.IGNORECASE)
RANGE = re.compile(rf"(?:\bfrom\s+)?{NUMBER}(?:{UNIT})?\s*(?:-|–|\bto\b)\s*(\d+(?:[.,]\d+)?){UNIT}", re.IGNORECASE)


def _limit(comparatives: str, opposite: str, others: str, signs: str) -> re.Pattern[str]:
    """A pattern of a limit on one side; ``opposite``: the comparatives of the other side, which "no" turns round."""
    before = rf"\b(?:(?:{comparatives})(?:\s+than)?|{others}|not?\s+(?:{opposite})\s+than)\s|[{signs}]=?"
    return re.compile(rf"(?:{before})\s*{NUMBER}{UNIT}|{NUMBER}{UNIT}\s+or\s+(?:{comparatives})\b", re.IGNORECASE)


AT_LEAST = _limit(LARGER, SMALLER, r"over|above|(?:of\s+)?at\s+least", ">≥")
AT_MOST = _limit(SMALLER, LARGER, r"under|below|(?:of\s+)?at\s+most|up\s+to", "<≤")
OTHER = re.compile(rf"\d+(?:[.,]\d+)?{UNIT}", re.IGNORECASE)


def contrast_texts(head: Head) -> list[str]:
    """Texts to contrast a query with: one positive and one negative prompt for each finding of a prompt head; none for
    other heads."""
    if not isinstance(head, PromptHead):
        return []
    sides = [head.prompts.groups(name, positive) for name in head.names for positive in (True, False)]
    return [phrasings[0] for groups in sides for phrasings in groups if phrasings]


@dataclass(frozen=True)
class SizeLimit:
    """Limits in mm for the longest side of a region."""

    low: float = 0.0
    high: float = float("inf")

    def holds(self, region: Region) -> bool:
        return self.low <= max(region.size_mm) <= self.high


def size_limit(text: str) -> tuple[str, SizeLimit]:
    """Split a text into the text without its size and the size in mm. Raises ExplanationError for a size that is not a
    limit, such as "a 7 mm nodule", and for limits that no size fulfils.

    >>> size_limit("a nodule larger than 1 cm")
    ('a nodule', SizeLimit(low=10.0, high=inf))
    """
    rest, low, high = text, 0.0, float("inf")
    for pattern, is_low, is_high in (
        (BETWEEN, True, True), (RANGE, True, True), (AT_MOST, False, True), (AT_LEAST, True, False)
    ):  # fmt: skip
        for match in pattern.finditer(rest):
            numbers = _millimetres([part for part in match.groups() if part])
            low = max(low, numbers[0]) if is_low else low
            high = min(high, numbers[-1]) if is_high else high
        rest = pattern.sub(" ", rest)
    if (unused := OTHER.search(rest)) is not None:
        raise ExplanationError(
            f"{text[:80]!r}: {unused[0]!r} is not a limit; write for example 'larger than 5 mm', 'at most 2 cm' or "
            f"'between 5 and 10 mm'"
        )
    if low > high:
        raise ExplanationError(f"{text[:80]!r}: no size is at least {low:g} mm and at most {high:g} mm")
    rest = " ".join(rest.split()).strip(" ,;")
    return rest or text, SizeLimit(low, high)


def _millimetres(parts: list[str]) -> list[float]:
    """Numbers, each with the next unit, in mm."""
    sizes: list[float] = []
    factor = 1
    for part in reversed(parts):
        if part[0].isalpha():
            factor = 10 if part.lower().startswith("c") else 1
        else:
            sizes.insert(0, float(part.replace(",", ".")) * factor)
    return sizes


def proposals(
    values: np.ndarray, affine: np.ndarray, prepared: Prepared, level: float, limit: SizeLimit, most: int
) -> list[Region]:
    """At most ``most`` regions of a map within the size limits, sorted by their peak value, highest first."""
    return [region for region in regions_of(values, affine, prepared, level) if limit.holds(region)][:most]


def box_facts(region: Region, affine: np.ndarray, prepared: Prepared) -> dict[str, Any]:
    """A region for JSON: its peak in mm (LPS) and as a voxel of the file, its size and its height."""
    lps = (prepared.token_affine(affine) @ [*region.peak, 1])[:3]
    voxel = np.rint((np.linalg.inv(prepared.file_grid.affine) @ [*lps, 1])[:3]).astype(int)
    across, deep, high = region.size_mm
    return {
        "peak_mm_lps": [round(float(value), 1) for value in lps],
        "peak_voxel_column_row_slice": [int(value) for value in voxel[::-1]],
        "size_mm_right_left": round(across, 1), "size_mm_front_back": round(deep, 1), "size_mm_foot_head": round(high, 1),
        "volume_ml": round(region.volume_ml, 1), "score": round(region.height, 4),
    }  # fmt: skip


def refine(values: np.ndarray, affine: np.ndarray, prepared: Prepared, *, inside: float = 0.8, outside: float = 0.2) -> np.ndarray:  # fmt: skip
    """The region of a map, grown to the edges in the HU image: bool on the model's grid.

    Watershed on the gradient of HU (Beucher and Lantuejoul 1979) from two seeds: voxels at or above ``inside`` of the
    peak of the map, and voxels below ``outside``. MedCLIP-SAM (Koleilat et al. 2024) prompts a segmentation model with
    the map instead.
    """
    from scipy import ndimage

    hu = ndimage.gaussian_filter(np.clip(prepared.hu, -1000, 400), 0.6)
    share = in_scan(values, affine, prepared, hu.shape, prepared.affine)
    share = share / max(float(share.max()), 1e-12)
    spacing = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    slope = np.sqrt(sum((part / mm) ** 2 for part, mm in zip(np.gradient(hu), spacing, strict=True)))
    seeds = np.zeros(hu.shape, np.int32)
    seeds[share >= inside] = 1
    seeds[share < outside] = 2
    # scipy's watershed needs integers.
    steps = np.clip(slope / max(float(np.quantile(slope, 0.995)), 1e-6) * 65535, 0, 65535).astype(np.uint16)
    grown: np.ndarray = ndimage.watershed_ift(steps, seeds) == 1
    return grown


@dataclass(frozen=True)
class Found:
    """Regions of one scan that a text describes, the highest first; ``explanation`` holds the map. Prints as a list."""

    text: str
    limit: SizeLimit
    regions: list[Region]
    explanation: Explanation

    @property
    def _place(self) -> Any:
        return next(iter(self.explanation.places.values()))

    def facts(self) -> list[dict[str, Any]]:
        """The regions for JSON."""
        return [box_facts(region, self._place.affine, self._place.prepared) for region in self.regions]

    def __str__(self) -> str:
        lines = [f"{self.explanation.scan}: {self.text!r}, {len(self.regions)} regions ({NOTE})"]
        for number, facts in enumerate(self.facts(), start=1):
            x, y, z = facts["peak_mm_lps"]
            sizes = " x ".join(f"{facts[f'size_mm_{name}']:.0f}" for name in ("right_left", "front_back", "foot_head"))
            lines.append(f"{number}. ({x:.0f}, {y:.0f}, {z:.0f}) mm LPS, {sizes} mm, score {facts['score']:.2f}")
        if self.limit != SizeLimit():
            lines.append(f"kept: regions with a longest side of {self.limit.low:g} to {self.limit.high:g} mm")
        return "\n".join(lines)

    __repr__ = __str__

    def mask(self, refined: bool = False) -> np.ndarray:
        """The number of each voxel's region, 0 for none: uint8 [slice, row, column] on the file's grid.

        ``refined``: grow each region to the edges in the HU image.
        """
        from scipy import ndimage

        place = self._place
        grid = place.prepared.file_grid
        if refined:
            grown = refine(place.values, place.affine, place.prepared).astype(np.float32)
            # A mask on the model's grid is resampled like a map; its affine maps to mm of the prepared volume.
            spaced = np.linalg.inv(place.prepared.token_affine(np.eye(4))) @ place.prepared.affine
            share = in_scan(grown, spaced, place.prepared, grid.shape, grid.affine)
        else:
            share = place.map() / max(place.height, 1e-12)
        labels, _ = ndimage.label(share >= (0.5 if refined else place.level))
        mask = np.zeros(grid.shape, np.uint8)
        for number, facts in enumerate(self.facts(), start=1):
            at = np.clip(np.array(facts["peak_voxel_column_row_slice"][::-1]), 0, np.array(grid.shape) - 1)
            if labels[tuple(at)]:
                mask[labels == labels[tuple(at)]] = number
        return mask

    def save(self, folder: str | Path, *, refined: bool = False) -> Path:
        """Write the files of ``Explanation.save``, with the regions in the mask and in ``findings.json``."""
        return self.explanation.save(folder, lambda partial: self._write(partial, refined))

    def _write(self, folder: Path, refined: bool) -> None:
        grid = self._place.prepared.file_grid
        names = {str(number): f"region {number}" for number in range(1, len(self.regions) + 1)}
        write_nifti(folder / MASK, self.mask(refined), grid, {"labels": names})
        kept = plain_json.read(folder / FACTS)
        facts = {**kept, "text": self.text, "refined": refined, "regions": self.facts()}
        write_text(folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False))


def find(
    model: DualEncoder,
    prepared: Prepared,
    text: str,
    others: Sequence[str],
    *,
    scan: str,
    model_hash: str,
    by: str = "similarity",
    level: float = LEVEL,
    most: int = 5,
    budget: int = 600,
    shifts: int | None = None,
    locator: Locator | None = None,
    warnings: Sequence[str] = (),
) -> Found:
    """Find what ``text`` describes in a prepared scan; ``others``: texts to contrast it with. See ``explain``."""
    if not isinstance(text, str) or not text.strip():
        raise ExplanationError(f"expected a text, found {reprlib.repr(text)}")
    if isinstance(most, bool) or not isinstance(most, Integral) or most < 1:
        raise ExplanationError(f"most={reprlib.repr(most)}: give a positive whole number")
    wanted, limit = size_limit(text)
    if states_absence(wanted):
        raise ExplanationError(f"{text[:80]!r}: states an absence, which has no place; describe what is to be found")
    head = TextHead(model, [wanted], others)
    explained = explain(
        model, head, prepared, [wanted], scan=scan, model_hash=model_hash, by=by, level=level, budget=budget,
        shifts=shifts, locator=locator, warnings=warnings,
    )  # fmt: skip
    place = explained[wanted]
    return Found(text, limit, proposals(place.values, place.affine, prepared, level, limit, most), explained)
