"""Separate acquisitions within one series: several kernels, phases, passes or patients under one SeriesInstanceUID.

Slices with different size, pixel spacing, orientation, patient, study or frame of reference never belong to one volume.
Slices that differ in an attribute of acquisition or reconstruction form separate groups if their ranges of position
overlap; consecutive blocks form one volume. Of several groups, the best by the following criteria, in this order, is
used, with a warning: at least half as many positions as the largest group; values in HU; original, not derived; axial;
most positions; acquired first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np

from ctclip.preprocessing.dicom.headers import ACQUISITION
from ctclip.preprocessing.dicom.kinds import alteration, in_hu
from ctclip.preprocessing.dicom.slices import Slice
from ctclip.preprocessing.errors import counted, were

IDENTITY = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
SAME_GEOMETRY = 1e-3
SAME_PLACE = 1e-3
# Fewer slices than this are stray slices, not an acquisition.
FEWEST = 3
# Consecutive blocks may overlap by this fraction of the shorter one.
SEAM = 0.1
HOLE = 0.75


def best(slices: list[Slice], warnings: list[str]) -> list[Slice]:
    """The slices of the best acquisition by the rules of this module; ``warnings`` list the slices left out."""
    if len(slices) < FEWEST:
        return slices
    chosen, reasons = _apart(slices)
    if reasons:
        count = len(slices) - len(chosen)
        warnings.append(f"{counted(count, 'slice')} with another {' and '.join(reasons)} {were(count)} left out")
    depth = depths(chosen)
    names, labels = _acquisitions(chosen, depth)
    if not names:
        return chosen
    parts = _parts(labels)
    first = min(parts, key=lambda part: _rank([chosen[i] for i in part], max(map(len, parts))))
    taken, trimmed = _with_its_blocks(first, parts, depth)
    left = [i for i in range(len(chosen)) if i not in taken]
    strays = [i for part in parts if len(part) < FEWEST for i in part if i in left]
    filling = _filling_holes(depth, taken, strays)
    differ = ", ".join(names)
    if filling:
        warnings.append(
            f"slices differ in {differ}: {len(filling)} of them {were(len(filling))} kept because they fill gaps"
        )
    if len(left) > len(filling):
        count = len(left) - len(filling)
        several = sum(len(part) >= FEWEST for part in parts) > 1 and not trimmed
        warnings.append(
            f"the series holds several acquisitions or reconstructions, which differ in {differ}: used "
            f"{len(taken) + len(filling)} of {len(chosen)} slices, those of the best one"
            if several
            else f"{counted(count, 'slice')} with another {differ} {'overlaps' if count == 1 else 'overlap'} the others and {were(count)} left out"
        )
    return [chosen[i] for i in sorted({*taken, *filling})]


def positions(slices: Sequence[Slice]) -> int:
    """The number of distinct positions of slices along their normal."""
    return 0 if not slices else len(np.unique(np.round(depths(slices) / 0.01)))


def depths(slices: Sequence[Slice]) -> np.ndarray:
    """Position in mm (n,) of each slice along the normal of the first."""
    normal = slices[0].normal
    return np.array([member.place for member in slices]) @ normal


def _apart(slices: list[Slice]) -> tuple[list[Slice], list[str]]:
    """The best of the groups that differ in geometry or identity, and the attributes in which the others differ from
    it."""
    # Identifiers that differ between all slices are artefacts of de-identification.
    identity = [word for word in IDENTITY if len({_text(member, word) for member in slices}) <= len(slices) / 2]
    labels = _codes([(member.shape, *(_text(member, word) for word in identity)) for member in slices])
    spacings, turns = (np.array([getattr(member, word) for member in slices]) for word in ("spacing", "turn"))
    clusters: list[list[Slice]] = []
    rest = np.arange(len(slices))
    while len(rest):
        first = rest[0]
        alike = labels[rest] == labels[first]
        alike &= np.abs(spacings[rest] / spacings[first] - 1).max(axis=1) <= SAME_GEOMETRY
        alike &= np.abs(turns[rest] - turns[first]).max(axis=1) <= SAME_GEOMETRY
        clusters.append([slices[i] for i in rest[alike]])
        rest = rest[~alike]
    largest = max(map(len, clusters))
    chosen = min(clusters, key=lambda cluster: _rank(cluster, largest))
    others = [
        word for cluster in clusters if cluster is not chosen for word in _differences(chosen[0], cluster[0], identity)
    ]
    return chosen, list(dict.fromkeys(others))


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    """Integer codes (n,) of labels."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def _differences(one: Slice, other: Slice, identity: list[str]) -> list[str]:
    """Attributes in which two slices differ, although slices of a volume share them."""
    words = []
    if one.shape != other.shape:
        words.append("size (Rows, Columns)")
    if np.abs(np.array(one.spacing) / other.spacing - 1).max() > SAME_GEOMETRY:
        words.append("PixelSpacing")
    if np.abs(one.turn - other.turn).max() > SAME_GEOMETRY:
        words.append("ImageOrientationPatient")
    return words + [word for word in identity if _text(one, word) != _text(other, word)]


