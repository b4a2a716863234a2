"""Differences in concepts between groups of patients, with intervals, corrected for multiple comparisons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Groups with fewer patients are not compared.
FEWEST_PATIENTS = 10
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """One comparison: the standardised difference of means (in standard deviations) with its interval, the uncorrected
    p value, and the number of patients in each group."""

    value: float
    lower: float
    upper: float
    p: float
    patients: tuple[int, int]


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Replace each column of (n, m) with the normal quantiles of its ranks (van der Waerden 1952), which removes units
    and the influence of outliers. NaN stays NaN."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0, nan_policy="omit")
    known = np.sum(~np.isnan(values), axis=0)
    return np.asarray(ndtri(ranks / (known + 1)))


def differences(values: np.ndarray, member: np.ndarray, patients: np.ndarray) -> list[Difference | None]:
    """For each column of ``values`` (n, m), the difference between volumes with ``member`` (n,) True and those with
    ``member`` False.

    A patient counts once in each group, by the mean of the volumes in that group. The test is Welch's t test (1947);
    the interval is that of the difference divided by the pooled standard deviation. None if a group has fewer than
    ``FEWEST_PATIENTS`` patients or the column is constant.
    """
    from scipy.stats import t as student

    sides = [_patient_means(values[side], patients[side]) for side in (member, ~member)]
    counts = np.array([np.sum(~np.isnan(side), axis=0) for side in sides])
    usable = counts.min(axis=0) >= FEWEST_PATIENTS
    results: list[Difference | None] = [None] * values.shape[1]
    if not usable.any():
        return results
    counts = counts[:, usable].astype(float)
    means = np.array([np.nanmean(side[:, usable], axis=0) for side in sides])
    variances = np.array([np.nanvar(side[:, usable], axis=0, ddof=1) for side in sides])
    pooled = np.sqrt((variances * (counts - 1)).sum(axis=0) / (counts.sum(axis=0) - 2))
    squares = variances / counts
    error = np.sqrt(squares.sum(axis=0))
    varies = (pooled > 1e-9) & (error > 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = error**4 / (squares**2 / (counts - 1)).sum(axis=0)
        difference = means[0] - means[1]
        p = np.maximum(2 * student.sf(np.abs(difference) / error, freedom), 1e-300)
        half = student.ppf((1 + LEVEL) / 2, freedom) * error
        scaled = np.array([difference, difference - half, difference + half]) / pooled
    for place, column in enumerate(np.flatnonzero(usable)):
        if varies[place]:
            value, low, high = map(float, scaled[:, place])
            patients_ = (int(counts[0, place]), int(counts[1, place]))
            results[column] = Difference(value, low, high, float(p[place]), patients_)
    return results


def false_discovery(p: np.ndarray) -> np.ndarray:
    """Adjusted p values of Benjamini & Hochberg (1995); (n,) -> (n,)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p)) if len(p) else p


def group_means(values: np.ndarray, member: np.ndarray, groups: int) -> np.ndarray:
    """Values (n, m) and the group index of each row (n,) -> means (groups, m), ignoring NaN; NaN if a group has no
    other value."""
    known = ~np.isnan(values)
    total, count = np.zeros((groups, values.shape[1])), np.zeros((groups, values.shape[1]))
    np.add.at(total, member, np.where(known, values, 0))
    np.add.at(count, member, known)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _patient_means(values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Values (n, m) -> means (patients, m), ignoring NaN."""
    names, member = np.unique(patients, return_inverse=True)
    return group_means(values, member, len(names))
