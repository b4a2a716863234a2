"""Metrics of scores against labels, with weights, so that a bootstrap is one pass over sorted scores.

Everything here takes arrays and equals scikit-learn's definitions; where a label has one class only the value is
NaN ("undefined"), never 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

METRICS = ("auroc", "average_precision", "f1", "weighted_f1", "accuracy", "precision", "sensitivity", "specificity", "brier", "calibration_error")  # fmt: skip


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


def bootstrap_metrics(
    labels: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    thresholds: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every metric of each label in each resample of the groups (patients): name -> (resamples, L).

    labels, scores (n, L), NaN labels left out; thresholds (L,). The same resamples serve every metric and label.
    """
    weights = bootstrap_weights(groups, resamples, seed)
    columns: dict[str, list[np.ndarray]] = {}
    for label in range(labels.shape[1]):
        known = np.flatnonzero(~np.isnan(labels[:, label]))
        if len(known) == 0:
            for name in METRICS:
                columns.setdefault(name, []).append(np.full(resamples, np.nan))
            continue
        order = known[np.argsort(scores[known, label], kind="stable")]
        truth, score = labels[order, label].astype(float), scores[order, label]
        drawn = np.ascontiguousarray(weights[:, order])
        begins = _ties(score)
        found = {"auroc": _auroc_many(truth, begins, drawn), "average_precision": _ap_many(truth, begins, drawn)}
        called = score >= thresholds[label]
        hit, wrong = drawn @ (called * truth), drawn @ (called * (1 - truth))
        missed, right = drawn @ (~called * truth), drawn @ (~called * (1 - truth))
        found |= rates(hit, wrong, right, missed)
        total = drawn.sum(axis=1)
        found["brier"] = drawn @ (score - truth) ** 2 / total
        which = np.clip((score * 10).astype(int), 0, 9)
        gaps = [np.abs(drawn[:, which == bin] @ (score - truth)[which == bin]) for bin in np.unique(which)]
        found["calibration_error"] = np.sum(gaps, axis=0) / total
        for name, column in found.items():
            columns.setdefault(name, []).append(column)
    return {name: np.stack(parts, axis=1) for name, parts in columns.items()}


def rates(hit: np.ndarray, wrong: np.ndarray, right: np.ndarray, missed: np.ndarray) -> dict[str, np.ndarray]:
    """F1, accuracy, precision, sensitivity and specificity of true positives, false positives, true negatives and
    false negatives (any shape); precision is 0 where nothing was called, as scikit-learn's ``zero_division=0``. Without a
    positive F1, precision and sensitivity are NaN (undefined), without a negative specificity.

    ``weighted_f1``: F1 of "present" and F1 of "absent", weighted by how many of each there are (scikit-learn's
    ``average="weighted"`` of one label): the F1 that CT-CLIP and its successors report, larger than ``f1`` as a rule.
    """

    def ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
        return np.divide(part, whole, out=np.full(np.shape(whole), empty), where=np.asarray(whole) > 0)

    positive, negative = hit + missed, right + wrong
    f1, absent_f1 = (ratio(2 * agreed, 2 * agreed + wrong + missed) for agreed in (hit, right))
    defined = np.where(positive > 0, 1.0, np.nan)
    return {
        "f1": f1 * defined, "weighted_f1": ratio(positive * f1 + negative * absent_f1, positive + negative, np.nan),
        "accuracy": ratio(hit + right, positive + negative, np.nan), "precision": ratio(hit, hit + wrong) * defined,
        "sensitivity": ratio(hit, positive, np.nan), "specificity": ratio(right, negative, np.nan),
    }  # fmt: skip


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


def every(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """``METRICS`` of one label (n,) of 0/1 without NaN; all NaN without a volume."""
    if len(labels) == 0:
        return dict.fromkeys(METRICS, float("nan"))
    return {
        "auroc": auroc(labels, scores), "average_precision": average_precision(labels, scores),
        **confusion(labels, scores, threshold),
        "brier": brier(labels, scores), "calibration_error": calibration_error(labels, scores),
    }  # fmt: skip


def confusion(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """``rates`` of labels (n,) 0/1 with scores at or above ``threshold`` called positive."""
    called, positive = scores >= threshold, labels == 1
    counts = (called & positive, called & ~positive, ~called & ~positive, ~called & positive)
    return {name: float(value) for name, value in rates(*(np.asarray(count.sum(), float) for count in counts)).items()}


def f1_averages(labels: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """Macro, micro and support-weighted F1 over labels (n, L) of 0, 1 and, left out, NaN."""
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
    predicted, observed, count = reliability(labels, probabilities, bins)
    return float((np.abs(predicted - observed) * count).sum() / count.sum())


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of positives and number of volumes of each equal-width bin that is not empty."""
    which = np.clip((probabilities * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    used = count > 0
    predicted, observed = (np.bincount(which, values, bins)[used] / count[used] for values in (probabilities, labels))
    return predicted, observed, count[used]


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold (called: score >= threshold) of the ROC point nearest to sensitivity 1 and specificity 1; 0.5 where
    there is one class only."""
    candidates = np.unique(scores)
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if len(positive) == 0 or len(negative) == 0:
        return 0.5
    sensitivity = 1 - np.searchsorted(positive, candidates, side="left") / len(positive)
    false_rate = 1 - np.searchsorted(negative, candidates, side="left") / len(negative)
    return float(candidates[np.argmin((1 - sensitivity) ** 2 + false_rate**2)])


def published_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """As the evaluation scripts of CT-CLIP's successors pick it: of 100 values from 0 to 1, called where score > value,
    the largest of those nearest to sensitivity 1 and specificity 1. Returned so that score >= threshold says the same."""
    grid = np.linspace(0, 1, 100)
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if len(positive) == 0 or len(negative) == 0:
        return 0.5
    sensitivity = 1 - np.searchsorted(positive, grid, side="right") / len(positive)
    false_rate = 1 - np.searchsorted(negative, grid, side="right") / len(negative)
    distance = np.sqrt((1 - sensitivity) ** 2 + false_rate**2)
    return float(np.nextafter(grid[len(grid) - 1 - np.argmin(distance[::-1])], np.inf))


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
def _ap_many(labels: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    result = np.empty(weights.shape[0])
    for row in range(weights.shape[0]):
        total = 0.0
        for i in range(len(labels)):
            total += weights[row, i] * labels[i]
        if total <= 0:
            result[row] = np.nan
            continue
        area = gained = positive = everything = 0.0
        # From the highest score down; a threshold ends where a new value begins.
        for i in range(len(labels) - 1, -1, -1):
            gained += weights[row, i] * labels[i]
            everything += weights[row, i]
            if begins[i]:
                positive += gained
                if everything > 0:
                    area += gained / total * positive / everything
                gained = 0.0
        result[row] = area
    return result


@numba.njit(cache=True, nogil=True)
def _auroc_many(labels: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    result = np.empty(weights.shape[0])
    for row in range(weights.shape[0]):
        result[row] = _auroc_sorted(labels, begins, weights[row])
    return result
