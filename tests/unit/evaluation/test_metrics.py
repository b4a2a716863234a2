"""Metrics against scikit-learn on random and tied scores; the bootstrap against patients drawn in a loop."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from sklearn import metrics as reference

from ctclip.evaluation import metrics


def case(seed: int, tied: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and integer weights of 300 volumes."""
    random = np.random.default_rng(seed)
    labels = (random.random(300) < 0.3).astype(float)
    scores = np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    return labels, np.round(scores, 1) if tied else scores, random.integers(0, 4, 300).astype(float)


def expected_metrics(
    labels: np.ndarray, ranking: np.ndarray, probabilities: np.ndarray, threshold: float
) -> dict[str, float]:
    """Every metric equals scikit-learn's; the calibration error is computed bin by bin."""
    called = probabilities >= threshold
    error = 0.0
    tenth = np.digitize(probabilities * 10, np.arange(1, 10))
    for bin in range(10):
        inside = tenth == bin
        if inside.any():
            error += inside.mean() * abs(probabilities[inside].mean() - labels[inside].mean())
    return {
        "auroc": reference.roc_auc_score(labels, ranking), "average_precision": reference.average_precision_score(labels, ranking),
        "f1": reference.f1_score(labels, called), "weighted_f1": reference.f1_score(labels, called, average="weighted"),
        "accuracy": reference.accuracy_score(labels, called), "precision": reference.precision_score(labels, called, zero_division=0),
        "sensitivity": reference.recall_score(labels, called), "specificity": reference.recall_score(labels, called, pos_label=0),
        "brier": reference.brier_score_loss(labels, probabilities), "calibration_error": error,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed: int, tied: bool) -> None:
    labels, scores, _ = case(seed, tied)
    ranking = scores**2 - 3  # a score that ranks but is not a probability
    probabilities = np.random.default_rng(seed).permutation(scores)
    values = metrics.label_metrics(labels, ranking, probabilities, 0.5)
    expected = expected_metrics(labels, ranking, probabilities, 0.5)
    assert tuple(values) == tuple(expected) == metrics.METRICS
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_repetitions(tied: bool) -> None:
    labels, scores, weights = case(3, tied)
    repeated = np.repeat(np.arange(len(labels)), weights.astype(int))
    expected = expected_metrics(labels[repeated], scores[repeated], scores[repeated], 0.4)
    drawn = np.stack([np.ones_like(weights), weights])
    values = {
        **metrics.weighted_ranking(labels, scores, drawn),
        **metrics.weighted_rates(labels, scores, 0.4, drawn),
        **metrics.weighted_errors(labels, scores, drawn),
    }
    for name, value in expected.items():
        assert values[name].shape == (2,)
        assert values[name][1] == pytest.approx(value, abs=1e-12), name


def test_auroc_takes_what_numpy_takes_and_refuses_other_labels() -> None:
    for labels, scores in (
        ([0, 1, 1], [0.1, 0.9, 0.05]),
        (pd.Series([False, True, True]), pd.Series([0.1, 0.9, 0.05])),
    ):
        assert metrics.auroc(labels, scores) == 0.5
    assert np.isnan(metrics.auroc([0, 1], [0.1, np.nan]))
    for labels, scores in (([0, 2], [0.1, 0.9]), ([0, 1, -1], [0.1, 0.9, 0.2]), ([0, np.nan], [0.1, 0.9]), ([0, 1], [0.1])):  # fmt: skip
        with pytest.raises(ValueError, match="expected labels 0 or 1"):
            metrics.auroc(labels, scores)


def test_what_is_undefined_is_nan_and_never_0() -> None:
    scores = np.array([0.1, 0.6, 0.7, 0.9, 0.3])
    ones, zeros = (metrics.label_metrics(np.full(5, value), scores, scores, 0.5) for value in (1.0, 0.0))
    assert {name for name, value in ones.items() if np.isnan(value)} == {"auroc", "specificity"}
    undefined = {"auroc", "average_precision", "f1", "precision", "sensitivity"}
    assert {name for name, value in zeros.items() if np.isnan(value)} == undefined
    assert ones["average_precision"] == ones["precision"] == 1
    assert ones["sensitivity"] == pytest.approx(0.6)
    assert ones["f1"] == pytest.approx(0.75)
    assert zeros["specificity"] == zeros["accuracy"] == pytest.approx(0.4)
    assert zeros["weighted_f1"] == pytest.approx(reference.f1_score(np.zeros(5), scores >= 0.5, average="weighted"))
    assert all(
        np.isnan(value) for value in metrics.label_metrics(np.array([]), np.array([]), np.array([]), 0.5).values()
    )
    for label, names in ((1.0, {"auroc"}), (0.0, {"auroc", "average_precision"})):
        drawn = metrics.weighted_ranking(np.full(5, label), scores, np.ones((3, 5)))
        assert {name for name, values in drawn.items() if np.isnan(values).all() and values.shape == (3,)} == names
    assert np.isnan(metrics.mean_defined([float("nan")]))
    assert np.isnan(metrics.mean_defined([]))
    assert metrics.mean_defined([0.6, float("nan"), 0.8]) == pytest.approx(0.7)


