"""Probes compared with direct calls of scikit-learn; draws by patient."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctclip.adaptation.draws import fraction_draw, shot_draw
from ctclip.adaptation.probe import DEFAULT, STRENGTHS, choose_strength, fit_probe
from ctclip.adaptation.protocol import Setting, settings_of, t_interval
from ctclip.errors import DataError


def synthetic(volumes: int, labels: int, dim: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors, labels that depend on them with noise, and patients with one to three volumes each."""
    random = np.random.default_rng(seed)
    patients = np.sort(random.integers(0, volumes // 2, volumes)).astype(str)
    vectors = random.normal(size=(volumes, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    logits = 25 * vectors @ random.normal(size=(dim, labels)) / np.sqrt(dim) + random.normal(size=(volumes, labels)) - 1
    return vectors.astype("f4"), (logits > 0).astype(float), patients


def test_scores_equal_scikit_learn_called_by_hand() -> None:
    vectors, labels, patients = synthetic(400, 3)
    labels[:40, 1] = np.nan
    probe = fit_probe(vectors[:300], labels[:300], patients[:300])
    for label in range(3):
        known = ~np.isnan(labels[:300, label])
        by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=probe.strengths[label], max_iter=1000))
        # The scale is computed from all embeddings, without their labels.
        by_hand[0].fit(vectors[:300].astype(float))
        by_hand[1].fit(by_hand[0].transform(vectors[:300].astype(float))[known], labels[:300][known, label])
        inputs = by_hand[0].transform(vectors[300:].astype(float))
        expected = by_hand[1].decision_function(inputs)
        found = probe.scores(vectors[300:])[:, label]
        assert np.allclose(found, expected, atol=1e-5)
        assert roc_auc_score(labels[300:, label] == 1, found) == roc_auc_score(labels[300:, label] == 1, expected)


def test_strength_is_that_of_least_cross_entropy_between_patients() -> None:
    """A label that depends only on the patient, and vectors that identify the patient: across patients there is nothing
    to learn, so the strongest penalty must be chosen; folds of volumes would choose the weakest."""
    random = np.random.default_rng(1)
    patients = np.repeat(np.arange(30), 4)
    vectors = random.normal(size=(30, 20))[patients] + 0.01 * random.normal(size=(120, 20))
    truth = (np.arange(30) % 2)[patients].astype(float)
    assert choose_strength(vectors, truth, patients.astype(str)) == STRENGTHS[0]
    assert choose_strength(vectors, truth, np.arange(120).astype(str)) == STRENGTHS[-1]


def test_one_patient_a_class_takes_the_default_strength() -> None:
    assert choose_strength(np.eye(2), np.array([0.0, 1.0]), np.array(["a", "b"])) == DEFAULT


def test_a_label_of_one_class_is_not_fitted() -> None:
    vectors, labels, patients = synthetic(60, 2)
    labels[:, 1] = 1
    probe = fit_probe(vectors, labels, patients)
    assert np.isnan(probe.strengths[1])
    assert not probe.weight[1].any()


def test_3039_volumes_of_18_labels_take_less_than_20_seconds() -> None:
    vectors, labels, patients = synthetic(3039, 18)
    began = time.process_time()
    fit_probe(vectors, labels, patients)
    # On two cores, 20 s: processor time, whatever else runs on the machine.
    assert time.process_time() - began < 40


def test_fraction_draws_whole_patients_with_both_classes() -> None:
    _, labels, patients = synthetic(300, 2)
    labels[:, 1] = 0
    labels[patients == patients[0], 1] = 1
    drawn = fraction_draw(labels, patients, 10, ["a", "b"], 0)
    seen = ~np.isnan(drawn).all(axis=1)
    chosen = set(patients[seen])
    assert len(chosen) == round(len(set(patients)) / 10)
    assert not chosen & set(patients[~seen])
    assert {0, 1} == set(drawn[seen, 1])
    assert (drawn[seen] == labels[seen]).all()
    assert not np.array_equal(drawn, fraction_draw(labels, patients, 10, ["a", "b"], 1), equal_nan=True)


def test_shots_are_patients_counted_once() -> None:
    _, labels, patients = synthetic(300, 3)
    drawn = shot_draw(labels, patients, 4, ["a", "b", "c"], 0)
    for label in range(3):
        for value in (0, 1):
            rows = np.flatnonzero(drawn[:, label] == value)
            assert len(rows) == len(set(patients[rows])) == 4
            assert (labels[rows, label] == value).all()
        assert len(set(patients[~np.isnan(drawn[:, label])])) == 8


def test_what_cannot_be_drawn_is_refused_in_one_line() -> None:
    labels, patients = np.array([[1.0], [0], [0], [0]]), np.array(["a", "b", "c", "d"])
    with pytest.raises(DataError, match=r"25 % of the patients \(1 of 4\) have only one class of 'x'"):
        fraction_draw(labels, patients, 25, ["x"], 0)
    with pytest.raises(DataError, match=r"'x' has 1 positive training patients, fewer than the 2 shots"):
        shot_draw(labels, patients, 2, ["x"], 0)
    for fractions, shots in (("0", ""), ("101", ""), ("a", ""), ("", "0"), ("", "1.5")):
        with pytest.raises(DataError):
            settings_of(fractions, shots)
    assert settings_of("100,1", "16,4")[0] == Setting("shots", 4)


def test_interval_is_students() -> None:
    lower, upper = t_interval(np.array([0.8, 0.9, 1.0]))
    # 4.3027 is the 97.5 % quantile of Student's t with two degrees of freedom, by any table.
    assert upper - 0.9 == pytest.approx(4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert 0.9 - lower == pytest.approx(upper - 0.9)
    assert np.isnan(t_interval(np.array([0.9]))).all()
