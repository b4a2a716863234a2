"""Metrics against scikit-learn on random and tied scores; the bootstrap against resampling rows by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference

from ctclip.errors import EvaluationError
from ctclip.evaluation import metrics
from ctclip.evaluation.controls import BINS, HIGHEST, histogram_aurocs, histograms, shuffled_aurocs
from ctclip.evaluation.evaluate import evaluate
from ctclip.evaluation.protocol import Protocol
from ctclip.evaluation.retrieval import retrieval
from ctclip.evaluation.tables import prediction_table, read_labels, read_predictions, write_predictions


def case(seed: int, tied: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random(300) < 0.3).astype(float)
    scores = np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    return labels, np.round(scores, 1) if tied else scores, random.random(300) * 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed: int, tied: bool) -> None:
    labels, scores, weights = case(seed, tied)
    for weight in (None, weights):
        assert (
            abs(metrics.auroc(labels, scores, weight) - reference.roc_auc_score(labels, scores, sample_weight=weight))
            < 1e-12
        )
        expected = reference.average_precision_score(labels, scores, sample_weight=weight)
        assert abs(metrics.average_precision(labels, scores, weight) - expected) < 1e-12
    counts, called = metrics.confusion(labels, scores, 0.5), scores >= 0.5
    assert abs(counts["f1"] - reference.f1_score(labels, called)) < 1e-12
    assert abs(counts["weighted_f1"] - reference.f1_score(labels, called, average="weighted")) < 1e-12
    assert abs(counts["precision"] - reference.precision_score(labels, called)) < 1e-12
    assert abs(counts["sensitivity"] - reference.recall_score(labels, called)) < 1e-12
    assert abs(counts["specificity"] - reference.recall_score(1 - labels, ~called)) < 1e-12
    assert abs(counts["accuracy"] - reference.accuracy_score(labels, called)) < 1e-12
    assert abs(metrics.brier(labels, scores) - reference.brier_score_loss(labels, scores)) < 1e-12


def test_f1_averages_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels, called = random.random((200, 5)) < 0.3, random.random((200, 5)) < 0.4
    found = metrics.f1_averages(labels.astype(int), called)
    for name, value in found.items():
        assert abs(value - reference.f1_score(labels, called, average=name)) < 1e-12


def test_one_class_is_undefined() -> None:
    assert np.isnan(metrics.auroc(np.ones(5), np.arange(5.0)))
    assert np.isnan(metrics.mean_defined([float("nan")]))
    assert metrics.mean_defined([0.6, float("nan"), 0.8]) == pytest.approx(0.7)


def test_bootstrap_is_resampling_of_patients() -> None:
    labels, scores, _ = case(1, True)
    patients = np.repeat(np.arange(100), 3)
    weights = metrics.bootstrap_weights(patients, 20, seed=4)
    found = metrics.bootstrap_auroc(labels[:, None], scores[:, None], patients, resamples=20, seed=4)[:, 0]
    for weight, value in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(300), weight.astype(int))
        assert len(rows) == 300
        assert abs(value - reference.roc_auc_score(labels[rows], scores[rows])) < 1e-12
    every = metrics.bootstrap_metrics(labels[:, None], scores[:, None], patients, np.array([0.5]), resamples=20, seed=4)
    called = scores >= 0.5
    for row, weight in enumerate(weights):
        rows = np.repeat(np.arange(300), weight.astype(int))
        truth, said, score = labels[rows], called[rows], scores[rows]
        expected = {
            "auroc": found[row], "average_precision": reference.average_precision_score(truth, score),
            "f1": reference.f1_score(truth, said), "weighted_f1": reference.f1_score(truth, said, average="weighted"), "accuracy": reference.accuracy_score(truth, said),
            "precision": reference.precision_score(truth, said), "sensitivity": reference.recall_score(truth, said),
            "specificity": reference.recall_score(1 - truth, ~said), "brier": reference.brier_score_loss(truth, score),
            "calibration_error": metrics.calibration_error(truth, score),
        }  # fmt: skip
        assert set(expected) == set(every) == set(metrics.METRICS)
        for name, value in expected.items():
            assert abs(every[name][row, 0] - value) < 1e-12, name
    limits = metrics.interval(0.7, found)
    assert limits.lower < np.median(found) < limits.upper


def test_retrieval_counts_ties_against_us_and_any_reconstruction_as_a_hit() -> None:
    pool = np.eye(4)
    scans = np.array(["a", "a", "b", "c"])
    queries = np.array([[0, 1.0, 0, 0], [1, 1, 1, 1.0]])
    found = retrieval(queries, pool, np.array(["a", "b"]), scans)
    assert found["recall@1"] == 0.5
    assert found["median_rank"] == 2.5


def test_histograms_count_every_voxel_once() -> None:
    hu = np.random.default_rng(0).integers(-1100, 3000, (4, 5, 6)).astype(np.int16)
    expected = np.histogram(hu, [*BINS, HIGHEST])[0] / hu.size
    assert np.allclose(histograms([hu])[0], expected)


def test_shuffled_labels_are_at_chance_and_the_histogram_control_can_see() -> None:
    random = np.random.default_rng(0)
    labels = (random.random((400, 6)) < 0.3).astype(float)
    scores = np.clip(labels * 0.5 + random.random((400, 6)) * 0.5, 0, 1)
    assert abs(shuffled_aurocs(labels, scores, np.arange(400)).mean() - 0.5) < 0.02
    seen = random.random((400, 8))
    seen[:, 0] += labels[:, 0] * 0.5
    values = histogram_aurocs(seen[:300], labels[:300], seen[300:], labels[300:])
    assert values[0] > 0.75
    assert abs(np.nanmean(values[1:]) - 0.5) < 0.12


PROTOCOL = Protocol(name="p", describes="", labels=("A", "B"), bootstrap=20)


def table(volumes: int = 6) -> pd.DataFrame:
    names = [f"v{index}" for index in range(volumes)]
    scans = [f"s{index // 2}" for index in range(volumes)]
    identity = pd.DataFrame({"volume": names, "patient": names, "scan": scans, "warnings": ""})
    scores = np.linspace(0.1, 0.9, volumes * 2).reshape(volumes, 2)
    return prediction_table(identity, ["A", "B"], scores, scores, {"size [mm]": scores[:, 0]}, model="m", spec="s")


def test_predictions_survive_their_file_and_name_what_is_wrong(tmp_path) -> None:
    for name in ("p.csv", "p.parquet"):
        write_predictions(tmp_path / name, table())
        again, names = read_predictions(tmp_path / name)
        assert names == ["A", "B"]
        assert np.allclose(again[names], table()[names])
    for change, said in (
        (lambda t: t.drop(columns="scan"), "'scan'"),
        (lambda t: pd.concat([t, t.head(1)]), "twice"),
        (lambda t: t.assign(A=1.5), "outside"),
        (lambda t: t.assign(model=["x"] * 3 + ["y"] * 3), "different model"),
    ):
        write_predictions(tmp_path / "bad.csv", change(table()))
        with pytest.raises(EvaluationError, match=said):
            read_predictions(tmp_path / "bad.csv")


def test_labels_name_what_is_wrong(tmp_path) -> None:
    good = pd.DataFrame({"VolumeName": [f"v{i}.nii.gz" for i in range(6)], "A": [0, 1] * 3, "B": [1] * 6})
    good.to_csv(tmp_path / "l.csv", index=False)
    labels = read_labels(tmp_path / "l.csv", ["A", "B"])
    found = evaluate(table(), labels, PROTOCOL)
    assert found["zero_shot"]["auroc"]["B"]["value"] is None
    assert found["zero_shot"]["labels_defined"] == 1
    good.assign(A=2).to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(EvaluationError, match="labels are 0, 1, or empty"):
        read_labels(tmp_path / "l.csv", ["A"])
    with pytest.raises(EvaluationError, match="'C'"):
        read_labels(tmp_path / "l.csv", ["C"])
    with pytest.raises(EvaluationError, match="no labels"):
        evaluate(table(8), labels, PROTOCOL)
