"""Linear probes: a logistic regression for each label on frozen embeddings, with regularisation chosen by
cross-validation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

# scikit-learn's C on standardised embeddings; smaller is a stronger penalty.
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
# Used if there are too few patients for cross-validation.
DEFAULT = 1e-2
FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """Logits ``vectors @ weight.T + bias``: weight (L, dim), bias (L,), float64; strengths (L,), scikit-learn's C of
    each label. A label with one class has weight 0 and strength NaN."""

    weight: np.ndarray
    bias: np.ndarray
    strengths: np.ndarray

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """(n, dim) -> (n, L) logits."""
        return np.asarray(vectors @ self.weight.T + self.bias)


def fit_probe(vectors: np.ndarray, labels: np.ndarray, patients: np.ndarray, *, seed: int = 0) -> Probe:
    """vectors (n, dim), labels (n, L) of 0, 1 and NaN (not used), patients (n,).

    Embeddings are standardised over all ``vectors``, which needs no labels, and the scale is merged into the weights.
    The strength of each label has the lowest cross-entropy over folds of patients (``StratifiedGroupKFold``).
    """
    mean, spread = vectors.mean(axis=0, dtype=float), vectors.std(axis=0, dtype=float)
    spread[spread < 1e-8] = 1.0
    inputs = (vectors - mean) / spread
    weight, bias = np.zeros((labels.shape[1], vectors.shape[1])), np.zeros(labels.shape[1])
    strengths = np.full(labels.shape[1], np.nan)
    for label in range(labels.shape[1]):
        known = ~np.isnan(labels[:, label])
        truth = labels[known, label]
        if len(np.unique(truth)) < 2:
            continue
        strengths[label] = choose_strength(inputs[known], truth, patients[known], seed=seed)
        fitted = regression(strengths[label]).fit(inputs[known], truth)
        weight[label] = fitted.coef_[0] / spread
        bias[label] = fitted.intercept_[0] - weight[label] @ mean
    return Probe(weight, bias, strengths)


def choose_strength(inputs: np.ndarray, truth: np.ndarray, patients: np.ndarray, *, seed: int = 0) -> float:
    """The value of ``STRENGTHS`` with the lowest cross-entropy on held-out folds of patients; ``DEFAULT`` if a class
    has fewer than two patients. inputs (n, d), truth (n,) of 0 and 1, patients (n,)."""
    losses = np.zeros(len(STRENGTHS))
    for train, held in patient_folds(truth, patients, seed):
        for index, strength in enumerate(STRENGTHS):
            scores = regression(strength).fit(inputs[train], truth[train]).decision_function(inputs[held])
            losses[index] += cross_entropy(scores, truth[held])
    return STRENGTHS[int(np.argmin(losses))] if losses.any() else DEFAULT


def patient_folds(truth: np.ndarray, patients: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices for fitting and for testing in up to ``FOLDS`` folds of patients, each with both classes in its fitting
    part; no fold if a class has fewer than two patients."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, *(len(np.unique(patients[truth == value])) for value in (0, 1)))
    if folds < 2:
        return []
    with warnings.catch_warnings():
        # With few patients a fold may have only one class; such folds are left out.
        warnings.simplefilter("ignore")
        parts = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(truth, truth, patients))
    return [(train, held) for train, held in parts if len(np.unique(truth[train])) == 2]


def cross_entropy(logits: np.ndarray, truth: np.ndarray) -> float:
    """Cross-entropy summed over examples; ``logits`` (n,), ``truth`` (n,) of 0 and 1."""
    return float(np.sum(np.logaddexp(0, logits) - truth * logits))


def regression(strength: float):  # type: ignore[no-untyped-def]
    """scikit-learn's logistic regression with its own solver."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000)