def _text(member: Slice, keyword: str) -> str:
    return str(member.image.header.get(keyword, "") or "")


def _acquisitions(slices: list[Slice], depth: np.ndarray) -> tuple[list[str], list[Hashable]]:
    """The attributes that divide slices into overlapping groups, and the group of each slice."""
    names: list[str] = []
    labels: list[Hashable] = [()] * len(slices)
    for keyword in ACQUISITION:
        values = [_label(member.image.header.get(keyword, None)) for member in slices]
        if _overlapping(depth, values):
            names.append(keyword)
            labels = list(zip(labels, values, strict=True))
    if len({member.image.path for member in slices}) < len(slices):
        files: list[Hashable] = [str(member.image.path) for member in slices]
        if _overlapping(depth, files):
            names.append("file")
            labels = list(zip(labels, files, strict=True))
    passes: list[Hashable] = list(zip(labels, _passes(slices, depth, labels), strict=True))
    if len(set(passes)) > len(set(labels)):
        names.append("order of InstanceNumber")
        labels = passes
    return names, labels


def _overlapping(depth: np.ndarray, labels: Sequence[Hashable]) -> bool:
    """Whether labels, other than those of single slices, divide depths into overlapping ranges."""
    parts = _parts(labels)
    if not 1 < len(parts) <= len(labels) / FEWEST:
        return False
    ranges = sorted((depth[part].min(), depth[part].max()) for part in parts)
    highest = ranges[0][1]
    for low, high in ranges[1:]:
        if low < highest + SAME_PLACE:
            return True
        highest = max(highest, high)
    return False


def _passes(slices: list[Slice], depth: np.ndarray, labels: Sequence[Hashable]) -> list[int]:
    """The pass along the patient that each slice belongs to, by InstanceNumber, which runs in one direction within a
    volume."""
    passes = [0] * len(slices)
    for part in _parts(labels):
        stated = (_integer(slices[i].image.header.get("InstanceNumber", None)) for i in part)
        numbers = [number for number in stated if number is not None]
        if len(set(numbers)) < len(part) or len(part) < 2 * FEWEST:
            continue
        order = [part[i] for i in np.argsort(numbers)]
        run, direction, run_of = 0, 0, {order[0]: 0}
        steps = [int(np.sign(round(depth[b] - depth[a], 3))) for a, b in pairwise(order)]
        for place, (index, step) in enumerate(zip(order[1:], steps, strict=True)):
            onward = step or next((later for later in steps[place + 1 :] if later), 0)
            if direction and onward == -direction:
                # A returning pass turns at this slice; a repeated pass begins with it.
                run, direction = run + 1, onward if step == 0 else 0
            else:
                direction = direction or step
            run_of[index] = run
        runs = np.array([run_of[i] for i in part])
        if np.bincount(runs).min() >= FEWEST and _overlapping(depth[part], list(runs)):
            for i in part:
                passes[i] = run_of[i]
    return passes


def _label(value: object) -> Hashable:
    """A normalised value for comparison: 2.5 and 2.50 are the same thickness."""
    try:
        return float(str(value))
    except ValueError:
        return str(value or "").strip()


def _parts(labels: Sequence[Hashable]) -> list[list[int]]:
    parts: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        parts.setdefault(label, []).append(index)
    return list(parts.values())


def _with_its_blocks(first: list[int], parts: list[list[int]], depth: np.ndarray) -> tuple[set[int], bool]:
    """A part with the following parts that do not overlap it (except at a seam, which is trimmed), and whether there
    are any."""
    taken, trimmed = set(first), False
    for part in sorted((part for part in parts if part is not first and len(part) >= FEWEST), key=len, reverse=True):
        covered = depth[sorted(taken)]
        low, high = covered.min() - SAME_PLACE, covered.max() + SAME_PLACE
        outside = [i for i in part if not low <= depth[i] <= high]
        if len(outside) >= (1 - SEAM) * len(part) and outside:
            taken |= set(outside)
            trimmed |= len(outside) < len(part)
    return taken, trimmed


def _filling_holes(depth: np.ndarray, taken: set[int], strays: list[int]) -> set[int]:
    """Stray slices that fill a gap of the chosen slices, instead of lying between two neighbours."""
    covered = np.unique(depth[sorted(taken)])
    if len(covered) < FEWEST:
        return set()
    usual = float(np.median(np.diff(covered)))
    return {i for i in strays if np.abs(covered - depth[i]).min() > HOLE * usual}


def _rank(group: list[Slice], largest: int) -> tuple[bool, bool, int, bool, int, tuple[float, ...]]:
    """Rank of a group, smaller is better; see the top of this file."""
    count = positions(group)
    header = group[0].image.header
    first = min(
        tuple(
            float("inf") if (value := _integer(member.image.header.get(word, None))) is None else float(value)
            for word in ("SeriesNumber", "AcquisitionNumber", "InstanceNumber")
        )
        for member in group
    )
    axial = abs(group[0].normal[2]) > 0.7
    return 2 * count < largest, not in_hu(header), alteration(header), not axial, -count, first


def _integer(value: object) -> int | None:
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError):
        return None
