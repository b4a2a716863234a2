"""Confidence intervals of calibrated probabilities, from the patients of the calibration split.

The interval is that of the line slope * margin + intercept, transformed by the sigmoid, which keeps it between 0 and 1.
It describes the fraction of scans with this margin that have the finding, among patients like those of the calibration
split. It does not cover other patients, nor the variation between models with other training data. Its coverage is in
``tests/unit/evaluation/test_calibration_interval.py``.
"""

from __future__ import annotations

import numpy as np

from ctclip.evaluation.intervals import LEVEL, patients_by_class

# Variance of the slope, covariance of slope and intercept, variance of the intercept.
Covariance = tuple[float, float, float]
QUANTILE = 1.959963984540054  # standard normal quantile at (1 + LEVEL) / 2


def line_covariance(
    margin: np.ndarray, truth: np.ndarray, patients: np.ndarray, slope: float, intercept: float
) -> Covariance | None:
    """Covariance of a line that ``fit_line`` fitted with Platt's targets; None if it is not finite.

    ``margin`` (n,), ``truth`` (n,) of 0 and 1, ``patients`` (n,). It combines three parts:

    * the larger, in every direction, of two estimates: the inverse information, which is valid if volumes are
      independent, and the jackknife over patients, one Newton step each (Pregibon 1981; Lipsitz et al. 1990), which
      allows correlated volumes of a patient but is too small with few patients of one class;
    * the squared bias of Platt's targets, which pull probabilities towards one half: one Newton step towards the fit to
      ``truth`` itself;
    * a factor that turns the normal quantile into that of Student's t with one degree of freedom less than the smaller
      number of patients.
    """
    from scipy.special import expit
    from scipy.stats import t as student

    centre, spread = float(margin.mean()), float(margin.std())
    if spread == 0:
        return None
    positives = truth.sum()
    high, low = (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2)
    design = np.stack([(margin - centre) / spread, np.ones_like(margin)], axis=1)
    fitted = expit(slope * margin + intercept)
    information = fitted * (1 - fitted)
    try:
        inverse = np.linalg.inv(design.T @ (information[:, None] * design))
        shift = inverse @ design.T @ (truth - np.where(truth == 1, high, low))
        covariance = _larger(inverse, _jackknife(design, truth - fitted, information, patients)) + np.outer(
            shift, shift
        )
    except np.linalg.LinAlgError:
        return None
    freedom = min(patients_by_class(truth, patients)) - 1
    covariance *= (student.ppf((1 + LEVEL) / 2, freedom) / QUANTILE) ** 2
    # Undo the standardisation of the margins.
    back = np.array([[1 / spread, 0], [-centre / spread, 1]])
    covariance = back @ covariance @ back.T
    return (
        (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))
        if np.isfinite(covariance).all()
        else None
    )


def probability_limits(
    margins: np.ndarray, slope: float, intercept: float, covariance: Covariance | None
) -> np.ndarray:
    """margins (n,) -> (n, 2) float64: the 95 % interval of their probabilities; NaN without a covariance."""
    if covariance is None:
        return np.full((len(margins), 2), np.nan)
    margins = np.asarray(margins, dtype=float)
    of_slope, of_both, of_intercept = covariance
    variance = of_slope * margins**2 + 2 * of_both * margins + of_intercept
    reach = QUANTILE * np.sqrt(np.maximum(variance, 0))
    logits = (slope * margins + intercept)[:, None] + np.stack([-reach, reach], axis=1)
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))


def checked_covariance(values: object) -> Covariance:
    """Check a covariance read from a file. Raises ValueError or TypeError unless it is that of two numbers."""
    of_slope, of_both, of_intercept = (float(value) for value in values)  # type: ignore[attr-defined]
    if not np.isfinite([of_slope, of_both, of_intercept]).all() or min(of_slope, of_intercept) < 0:
        raise ValueError("a covariance is not valid")
    if of_both**2 > of_slope * of_intercept * (1 + 1e-6):
        raise ValueError("a covariance is not valid")
    return of_slope, of_both, of_intercept


def _jackknife(design: np.ndarray, residual: np.ndarray, information: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Covariance (2, 2) from the changes of the line when each patient is left out."""
    names, member = np.unique(patients, return_inverse=True)
    score, own = np.zeros((len(names), 2)), np.zeros((len(names), 2, 2))
    np.add.at(score, member, design * residual[:, None])
    np.add.at(own, member, information[:, None, None] * design[:, :, None] * design[:, None, :])
    shifts = np.linalg.solve(own.sum(axis=0) - own, score[:, :, None])[:, :, 0]
    return np.asarray((len(names) - 1) / len(names) * shifts.T @ shifts)


def _larger(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The smallest symmetric matrix, diagonal in the common axes of ``one`` (positive definite) and ``other``, that is
    at least as large as both."""
    root = np.linalg.cholesky(one)
    back = np.linalg.inv(root)
    values, axes = np.linalg.eigh(back @ other @ back.T)
    scaled = root @ axes
    return np.asarray(scaled * np.maximum(1, values) @ scaled.T)
