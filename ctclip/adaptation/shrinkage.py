"""Logistic regression shrunk towards the direction of the model's own prompts, for few labels.

The weights of a plain probe are shrunk towards 0, so that with few labels it falls below the prompts. Here the prior mean is
the zero-shot direction (as in CLAP, Silva-Rodriguez et al. 2024, arXiv 2312.12730), and how far the labels may move it is
chosen for each label by cross-validation among its patients. The limit of a strong penalty is the zero-shot score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctclip.adaptation.probe import Probe, cross_entropy, patient_folds

# Penalties on the squared change of the direction; inf keeps the prompts' direction.
ANCHORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, float("inf"))


@dataclass(frozen=True)
class Towards:
    """The prior. ``directions`` (L, dim): from the negative to the positive prompts of each label; ``scale``: the
    model's logit scale."""

    directions: np.ndarray
    scale: float


def fit_towards(
    vectors: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    towards: Towards,
    *,
    anchor: float | None = None,
    seed: int = 0,
) -> Probe:
    """vectors (n, dim) of all volumes, labels (n, L) of 0, 1 and NaN (not used), patients (n,) -> logits of each label.

    Minimises the sum of the cross-entropy of ``scale * vectors @ direction + bias`` and ``anchor / 2`` times the mean
    squared change of the logit, if embeddings were isotropic. ``anchor``: None chooses one of ``ANCHORS`` for each label; it is
    returned as its strength. A label with fewer than two patients of a class keeps the prompts' direction, and with one
    class its bias is 0.
    """
    weight, bias = towards.scale * np.asarray(towards.directions, dtype=float), np.zeros(labels.shape[1])
    unit = embedding_unit(vectors)
    strengths = np.full(labels.shape[1], np.inf)
    for label in range(labels.shape[1]):
        known = ~np.isnan(labels[:, label])
        inputs, truth = vectors[known].astype(float), labels[known, label]
        if len(np.unique(truth)) < 2:
            continue
        chosen = choose_anchor(inputs, truth, patients[known], weight[label], unit, seed) if anchor is None else anchor
        strengths[label] = chosen
        weight[label], bias[label] = _regression(inputs, truth, weight[label], chosen * unit)
    return Probe(weight, bias, strengths)


def embedding_unit(vectors: np.ndarray) -> float:
    """Mean variance of the dimensions of embeddings (n, dim): in this unit a penalty has the same meaning for every
    model."""
    return float(vectors.astype(float).var(axis=0).mean()) or 1.0


def choose_anchor(
    inputs: np.ndarray, truth: np.ndarray, patients: np.ndarray, prior: np.ndarray, unit: float, seed: int = 0
) -> float:
    """The value of ``ANCHORS`` with the lowest cross-entropy on held-out folds of patients; inf if a class has fewer than
    two patients. inputs (n, dim), truth (n,) of 0 and 1, patients (n,), prior (dim,) weights."""
    losses = np.zeros(len(ANCHORS))
    for train, held in patient_folds(truth, patients, seed):
        for index, anchor in enumerate(ANCHORS):
            weight, bias = _regression(inputs[train], truth[train], prior, anchor * unit)
            losses[index] += cross_entropy(inputs[held] @ weight + bias, truth[held])
    return ANCHORS[int(np.argmin(losses))] if losses.any() else float("inf")


def _regression(inputs: np.ndarray, truth: np.ndarray, prior: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The weights (dim,) and the bias that minimise cross-entropy + penalty / 2 |weights - prior|^2. The bias has a slight
    penalty of its own, so that it stays finite where the classes are separable."""
    from scipy.optimize import minimize

    offset = inputs @ prior
    free = inputs if np.isfinite(penalty) else inputs[:, :0]
    held = np.r_[np.full(free.shape[1], penalty if np.isfinite(penalty) else 0.0), 1e-2]

    def loss(moved: np.ndarray) -> tuple[float, np.ndarray]:
        logits = offset + free @ moved[:-1] + moved[-1]
        excess = 1 / (1 + np.exp(-np.clip(logits, -500, 500))) - truth
        value = cross_entropy(logits, truth) + 0.5 * np.sum(held * moved**2)
        return float(value), np.r_[free.T @ excess, excess.sum()] + held * moved

    moved = minimize(loss, np.zeros(len(held)), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return (prior + moved[:-1] if free.shape[1] else prior), float(moved[-1])
