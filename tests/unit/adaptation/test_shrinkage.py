"""Regression shrunk towards prompts: its limits, its optimum by another solver, and its gain with few labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ctclip.adaptation.probe import fit_probe
from ctclip.adaptation.shrinkage import Towards, embedding_unit, fit_towards

INF = float("inf")


def volumes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors (n, 16), labels of two findings, patients. The first finding is the first dimension, with noise."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    noisy = vectors[:, :2] + 0.15 * random.normal(size=(count, 2))
    return vectors.astype("f4"), (noisy > 0).astype(float), np.arange(count).astype(str)


def test_a_prior_of_zero_is_scikit_learns_ridge() -> None:
    vectors, labels, patients = volumes(200, 0)
    found = fit_towards(vectors, labels, patients, Towards(np.zeros((2, 16)), 10.0), anchor=5.0)
    for label in range(2):
        by_hand = LogisticRegression(C=1 / (5.0 * embedding_unit(vectors)), tol=1e-8, max_iter=1000)
        by_hand.fit(vectors.astype(float), labels[:, label])
        assert np.allclose(found.weight[label], by_hand.coef_[0], atol=0.02)


def test_the_limits_are_the_prompts_and_the_labels() -> None:
    vectors, labels, patients = volumes(200, 1)
    towards = Towards(np.eye(16)[[2, 3]], 10.0)
    kept = fit_towards(vectors, labels, patients, towards, anchor=INF)
    assert np.array_equal(kept.weight, 10.0 * towards.directions)
    logits = kept.scores(vectors)
    # The bias corresponds to the prevalence: the mean probability is the mean label.
    assert (1 / (1 + np.exp(-logits))).mean(axis=0) == pytest.approx(labels.mean(axis=0), abs=1e-3)
    free = fit_towards(vectors, labels, patients, towards, anchor=0.01)
    assert np.argmax(np.abs(free.weight), axis=1).tolist() == [0, 1]


def test_good_prompts_are_kept_and_bad_ones_left() -> None:
    vectors, labels, patients = volumes(1000, 2)
    seen = np.full_like(labels, np.nan)
    seen[:32] = labels[:32]
    # For the first finding the prompts have the right direction, for the second a wrong one.
    towards = Towards(np.eye(16)[[0, 5]], 10.0)
    fitted = fit_towards(vectors, seen, patients, towards)
    plain, prompts = fit_probe(vectors, seen, patients), 10.0 * vectors @ towards.directions.T
    aurocs = {
        name: [roc_auc_score(labels[32:, label], scores[32:, label]) for label in range(2)]
        for name, scores in (("fitted", fitted.scores(vectors)), ("plain", plain.scores(vectors)), ("prompts", prompts))
    }
    assert fitted.strengths[0] > fitted.strengths[1]
    assert aurocs["fitted"][0] > max(aurocs["plain"][0], aurocs["prompts"][0] - 0.01)
    assert aurocs["fitted"][1] > aurocs["prompts"][1] + 0.2
    assert np.mean(aurocs["fitted"]) > np.mean(aurocs["plain"])


def test_one_patient_of_a_class_keeps_the_prompts() -> None:
    vectors, labels, patients = volumes(8, 3)
    seen = np.full_like(labels, np.nan)
    seen[[0, 1, 2], 0] = [0, 1, 0]
    seen[[0, 1], 1] = [1, 1]
    fitted = fit_towards(vectors, seen, patients, Towards(np.eye(16)[:2], 10.0))
    assert fitted.strengths.tolist() == [INF, INF]
    assert np.array_equal(fitted.weight, 10.0 * np.eye(16)[:2])
    assert fitted.bias[1] == 0
