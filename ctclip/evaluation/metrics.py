"""Metrics of scores against labels by scikit-learn's definitions, and their values in resamples of patients.

If a label has only one class, the value is NaN ("undefined"), never 0 or 0.5. Ranking metrics (AUROC, average
precision) use the uncalibrated score; all others use the probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctclip.evaluation.intervals import placements

RANKING = ("auroc", "average_precision")
METRICS = (*RANKING, "f1", "weighted_f1", "accuracy", "precision", "sensitivity", "specificity", "brier", "calibration_error")  # fmt: skip
BINS = 10


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Hanley & McNeil 1982). ``labels`` 0/1 (n,). NaN if there is only one
    class or a score is NaN. Raises ValueError for other labels, or a different number of scores.

    Equal to scikit-learn's ``roc_auc_score``, whose checks take 6 ms per call, too slow for the hundreds of calls of
    the shuffled control.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if labels.shape != scores.shape or labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"expected labels 0 or 1 and as many scores, found shapes {labels.shape} and {scores.shape}")
    positive = labels == 1
    if positive.all() or not positive.any() or np.isnan(scores).any():
        return float("nan")
    return float(placements(labels, scores)[positive].mean())


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Sum over thresholds of the recall gained times the precision there. NaN without a positive."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if np.any(labels == 1) else float("nan")


def mean_defined(values: Sequence[float] | np.ndarray) -> float:
    """Mean over the labels whose value is defined."""
    defined = np.asarray(values, dtype=float)
    return float(np.nanmean(defined)) if np.isfinite(defined).any() else float("nan")


def label_metrics(
    labels: np.ndarray, ranking: np.ndarray, probabilities: np.ndarray, threshold: float
) -> dict[str, float]:
    """``METRICS`` of one label (n,) of 0/1 without NaN; all NaN without a volume."""
    if len(labels) == 0:
        return dict.fromkeys(METRICS, float("nan"))
    return {
        "auroc": auroc(labels, ranking), "average_precision": average_precision(labels, ranking),
        **threshold_metrics(labels, probabilities, threshold),
        "brier": brier(labels, probabilities), "calibration_error": calibration_error(labels, probabilities),
    }  # fmt: skip


def bootstrap_auroc(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """AUROC of each label in each resample of the groups (patients), drawn with replacement.

    ``labels``, ``scores`` (n, L), NaN labels are ignored; ``groups`` (n,). Returns (resamples, L), NaN where undefined.
    """
    weights = bootstrap_weights(groups, resamples, seed)
    columns = []
    for label in range(labels.shape[1]):
        known = ~np.isnan(labels[:, label])
        columns.append(weighted_ranking(labels[known, label], scores[known, label], weights[:, known])["auroc"])
    return np.stack(columns, axis=1)


def bootstrap_metrics(
    labels: np.ndarray,
    ranking: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    thresholds: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every metric of each label in each resample of the groups (patients): name -> (resamples, L).

    ``labels``, ``ranking`` scores, ``probabilities`` (n, L), NaN labels are ignored; ``thresholds`` (L,). All metrics
    and labels use the same resamples.
    """
    weights = bootstrap_weights(groups, resamples, seed)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for label in range(labels.shape[1]):
        known = ~np.isnan(labels[:, label])
        truth, probability, drawn = labels[known, label], probabilities[known, label], weights[:, known]
        values = {
            **weighted_ranking(truth, ranking[known, label], drawn),
            **weighted_rates(truth, probability, thresholds[label], drawn),
            **weighted_errors(truth, probability, drawn),
        }
        for name, column in values.items():
            columns[name].append(column)
    return {name: np.stack(parts, axis=1) for name, parts in columns.items()}


