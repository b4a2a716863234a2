"""Calibration: scikit-learn's sigmoid, slopes that never reverse a finding, and labels that are not calibrated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.calibration import _sigmoid_calibration
from sklearn.linear_model import LogisticRegression

from ctclip.errors import EvaluationError
from ctclip.evaluation import metrics
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.calibration import Calibration, Line, digest, fit_calibration, fit_line


def split(volumes: int, seed: int = 0, *, slope: float = 1.0, offset: float = -2.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random(volumes) < 0.3).astype(float)
    return labels, random.normal(slope * (2 * labels - 1), 1.5) + offset


@pytest.mark.parametrize(("volumes", "scale", "shift"), [(12, 1, 0), (60, 20, 5), (400, 0.01, -3), (3000, 1, 100)])
def test_a_line_is_scikit_learns_sigmoid_with_platts_targets(volumes: int, scale: float, shift: float) -> None:
    labels, margins = split(volumes)
    margins = scale * margins + shift
    slope, intercept = fit_line(margins, labels, intercept=True)
    expected = [-value for value in _sigmoid_calibration(margins, labels)]
    assert (slope, intercept) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_separable_margins_have_platts_finite_slope() -> None:
    """One positive at 1 and three negatives at 0: the smoothed targets 2/3 and 1/5 are met exactly."""
    slope, intercept = fit_line(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]), intercept=True)
    assert expit(slope + intercept) == pytest.approx(2 / 3, abs=1e-6)
    assert expit(intercept) == pytest.approx(1 / 5, abs=1e-6)


def test_a_temperature_is_logistic_regression_without_an_intercept() -> None:
    labels, margins = split(500, offset=0)
    slope, intercept = fit_line(margins, labels, intercept=False)
    reference = LogisticRegression(C=1e8, fit_intercept=False, tol=1e-10).fit(margins[:, None], labels)
    assert slope == pytest.approx(reference.coef_[0, 0], rel=1e-4)
    assert intercept == 0


def test_a_slope_is_never_negative() -> None:
    labels, margins = split(200)
    for intercept in (True, False):
        slope, constant = fit_line(-margins, labels, intercept=intercept)
        assert slope == 0
        assert np.isfinite(constant)
    assert fit_line(np.full(200, 3.0), labels, intercept=True) == (0.0, 0.0)
    assert fit_line(np.zeros(200), labels, intercept=False) == (0.0, 0.0)


@pytest.mark.parametrize("intercept", [True, False])
def test_separable_margins_of_any_size_end_at_a_step(intercept: bool) -> None:
    labels = np.repeat([0.0, 1.0], 500)
    slope, constant = fit_line(1e4 * (labels - 0.5), labels, intercept=intercept)
    assert 0 < slope <= 100 / 5e3 + 1e-9
    assert np.isfinite(constant)


def fitted(labels: np.ndarray, margins: np.ndarray, **options: object) -> Calibration:
    names = [chr(ord("A") + index) for index in range(labels.shape[1])]
    arguments: dict[str, object] = {"method": "platt", "fitted_on": "a split", "model": "m", **options}
    return fit_calibration(labels, margins, names, **arguments)  # type: ignore[arg-type]


def test_what_does_not_rise_or_is_rare_is_not_calibrated_and_said_so() -> None:
    labels, margins = split(100)
    few, many = np.zeros(100), np.ones(100)
    few[:4], many[:4] = 1, 0
    table = np.stack([labels, labels, few, many, np.full(100, np.nan)], axis=1)
    calibration = fitted(table, np.stack([margins, -margins, margins, margins, margins], axis=1), prompts="p")
    assert list(calibration.lines) == ["A"]
    assert set(calibration.uncalibrated) == {"B", "C", "D", "E"}
    assert "do not rise" in calibration.uncalibrated["B"]
    assert calibration.uncalibrated["C"] == "4 positive and 96 negative patients, but 5 of each are needed"
    assert calibration.uncalibrated["D"] == "96 positive and 4 negative patients, but 5 of each are needed"
    line = calibration.lines["A"]
    assert (line.slope, line.intercept) == fit_line(margins, labels, intercept=True)
    assert line.threshold == metrics.best_threshold(labels, expit(line.slope * margins + line.intercept))
    assert (line.positives, line.n) == (int(labels.sum()), 100)
    assert (calibration.method, calibration.fitted_on, calibration.model, calibration.prompts) == (
        "platt",
        "a split",
        "m",
        "p",
    )
    slope, intercept = calibration.of(["B", "A"])
    assert slope.dtype == intercept.dtype == np.float32
    assert slope == pytest.approx([1, line.slope])
    assert intercept == pytest.approx([0, line.intercept])
    assert calibration.covers(["A"])
    assert not calibration.covers(["A", "B"])
    with pytest.raises(EvaluationError, match="A: the margins of the calibration split do not rise"):
        fitted(labels[:, None], -margins[:, None])
    with pytest.raises(EvaluationError, match="the calibration split has no labels"):
        fitted(np.full((3, 1), np.nan), np.zeros((3, 1)))


def test_five_patients_are_enough_and_volumes_of_four_are_not() -> None:
    labels, margins = split(100, slope=3)
    patients = np.array([f"p{index}" for index in range(100)])
    positive = np.flatnonzero(labels == 1)
    assert len(positive) > 8
    for size, kept in ((4, False), (5, True)):
        people = patients.copy()
        people[positive] = [f"q{index % size}" for index in range(len(positive))]
        both = np.stack([labels, labels], axis=1)
        both[: len(labels) // 2, 1] = np.nan
        if not kept:
            with pytest.raises(EvaluationError, match="4 positive and"):
                fitted(both, np.stack([margins, margins], axis=1), patients=people)
        else:
            calibration = fitted(both, np.stack([margins, margins], axis=1), patients=people)
            assert "A" in calibration.lines
            assert calibration.saw(["q0", "x", "q4", "p1"])[:2] == ["q0", "q4"]
            assert set(calibration.patients) == {digest(person, calibration.salt) for person in people}
    assert fitted(labels[:, None], margins[:, None]).patients == ()


def test_unknown_labels_are_left_out_of_the_fit() -> None:
    labels, margins = split(120)
    table = labels.copy()
    table[::3] = np.nan
    line = fitted(table[:, None], margins[:, None]).lines["A"]
    known = ~np.isnan(table)
    assert (line.slope, line.intercept) == fit_line(margins[known], labels[known], intercept=True)
    assert (line.positives, line.n) == (int(labels[known].sum()), 80)


def test_a_temperature_is_shared_and_a_rare_label_has_none() -> None:
    labels, margins = split(200, offset=0)
    rare = np.zeros(200)
    rare[:3] = 1
    table = np.stack([labels, labels, rare], axis=1)
    calibration = fitted(table, np.stack([margins, 2 * margins, margins], axis=1), method="temperature")
    assert list(calibration.lines) == ["A", "B"]
    assert calibration.lines["A"].slope == calibration.lines["B"].slope > 0
    assert calibration.lines["A"].intercept == 0
    expected = fit_line(np.concatenate([margins, 2 * margins, margins]), np.concatenate([labels, labels, rare]), intercept=False)  # fmt: skip
    assert calibration.lines["A"].slope == pytest.approx(expected[0], rel=1e-6)


def test_calibrated_probabilities_mean_what_they_say() -> None:
    labels, margins = split(4000)
    line = fitted(labels[:, None], margins[:, None]).lines["A"]
    held_out, scores = split(4000, seed=5)
    before = metrics.calibration_error(held_out, expit(scores))
    after = metrics.calibration_error(held_out, expit(line.slope * scores + line.intercept))
    assert after < 0.03 < before


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    labels, margins = split(100)
    table = np.stack([labels, np.zeros(100)], axis=1)
    patients = [f"p{index}" for index in range(100)]
    calibration = fitted(table, np.stack([margins, margins], axis=1), patients=patients)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    assert calibration.uncalibrated
    assert len(digest("p1")) == 12
    assert digest("p1") != digest("p2")
    assert not set(calibration.patients) & {digest(patient) for patient in patients}, (
        "no table made beforehand finds them"
    )
    again = fitted(table, np.stack([margins, margins], axis=1), patients=patients)
    assert not set(again.patients) & set(calibration.patients)
    assert repr(again) == repr(calibration), "who it was fitted on changes no score"
    assert "p17" not in (tmp_path / "calibration.json").read_text()


def test_an_older_file_without_a_salt_still_knows_its_patients(tmp_path: Path) -> None:
    lines = {"A": vars(Line(2.0, 1.0, 0.4, 9, 90))}
    # The first twelve digits of `printf p1 | sha256sum`.
    old = {"method": "platt", "fitted_on": "x", "model": "m", "lines": lines, "patients": ["f64551fcd6f0"]}
    (tmp_path / "calibration.json").write_text(json.dumps(old))
    assert Calibration.load(tmp_path / "calibration.json").saw(["p1", "p2"]) == ["p1"]


def test_a_falling_line_of_an_older_file_is_left_out(tmp_path: Path) -> None:
    rising = Line(2.0, 1.0, 0.4, 9, 90)
    lines = {"A": rising, "B": replace(rising, slope=-0.5), "C": replace(rising, slope=0.0)}
    old = {
        "method": "platt",
        "fitted_on": "x",
        "model": "m",
        "lines": {name: vars(line) for name, line in lines.items()},
    }
    (tmp_path / "calibration.json").write_text(json.dumps(old))
    calibration = Calibration.load(tmp_path / "calibration.json")
    assert calibration.lines == {"A": rising}
    assert set(calibration.uncalibrated) == {"B", "C"}
    assert calibration.patients == ()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    line = {"slope": 1.0, "intercept": 0.0, "threshold": 0.5, "positives": 5, "n": 9}
    for text in ("", "[]", "{}", '{"lines": {"A": {}}}', '{"lines": {}, "method": "platt"}', json.dumps({"method": "platt", "fitted_on": "x", "model": "m", "lines": {"A": line | {"slope": float("nan")}}}), json.dumps({"method": "platt", "fitted_on": "x", "model": "m", "lines": {"A": line}, "prompts": []}), json.dumps({"method": "platt", "fitted_on": "x", "model": "m", "lines": {"A": line | {"slope": 10**400}}})):  # fmt: skip
        path.write_text(text)
        with pytest.raises(EvaluationError, match=r"calibration\.json: not a calibration file"):
            Calibration.load(path)
    with pytest.raises(EvaluationError, match="not a calibration file"):
        Calibration.load(tmp_path / "absent.json")
    path.write_text(json.dumps({"method": "probe", "fitted_on": "x", "model": "m", "patients": [["a"]]}))
    with pytest.raises(EvaluationError, match=r"calibration\.json: cannot be read \(a value is not a text\)"):
        Adaptation.load(path)