def test_nothing_called_has_precision_0() -> None:
    values = metrics.label_metrics(np.array([0.0, 1, 1]), np.arange(3.0), np.full(3, 0.2), 0.5)
    assert values["precision"] == values["f1"] == values["sensitivity"] == 0
    assert values["specificity"] == 1
    drawn = metrics.weighted_rates(np.array([0.0, 1]), np.array([0.1, 0.9]), 0.5, np.array([[0.0, 0.0]]))
    assert all(np.isnan(value[0]) for value in drawn.values())


@pytest.mark.parametrize("shape", [(60, 5), (7, 1)])
def test_f1_averages_are_scikit_learns(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    labels, called = random.random(shape) < 0.3, random.random(shape) < 0.4
    averages = metrics.f1_averages(labels.astype(float), called)
    assert set(averages) == {"macro", "micro", "weighted"}
    for name, value in averages.items():
        expected = reference.f1_score(labels if shape[1] > 1 else labels[:, 0], called if shape[1] > 1 else called[:, 0], average=name if shape[1] > 1 else "binary")  # fmt: skip
        assert value == pytest.approx(expected, abs=1e-12)


def test_f1_averages_leave_out_what_is_unknown() -> None:
    labels = np.array([[1.0, np.nan], [0, np.nan], [np.nan, np.nan], [1, np.nan]])
    called = np.array([[True, True], [True, True], [False, True], [True, True]])
    averages = metrics.f1_averages(labels, called)
    assert averages["micro"] == averages["weighted"] == pytest.approx(0.8)
    assert averages["macro"] == pytest.approx(0.4)
    assert metrics.f1_averages(np.full((3, 2), np.nan), called[:3]) == {"macro": 0.0, "micro": 0.0, "weighted": 0.0}
    assert metrics.f1_averages(np.zeros((3, 2)), np.zeros((3, 2), bool)) == {
        "macro": 0.0,
        "micro": 0.0,
        "weighted": 0.0,
    }


def patients_with_four_equal_volumes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = (np.arange(80) < 30).astype(float)
    scores = random.normal(labels, 1)
    order = random.permutation(320)
    return np.repeat(labels, 4)[order], np.repeat(scores, 4)[order], np.repeat(np.arange(80), 4)[order]


def drawn_in_a_loop(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, times: int) -> np.ndarray:
    """AUROC (by the sum of ranks, Hanley & McNeil 1982) of the volumes of groups that are drawn one by one, as many as
    there are."""
    random = np.random.default_rng(123)
    volumes_of = {group: np.flatnonzero(groups == group) for group in np.unique(groups)}
    values = []
    for _ in range(times):
        chosen = np.concatenate([volumes_of[group] for group in random.choice(list(volumes_of), len(volumes_of))])
        positive = labels[chosen] == 1
        count = positive.sum()
        surplus = rankdata(scores[chosen])[positive].sum() - count * (count + 1) / 2
        values.append(surplus / count / (len(chosen) - count))
    return np.array(values)


def test_the_bootstrap_draws_patients_not_volumes() -> None:
    labels, scores, patients = patients_with_four_equal_volumes()
    expected = drawn_in_a_loop(labels, scores, patients, 1500)
    by_volume = drawn_in_a_loop(labels, scores, np.arange(320), 300)
    values = metrics.bootstrap_auroc(labels[:, None], scores[:, None], patients, resamples=1500, seed=4)[:, 0]
    assert values.shape == (1500,)
    assert values.std() == pytest.approx(expected.std(), rel=0.08)
    assert values.mean() == pytest.approx(expected.mean(), abs=0.005)
    assert np.quantile(values, [0.025, 0.975]) == pytest.approx(np.quantile(expected, [0.025, 0.975]), abs=0.015)
    assert by_volume.std() < 0.6 * expected.std()


def test_resamples_hold_whole_patients_and_as_many_as_there_are() -> None:
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    weights = metrics.bootstrap_weights(patients, 4000, seed=1)
    assert weights.shape == (4000, 6)
    assert np.array_equal(weights[:, 0], weights[:, 2])
    assert np.array_equal(weights[:, 1], weights[:, 4])
    assert set((weights[:, 0] + weights[:, 1] + weights[:, 3]).tolist()) == {3.0}
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.05)
    assert not np.array_equal(weights, metrics.bootstrap_weights(patients, 4000, seed=2))
    assert np.array_equal(weights, metrics.bootstrap_weights(patients, 4000, seed=1))
    assert metrics.bootstrap_weights(np.array(["a", "a"]), 10, seed=1).shape == (0, 2)
    assert metrics.bootstrap_weights(np.array(["a", "b"]), 10, seed=1).shape == (10, 2)


