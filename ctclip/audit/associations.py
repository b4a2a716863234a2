"""Differences of concepts between groups of patients, with intervals, corrected for how many were looked at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A group of fewer patients is not compared.
FEWEST_PATIENTS = 10
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """One comparison: standardised difference of means (in standard deviations) with its interval, p before and after
    correction, and the number of patients on both sides."""

    value: float
    lower: float
    upper: float
    p: float
    patients: tuple[int, int]
    error: float


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Each column (n, m) by the normal quantiles of its ranks (van der Waerden 1952): no outlier or unit counts. NaN stays."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0, nan_policy="omit")
    known = np.sum(~np.isnan(values), axis=0)
    return np.asarray(ndtri(ranks / (known + 1)))


def differences(values: np.ndarray, member: np.ndarray, patients: np.ndarray) -> list[Difference | None]:
    """For each column of values (n, m) the difference between volumes where ``member`` (n,) is True and where it is False.

    A patient counts once a side, by the mean of the volumes there. Welch's t test (1947); the interval is of the
    difference divided by the pooled standard deviation. None where a side has fewer than ``FEWEST_PATIENTS`` patients, or
    a column does not vary.
    """
    from scipy.stats import t as student

    sides = [_patient_means(values[side], patients[side]) for side in (member, ~member)]
    results: list[Difference | None] = []
    for column in range(values.shape[1]):
        one, other = (side[~np.isnan(side[:, column]), column] for side in sides)
        if min(len(one), len(other)) < FEWEST_PATIENTS:
            results.append(None)
            continue
        variances = [side.var(ddof=1) / len(side) for side in (one, other)]
        pooled = np.sqrt(
            (one.var(ddof=1) * (len(one) - 1) + other.var(ddof=1) * (len(other) - 1)) / (len(one) + len(other) - 2)
        )
        error = np.sqrt(sum(variances))
        if not pooled > 1e-9 or not error > 1e-12:
            results.append(None)
            continue
        freedom = error**4 / sum(v**2 / (len(side) - 1) for v, side in zip(variances, (one, other), strict=True))
        difference = one.mean() - other.mean()
        p = 2 * student.sf(abs(difference) / error, freedom)
        half = student.ppf((1 + LEVEL) / 2, freedom) * error
        low, high = difference - half, difference + half
        results.append(
            Difference(
                float(difference / pooled), float(low / pooled), float(high / pooled), float(max(p, 1e-300)),
                (len(one), len(other)), float(error / pooled),
            )
        )  # fmt: skip
    return results


def interaction(one: Difference, other: Difference) -> Difference:
    """How much larger a difference is in one part of a cohort than in another, of other patients."""
    from scipy.special import ndtr, ndtri

    value, error = one.value - other.value, float(np.hypot(one.error, other.error))
    half = float(ndtri((1 + LEVEL) / 2)) * error
    p = float(max(2 * ndtr(-abs(value) / error), 1e-300))
    return Difference(value, value - half, value + half, p, (sum(one.patients), sum(other.patients)), error)


def false_discovery(p: np.ndarray) -> np.ndarray:
    """Adjusted p values of Benjamini & Hochberg (1995); (n,) -> (n,)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p)) if len(p) else p


def _patient_means(values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """(n, m) -> (patients, m), NaN left out."""
    names, member = np.unique(patients, return_inverse=True)
    known = ~np.isnan(values)
    total, count = np.zeros((len(names), values.shape[1])), np.zeros((len(names), values.shape[1]))
    np.add.at(total, member, np.where(known, values, 0))
    np.add.at(count, member, known)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
