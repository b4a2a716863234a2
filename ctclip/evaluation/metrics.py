"""Metrics of scores against labels, with weights, so that a bootstrap is one pass over sorted scores.

Everything here takes arrays and equals scikit-learn's definitions; where a label has one class only the value is
NaN ("undefined"), never 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with the limits of its bootstrap interval."""

    value: float
    lower: float
    upper: float


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve, ties counted half (Hanley & McNeil 1982). labels 0/1 (n,); NaN if one class."""
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    order = np.argsort(scores, kind="stable")
    return float(_auroc_sorted(labels[order].astype(float), _ties(scores[order]), weights[order]))


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Sum over thresholds of the recall gained times the precision there. NaN without a positive."""
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    order = np.argsort(-scores, kind="stable")
    positive = np.cumsum(weights[order] * labels[order])
    everything = np.cumsum(weights[order])
    if positive[-1] <= 0:
        return float("nan")
    last = np.append(np.diff(scores[order]) != 0, True)
    recall = positive[last] / positive[-1]
    precision = positive[last] / everything[last]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def mean_defined(values: Sequence[float] | np.ndarray) -> float:
    """Mean over the labels whose value is defined."""
    defined = np.asarray(values, dtype=float)
    return float(np.nanmean(defined)) if np.isfinite(defined).any() else float("nan")


def bootstrap_auroc(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """AUROC of each label in each resample of the groups (patients), drawn with replacement.

    labels, scores (n, L), NaN labels left out; groups (n,). Returns (resamples, L), NaN where undefined.
    Resampling patients is weighting their volumes by how often the patient was drawn.
    """
    weights = bootstrap_weights(groups, resamples, seed)
    result = np.full((resamples, labels.shape[1]), np.nan)
    for label in range(labels.shape[1]):
        known = ~np.isnan(labels[:, label])
        order = np.flatnonzero(known)[np.argsort(scores[known, label], kind="stable")]
        result[:, label] = _auroc_many(
            labels[order, label].astype(float),
            _ties(scores[order, label]),
            np.ascontiguousarray(weights[:, order]),
        )
    return result


def bootstrap_weights(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, n): how often each row's group was drawn."""
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, member].astype(np.float64)


def interval(value: float, resampled: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval (Efron 1979) of a statistic's resampled values."""
    defined = resampled[np.isfinite(resampled)]
    if len(defined) == 0 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Confusion:
    """Counts of one label at one threshold, and what follows from them."""

    true_positive: float
    false_positive: float
    true_negative: float
    false_negative: float

    @property
    def accuracy(self) -> float:
        total = self.true_positive + self.false_positive + self.true_negative + self.false_negative
        return (self.true_positive + self.true_negative) / total

    @property
    def precision(self) -> float:
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def sensitivity(self) -> float:
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        return _ratio(self.true_negative, self.true_negative + self.false_positive)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)


def confusion(labels: np.ndarray, scores: np.ndarray, threshold: float) -> Confusion:
    """Counts with scores at or above ``threshold`` called positive."""
    called, positive = scores >= threshold, labels == 1
    return Confusion(
        float(np.sum(called & positive)), float(np.sum(called & ~positive)),
        float(np.sum(~called & ~positive)), float(np.sum(~called & positive)),
    )  # fmt: skip


def f1_averages(labels: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """Macro, micro and support-weighted F1 over labels (n, L) of 0/1."""
    hit = (called & (labels == 1)).sum(axis=0).astype(float)
    wrong = (called & (labels == 0)).sum(axis=0).astype(float)
    missed = (~called & (labels == 1)).sum(axis=0).astype(float)
    per_label = np.array([_ratio(2 * h, 2 * h + w + m) for h, w, m in zip(hit, wrong, missed, strict=True)])
    support = hit + missed
    return {
        "macro": float(per_label.mean()),
        "micro": _ratio(2 * hit.sum(), 2 * hit.sum() + wrong.sum() + missed.sum()),
        "weighted": float((per_label * support).sum() / support.sum()) if support.sum() else 0.0,
    }


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared distance of probability and outcome (Brier 1950)."""
    return float(np.mean((probabilities - labels) ** 2))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins (Naeini et al. 2015)."""
    which = np.clip((probabilities * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, probabilities, bins) - np.bincount(which, labels, bins))
    return float(gap[count > 0].sum() / len(labels))


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold of the ROC point nearest to perfect (sensitivity 1, specificity 1), as CT-CLIP picks it."""
    candidates = np.unique(scores)
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if len(positive) == 0 or len(negative) == 0:
        return 0.5
    sensitivity = 1 - np.searchsorted(positive, candidates, side="left") / len(positive)
    false_rate = 1 - np.searchsorted(negative, candidates, side="left") / len(negative)
    return float(candidates[np.argmin((1 - sensitivity) ** 2 + false_rate**2)])


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _ties(ascending: np.ndarray) -> np.ndarray:
    """For sorted scores, whether each begins a new value."""
    return np.append(True, np.diff(ascending) != 0)


@numba.njit(cache=True, nogil=True)
def _auroc_sorted(labels: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> float:
    below = 0.0
    area = 0.0
    tied_positive = 0.0
    tied_negative = 0.0
    positives = 0.0
    for i in range(len(labels)):
        if begins[i]:
            area += tied_positive * (below + tied_negative / 2)
            below += tied_negative
            tied_positive = 0.0
            tied_negative = 0.0
        if labels[i] > 0:
            tied_positive += weights[i]
            positives += weights[i]
        else:
            tied_negative += weights[i]
    area += tied_positive * (below + tied_negative / 2)
    below += tied_negative
    if positives <= 0 or below <= 0:
        return np.nan
    return area / (positives * below)


@numba.njit(cache=True, nogil=True)
def _auroc_many(labels: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    result = np.empty(weights.shape[0])
    for row in range(weights.shape[0]):
        result[row] = _auroc_sorted(labels, begins, weights[row])
    return result
