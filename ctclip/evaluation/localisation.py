"""Score maps against masks, per finding, with intervals by patient.

A map is compared with a mask by two histograms of its values, inside and outside of the mask, in steps of 1/255 of the
map's peak. AUROC, average precision and Dice at every threshold follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctclip.evaluation.intervals import FEWEST_PATIENTS, percentile_interval
from ctclip.evaluation.metrics import bootstrap_weights

BINS = 256
# ReXGroundingCT counts a finding as a hit at this Dice or above (Baharoon et al. 2025).
HIT_DICE = 0.1
FALSE_POSITIVES = (0.5, 1.0, 2.0, 4.0)
FIGURES = ("pointing", "distance_mm", "auroc", "average_precision", "dice", "hit")


@dataclass(frozen=True)
class Candidate:
    """A local maximum of a map: its value, and the number of the lesion (component of the mask) that contains it; 0:
    none."""

    value: float
    lesion: int


@dataclass(frozen=True)
class Pair:
    """One map compared with one mask. ``distance_mm``: distance from the map's peak to the nearest voxel of the mask, 0
    inside; ``inside`` and ``outside`` (256,): histograms of the map's values in the mask and elsewhere, from 0 to the
    peak."""

    patient: str
    distance_mm: float
    inside: np.ndarray
    outside: np.ndarray


def histograms(share: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``share``: the map divided by its peak, any shape; ``mask``: bool of the same shape -> histograms ``inside`` and
    ``outside`` (256,)."""
    steps = np.rint(np.clip(share, 0, 1) * (BINS - 1)).astype(np.uint8)
    every = np.bincount(steps.ravel(), minlength=BINS)
    inside = np.bincount(steps[mask], minlength=BINS)
    return inside, every - inside


def voxel_auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under the ROC curve of voxels, ties counted half (Hanley and McNeil 1982); NaN if one class is empty."""
    positives, negatives = inside.sum(), outside.sum()
    if positives == 0 or negatives == 0:
        return float("nan")
    below = np.cumsum(outside) - outside
    return float(np.sum(inside * (below + outside / 2)) / (positives * negatives))


def voxel_average_precision(inside: np.ndarray, outside: np.ndarray) -> float:
    """Sum over thresholds of the recall gained times the precision there; NaN without a voxel inside."""
    if inside.sum() == 0:
        return float("nan")
    gained, called = inside[::-1], np.cumsum((inside + outside)[::-1])
    precision = np.divide(np.cumsum(gained), called, out=np.zeros(len(called)), where=called > 0)
    return float(np.sum(gained * precision) / inside.sum())


def dice_at(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Dice (1945) of the mask and the voxels at or above each value: (256,)."""
    hits = np.cumsum(inside[::-1])[::-1]
    called = np.cumsum((inside + outside)[::-1])[::-1]
    return 2 * hits / np.maximum(1, inside.sum() + called)


def thresholds_of_others(pairs: Sequence[Pair]) -> np.ndarray:
    """Threshold bins (pairs,). Each half of the patients gets the threshold with the best mean Dice in the other half,
    so that no threshold is chosen on the patient it is applied to."""
    patients = np.array([pair.patient for pair in pairs])
    second = np.isin(patients, np.unique(patients)[1::2])
    dice = np.array([dice_at(pair.inside, pair.outside) for pair in pairs])
    chosen = np.full(len(pairs), BINS // 2)
    for half in (second, ~second):
        if half.any() and (~half).any():
            # Bin 0 would include every voxel.
            chosen[half] = 1 + int(dice[~half].mean(axis=0)[1:].argmax())
    return chosen


def figures(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Each of ``FIGURES``, one value per pair."""
    chosen = thresholds_of_others(pairs)
    dice = np.array([dice_at(pair.inside, pair.outside)[at] for pair, at in zip(pairs, chosen, strict=True)])
    distance = np.array([pair.distance_mm for pair in pairs])
    return {
        "pointing": (distance == 0).astype(float),
        "distance_mm": distance,
        "auroc": np.array([voxel_auroc(pair.inside, pair.outside) for pair in pairs]),
        "average_precision": np.array([voxel_average_precision(pair.inside, pair.outside) for pair in pairs]),
        "dice": dice,
        "hit": (dice >= HIT_DICE).astype(float),
    }


def summary(pairs: Sequence[Pair], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean of each figure (median for ``distance_mm``) with the percentile interval of a bootstrap by patient."""
    patients = np.array([pair.patient for pair in pairs])
    weights = bootstrap_weights(patients, resamples, seed)
    trusted = len(np.unique(patients)) >= FEWEST_PATIENTS
    result: dict[str, Any] = {"scans": len(pairs), "patients": len(np.unique(patients)), "interval_trusted": trusted}
    for name, values in figures(pairs).items():
        known = np.isfinite(values)
        if name == "distance_mm":
            result[name] = {"value": float(np.median(values))}
            continue
        total = weights[:, known].sum(axis=1)
        means = np.divide(weights[:, known] @ values[known], total, out=np.full(len(total), np.nan), where=total > 0)
        value = float(values[known].mean()) if known.any() else float("nan")
        limits = percentile_interval(value, means, trusted=trusted)
        result[name] = {"value": value, "lower": limits.lower, "upper": limits.upper}
    return result


def free_response(
    candidates: Sequence[Sequence[Candidate]], lesions: Sequence[int], at: Sequence[float] = FALSE_POSITIVES
) -> dict[str, float]:
    """Sensitivity to lesions at given numbers of false positives per scan (Bunch et al. 1978; ties count against the
    model).

    ``candidates``: those of every scan, including scans without the finding; ``lesions``: number of lesions in each
    scan.
    """
    total = sum(lesions)
    rows = sorted(
        ((one.value, one.lesion > 0, (scan, one.lesion)) for scan, every in enumerate(candidates) for one in every),
        key=lambda row: (-row[0], row[1]),
    )
    hit: set[tuple[int, int]] = set()
    false, curve = 0, [(0.0, 0.0)]
    for _, right, lesion in rows:
        if right:
            hit.add(lesion)
        else:
            false += 1
        curve.append((false / max(1, len(candidates)), len(hit) / max(1, total)))
    return {
        f"{limit:g}": max(sensitivity for rate, sensitivity in curve if rate <= limit) if total else float("nan")
        for limit in at
    }


def mean_over(findings: Mapping[str, Mapping[str, Any]], figure: str) -> float:
    """Mean of a figure over the findings that have a value."""
    values = [entry[figure]["value"] for entry in findings.values() if np.isfinite(entry[figure]["value"])]
    return float(np.mean(values)) if values else float("nan")