def bootstrap_weights(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each volume's group was drawn: (resamples, n). Resampling patients is equivalent to weighting their
    volumes.

    With a single group there are no resamples (0, n), because nothing can be said about other patients.
    """
    names, member = np.unique(groups, return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples if len(names) > 1 else 0)
    return drawn[:, member].astype(np.float64)


def weighted_ranking(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision of one label (n,) 0/1 under each row of weights (R, n): each (R,)."""
    undefined = np.full(len(weights), np.nan)
    if not np.any(labels == 1):
        return dict.fromkeys(RANKING, undefined)
    # From the highest score down, one step per distinct score of a positive; other scores add no recall.
    order = np.argsort(-scores, kind="stable")
    descending, drawn = scores[order], weights[:, order]
    positive = np.flatnonzero(labels[order] == 1)
    steps, start = np.unique(-descending[positive], return_index=True)
    gained = np.add.reduceat(drawn[:, positive], start, axis=1)
    called = np.concatenate([np.zeros((len(drawn), 1)), np.cumsum(drawn, axis=1)], axis=1)
    above, through = (called[:, np.searchsorted(-descending, steps, side)] for side in ("left", "right"))
    hits = np.cumsum(gained, axis=1)
    positives, total = hits[:, -1], called[:, -1]
    tied = through - above - gained
    below = total[:, None] - positives[:, None] - (through - hits)
    return {
        "auroc": _ratio(np.sum(gained * (below + tied / 2), axis=1), positives * (total - positives), np.nan),
        "average_precision": _ratio(np.sum(gained * _ratio(hits, through), axis=1), positives, np.nan),
    }


def weighted_rates(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """``rates`` of one label (n,) 0/1 under each row of weights (R, n), called where probability >= threshold."""
    called, positive = probabilities >= threshold, labels == 1
    counts = (called & positive, called & ~positive, ~called & ~positive, ~called & positive)
    return rates(*(weights @ count.astype(float) for count in counts))


def weighted_errors(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Brier score and calibration error of one label (n,) 0/1 under each row of weights (R, n)."""
    total = weights.sum(axis=1)
    surplus = probabilities - labels
    bins = _bins(probabilities, BINS)
    gaps = [np.abs(weights[:, bins == one] @ surplus[bins == one]) for one in np.unique(bins)]
    return {
        "brier": _ratio(weights @ surplus**2, total, np.nan),
        "calibration_error": _ratio(np.sum(gaps, axis=0) * np.ones_like(total), total, np.nan),
    }


def rates(
    true_positive: np.ndarray, false_positive: np.ndarray, true_negative: np.ndarray, false_negative: np.ndarray
) -> dict[str, np.ndarray]:
    """F1, accuracy, precision, sensitivity and specificity of counts of any shape.

    Precision is 0 if nothing was called positive, as with scikit-learn's ``zero_division=0``. Without a positive, F1,
    precision and sensitivity are NaN (undefined); without a negative, specificity is. ``weighted_f1``: F1 of "present"
    and F1 of "absent", weighted by their frequency (scikit-learn's ``average="weighted"`` for one label). This is the
    F1 that CT-CLIP and its successors report; it is usually larger than ``f1``.
    """
    positive, negative = true_positive + false_negative, true_negative + false_positive
    wrong = false_positive + false_negative
    f1, absent_f1 = (_ratio(2 * right, 2 * right + wrong) for right in (true_positive, true_negative))
    defined = np.where(positive > 0, 1.0, np.nan)
    return {
        "f1": f1 * defined, "weighted_f1": _ratio(positive * f1 + negative * absent_f1, positive + negative, np.nan),
        "accuracy": _ratio(true_positive + true_negative, positive + negative, np.nan),
        "precision": _ratio(true_positive, true_positive + false_positive) * defined,
        "sensitivity": _ratio(true_positive, positive, np.nan), "specificity": _ratio(true_negative, negative, np.nan),
    }  # fmt: skip


def threshold_metrics(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float]:
    """``rates`` of labels (n,) 0/1, called positive where the probability is at or above the threshold."""
    values = weighted_rates(labels, probabilities, threshold, np.ones((1, len(labels))))
    return {name: float(value[0]) for name, value in values.items()}


def f1_averages(labels: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """Macro, micro and support-weighted F1 over ``labels`` (n, L) of 0, 1 and NaN (ignored)."""
    from sklearn.metrics import f1_score

    known = ~np.isnan(labels)
    each = [f1_score(labels[k, i] == 1, called[k, i], zero_division=0.0) if k.any() else 0.0 for i, k in enumerate(known.T)]  # fmt: skip
    support = (labels == 1).sum(axis=0)
    return {
        "macro": float(np.mean(each)),
        "micro": float(f1_score(labels[known] == 1, called[known], zero_division=0.0)) if known.any() else 0.0,
        "weighted": float(np.average(each, weights=support)) if support.sum() else 0.0,
    }


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared difference between probability and outcome (Brier 1950)."""
    return float(np.mean((probabilities - labels) ** 2))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error over equal-width bins (Naeini et al. 2015)."""
    predicted, observed, count = reliability(labels, probabilities, bins)
    return float(np.average(np.abs(predicted - observed), weights=count))


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, fraction of positives and number of volumes of each non-empty equal-width bin."""
    member = _bins(probabilities, bins)
    count = np.bincount(member, minlength=bins)
    used = count > 0
    predicted, observed = (np.bincount(member, values, bins)[used] / count[used] for values in (probabilities, labels))
    return predicted, observed, count[used]


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold (called: score >= threshold) of the ROC point nearest to sensitivity 1 and specificity 1; 0.5 if
    there is only one class."""
    candidates = np.unique(scores)
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if len(positive) == 0 or len(negative) == 0:
        return 0.5
    sensitivity = 1 - np.searchsorted(positive, candidates, side="left") / len(positive)
    false_rate = 1 - np.searchsorted(negative, candidates, side="left") / len(negative)
    return float(candidates[np.argmin((1 - sensitivity) ** 2 + false_rate**2)])


def published_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold as chosen by the evaluation scripts of CT-CLIP's successors: of 100 values from 0 to 1 (positive:
    score > value), the largest of those nearest to sensitivity 1 and specificity 1. Converted so that score >=
    threshold gives the same result."""
    grid = np.linspace(0, 1, 100)
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if len(positive) == 0 or len(negative) == 0:
        return 0.5
    sensitivity = 1 - np.searchsorted(positive, grid, side="right") / len(positive)
    false_rate = 1 - np.searchsorted(negative, grid, side="right") / len(negative)
    distance = np.sqrt((1 - sensitivity) ** 2 + false_rate**2)
    return float(np.nextafter(grid[len(grid) - 1 - np.argmin(distance[::-1])], np.inf))


def _bins(probabilities: np.ndarray, bins: int) -> np.ndarray:
    return np.clip((probabilities * bins).astype(int), 0, bins - 1)


def _ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """``part / whole``; ``empty`` where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), empty), where=np.asarray(whole) > 0)
