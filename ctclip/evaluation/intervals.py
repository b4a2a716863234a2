"""Confidence intervals of an AUROC that keep their nominal coverage with few positives and several volumes per
patient.

The percentile bootstrap by patient does not: with 10 positive patients and an AUROC of 0.96, the coverage of its 95 %
interval is 0.8 (``python -m tests.benchmarks.coverage``). There are two reasons: it uses the normal quantile, and the
variance is underestimated when the estimate is too high.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
FEWEST_PATIENTS = 10
EDGE = 1e-9


@dataclass(frozen=True)
class Interval:
    """A value and its limits. ``trusted``: whether there are enough positive and negative patients for the nominal
    coverage."""

    value: float
    lower: float
    upper: float
    trusted: bool = True


def patients_by_class(labels: np.ndarray, patients: np.ndarray) -> tuple[int, int]:
    """Number of patients with a positive volume, and with a negative one (one patient may have both)."""
    return len(np.unique(patients[labels == 1])), len(np.unique(patients[labels == 0]))


def enough_patients(labels: np.ndarray, patients: np.ndarray) -> bool:
    """Whether an interval of this label can be trusted: at least ten positive and ten negative patients."""
    return min(patients_by_class(labels, patients)) >= FEWEST_PATIENTS


def placements(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For each positive volume the fraction of negatives below it, for each negative the fraction of positives above
    it: (n,).

    Ties count half. The mean over either class is the AUROC; these are the structural components of DeLong et al. (1988).
    labels (n,) 0/1 with both classes; scores (n,).
    """
    positive = labels == 1
    values = np.empty(len(scores))
    values[positive] = _share_below(scores[positive], scores[~positive])
    values[~positive] = 1 - _share_below(scores[~positive], scores[positive])
    return values


def auroc_variance(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> float:
    """Variance of the AUROC for patients with several correlated volumes (Obuchowski 1997, eq. 3-6).

    ``labels`` (n,) 0/1, ``scores`` (n,), ``patients`` (n,). It equals DeLong's variance if every patient has one
    volume. NaN with fewer than two positive or two negative patients.
    """
    positives, negatives = patients_by_class(labels, patients)
    if min(positives, negatives) < 2:
        return float("nan")
    names, member = np.unique(patients, return_inverse=True)
    positive = labels == 1
    deviation = placements(labels, scores)
    deviation = deviation - deviation[positive].mean()
    count = len(names)
    of_positives = np.bincount(member[positive], deviation[positive], count) / positive.sum()
    of_negatives = np.bincount(member[~positive], deviation[~positive], count) / (~positive).sum()
    return float(
        positives / (positives - 1) * np.sum(of_positives**2)
        + negatives / (negatives - 1) * np.sum(of_negatives**2)
        + 2 * count / (count - 1) * np.sum(of_positives * of_negatives)
    )


def two_normals_variance(auroc: float, positives: int, negatives: int) -> float:
    """Variance of the AUROC of independent scores from two normal distributions with equal variance.

    Bamber's (1975) formula, in which the probability that one positive is above two negatives is a bivariate normal
    integral, computed with Owen's T (1956).
    """
    from scipy.special import ndtri, owens_t

    both = auroc - 2 * owens_t(ndtri(auroc), 1 / np.sqrt(3)) - auroc**2
    return float((auroc * (1 - auroc) + (positives + negatives - 2) * both) / (positives * negatives))


def auroc_interval(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, *, level: float = LEVEL) -> Interval:
    """Interval of the AUROC of one label. labels (n,) 0/1, scores (n,), patients (n,).

    The limits solve |observed - area| = t * sd(area), where the variance is a function of the unknown area and not of
    the estimate (Wilson 1927; for the AUROC Newcombe 2006). That function is ``two_normals_variance`` for the given
    numbers of patients, scaled up to Obuchowski's variance of the scores if that is larger. t is Student's quantile
    with one degree of freedom less than the smaller number of patients. The limits are NaN with fewer than two positive
    or two negative patients.
    """
    from scipy.optimize import (
        brentq,
    )  # imported here, because training computes the AUROC and should not wait for SciPy
    from scipy.stats import t as student

    positives, negatives = patients_by_class(labels, patients)
    if min(positives, negatives) < 1:
        return Interval(float("nan"), float("nan"), float("nan"), trusted=False)
    value = float(placements(labels, scores)[labels == 1].mean())
    if min(positives, negatives) < 2:
        return Interval(value, float("nan"), float("nan"), trusted=False)
    expected = two_normals_variance(value, positives, negatives)
    scale = max(1.0, auroc_variance(labels, scores, patients) / expected) if 0 < value < 1 else 1.0
    quantile = student.ppf((1 + level) / 2, min(positives, negatives) - 1)

    def excess(area: float) -> float:
        return (value - area) ** 2 - quantile**2 * scale * two_normals_variance(area, positives, negatives)

    lower = brentq(excess, 0, min(value, 1 - EDGE)) if value > 0 else 0.0
    upper = brentq(excess, max(value, EDGE), 1) if value < 1 else 1.0
    return Interval(value, float(lower), float(upper), enough_patients(labels, patients))


def percentile_interval(value: float, resampled: np.ndarray, *, level: float = LEVEL, trusted: bool = True) -> Interval:
    """Percentile interval (Efron 1979) of a statistic's resampled values; NaN is ignored."""
    defined = resampled[np.isfinite(resampled)]
    if len(defined) == 0 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"), trusted=False)
    lower, upper = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(lower), float(upper), trusted)


def _share_below(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Fraction of ``reference`` below each value, ties counted half."""
    ordered = np.sort(reference)
    sides = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(sides / (2 * len(ordered)))