def test_every_metric_is_of_the_same_resamples() -> None:
    random = np.random.default_rng(2)
    labels = (random.random((90, 3)) < 0.4).astype(float)
    labels[::7, 0], labels[:, 2] = np.nan, np.nan
    ranking, probabilities = random.normal(size=(90, 3)), random.random((90, 3)).round(2)
    patients, thresholds = np.repeat(np.arange(30), 3), np.array([0.5, 0.3, 0.5])
    values = metrics.bootstrap_metrics(labels, ranking, probabilities, patients, thresholds, resamples=8, seed=4)
    assert set(values) == set(metrics.METRICS)
    weights = metrics.bootstrap_weights(patients, 8, seed=4)
    for label in (0, 1):
        known = ~np.isnan(labels[:, label])
        for row, weight in enumerate(weights):
            drawn = np.repeat(np.flatnonzero(known), weight[known].astype(int))
            columns = (array[drawn, label] for array in (labels, ranking, probabilities))
            for name, value in expected_metrics(*columns, thresholds[label]).items():
                assert values[name][row, label] == pytest.approx(value, abs=1e-12), name
    assert all(np.isnan(value[:, 2]).all() and value.shape == (8, 3) for value in values.values())
    alone = metrics.bootstrap_auroc(labels, ranking, patients, resamples=8, seed=4)
    assert np.array_equal(alone, values["auroc"], equal_nan=True)
    with_defaults = metrics.bootstrap_metrics(labels, ranking, probabilities, patients, thresholds)
    assert with_defaults["auroc"].shape == (1000, 3)
    assert np.array_equal(metrics.bootstrap_auroc(labels, ranking, patients), with_defaults["auroc"], equal_nan=True)
    seeded = metrics.bootstrap_auroc(labels, ranking, patients, resamples=1000, seed=0)
    assert np.array_equal(seeded, with_defaults["auroc"], equal_nan=True)


def test_reliability_counts_the_ends_with_the_outer_bins() -> None:
    probabilities = np.array([0.0, 0.05, 0.1, 0.35, 0.999, 1.0])
    labels = np.array([0.0, 1, 0, 1, 1, 1])
    predicted, observed, count = metrics.reliability(labels, probabilities)
    assert count.tolist() == [2, 1, 1, 2]
    assert predicted == pytest.approx([0.025, 0.1, 0.35, 0.9995])
    assert observed == pytest.approx([0.5, 0, 1, 1])
    assert metrics.calibration_error(labels, probabilities) == pytest.approx((2 * 0.475 + 0.1 + 0.65 + 2 * 0.0005) / 6)
    assert metrics.calibration_error(labels, probabilities, bins=1) == pytest.approx(abs(probabilities.mean() - 4 / 6))


def test_best_threshold_is_the_nearest_point_of_the_roc_curve() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        labels = (random.random(40) < 0.4).astype(float)
        scores = random.normal(labels, 1).round(1)
        false_rate, sensitivity, thresholds = reference.roc_curve(labels, scores, drop_intermediate=False)
        distance = (1 - sensitivity) ** 2 + false_rate**2
        picked = metrics.best_threshold(labels, scores)
        at = distance[thresholds == picked]
        assert at == pytest.approx(distance.min(), abs=1e-12)
    for label in (0.0, 1.0):
        assert metrics.best_threshold(np.full(3, label), np.arange(3.0)) == 0.5
        assert metrics.published_threshold(np.full(3, label), np.arange(3.0)) == 0.5


def test_published_threshold_is_the_last_of_a_hundred_that_is_nearest() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        labels = (random.random(40) < 0.4).astype(float)
        scores = (random.integers(0, 100, 40) / 99) if seed % 2 else random.random(40)
        nearest, best = np.inf, 0.0
        for value in np.linspace(0, 1, 100):
            called = scores > value
            distance = (1 - called[labels == 1].mean()) ** 2 + called[labels == 0].mean() ** 2
            if distance <= nearest + 1e-15:
                nearest, best = distance, value
        picked = metrics.published_threshold(labels, scores)
        assert np.array_equal(scores >= picked, scores > best)
        assert picked == pytest.approx(best, abs=1e-12)
        assert picked > best
