"""Intervals of calibrated probabilities cover the probability that is known by construction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from sklearn.linear_model import LogisticRegression

from ctclip.errors import EvaluationError
from ctclip.evaluation.calibration import Calibration, Line, fit_calibration, fit_line
from ctclip.evaluation.calibration_interval import QUANTILE, line_covariance, probability_limits
from ctclip.evaluation.tables import check_names, prediction_table, read_predictions, write_predictions
from ctclip.inference.show import Detection
from ctclip.serve.findings import of_detection

SHARES = np.array([0.02, 0.1, 0.3, 0.5, 0.7, 0.9])


def drawn(
    random: np.random.Generator, patients: int, prevalence: float, distance: float, most: int, alike: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, truth and patients. Margins are normal in each class, of width 1 and means ``distance`` apart, so the
    logit of the probability is distance * margin + logit(prevalence) exactly; the margins of one patient, 1 to
    ``most``, correlate by ``alike``."""
    truth = (random.random(patients) < prevalence).astype(float)
    member = np.repeat(np.arange(patients), random.integers(1, most + 1, patients))
    noise = np.sqrt(alike) * random.normal(size=patients)[member] + np.sqrt(1 - alike) * random.normal(size=len(member))
    return distance * (truth[member] - 0.5) + noise, truth[member], member


@pytest.mark.parametrize(
    ("patients", "prevalence", "distance", "most", "alike"),
    [
        (220, 0.2, 1.5, 3, 0.8),  # as the demo: 219 patients, 346 volumes
        (400, 0.1, 3.0, 1, 0.0),  # AUROC 0.98, where smoothed targets shift the line
    ],
)
def test_ninety_five_in_a_hundred_cover(
    patients: int, prevalence: float, distance: float, most: int, alike: float
) -> None:
    """At margins whose true probabilities are ``SHARES``."""
    random = np.random.default_rng(3)
    at = (logit(SHARES) - logit(prevalence)) / distance
    covered = []
    while len(covered) < 150:
        margin, truth, member = drawn(random, patients, prevalence, distance, most, alike)
        slope, intercept = fit_line(margin, truth, intercept=True)
        lower, upper = probability_limits(
            at, slope, intercept, line_covariance(margin, truth, member, slope, intercept)
        ).T
        covered.append((lower <= SHARES) & (upper >= SHARES))
    assert 0.92 <= np.mean(covered) <= 0.98


def test_with_many_independent_volumes_it_is_the_inverse_information() -> None:
    """Compared with scikit-learn's fit without a penalty, by central differences of its probabilities."""
    margin, truth, member = drawn(np.random.default_rng(1), 20_000, 0.3, 1.5, 1, 0.0)
    margin = 7 + 3 * margin
    slope, intercept = fit_line(margin, truth, intercept=True)
    fitted = LogisticRegression(C=1e9, tol=1e-10).fit(margin[:, None], truth).predict_proba(margin[:, None])[:, 1]
    design = np.stack([margin, np.ones_like(margin)], axis=1)
    expected = np.linalg.inv(design.T @ (design * (fitted * (1 - fitted))[:, None]))
    covariance = line_covariance(margin, truth, member, slope, intercept)
    assert covariance == pytest.approx((expected[0, 0], expected[0, 1], expected[1, 1]), rel=0.05)


def test_volumes_repeated_tell_no_more_than_one() -> None:
    margin, truth, member = drawn(np.random.default_rng(2), 300, 0.3, 1.5, 1, 0.0)
    slope, intercept = fit_line(margin, truth, intercept=True)
    once = line_covariance(margin, truth, member, slope, intercept)
    four = [np.repeat(values, 4) for values in (margin, truth, member)]
    slope, intercept = fit_line(*four[:2], intercept=True)
    assert once is not None
    assert line_covariance(*four, slope, intercept) == pytest.approx(once, rel=0.1, abs=0.002)  # type: ignore[arg-type]
    of_volumes = line_covariance(four[0], four[1], np.arange(len(four[0])), slope, intercept)
    assert of_volumes is not None
    assert of_volumes[0] < once[0] / 3


def test_limits_are_the_delta_method_on_the_logit() -> None:
    limits = probability_limits(np.array([-1.0, 2.0]), 2.0, 1.0, (0.04, -0.01, 0.09))
    errors = np.sqrt([0.04 + 0.02 + 0.09, 0.16 - 0.04 + 0.09])
    np.testing.assert_allclose(logit(limits).mean(axis=1), [-1.0, 5.0])
    np.testing.assert_allclose(np.diff(logit(limits))[:, 0], 2 * QUANTILE * errors)
    far = probability_limits(np.array([-1e6, 1e6]), 2.0, 1.0, (0.04, -0.01, 0.09))
    assert np.isfinite(far).all()


def fitted(method: str = "platt") -> Calibration:
    margin, truth, member = drawn(np.random.default_rng(4), 200, 0.3, 1.5, 2, 0.5)
    labels, margins = np.stack([truth, np.zeros_like(truth)], axis=1), np.stack([margin, margin], axis=1)
    return fit_calibration(labels, margins, ["A", "B"], method=method, fitted_on="x", model="m", patients=member.astype(str))  # type: ignore[arg-type]  # fmt: skip


def test_only_a_line_of_its_own_has_an_interval(tmp_path: Path) -> None:
    calibration = fitted()
    limits = calibration.limits(["B", "A"], np.array([[0.5, 0.5], [9.0, -9.0]]))
    assert np.isnan(limits[:, 0]).all()
    line = calibration.lines["A"]
    np.testing.assert_array_equal(limits[:, 1], line.limits(np.array([0.5, -9.0])))
    assert (limits[:, 1, 0] < limits[:, 1, 1]).all()
    assert fitted("temperature").lines["A"].covariance is None
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json").lines["A"] == line


def test_files_without_a_covariance_still_load_and_damaged_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    line = {"slope": 1.0, "intercept": 0.0, "threshold": 0.5, "positives": 5, "n": 9}
    facts = {"method": "platt", "fitted_on": "x", "model": "m"}
    path.write_text(json.dumps({**facts, "lines": {"A": line}}))
    calibration = Calibration.load(path)
    assert calibration.lines["A"] == Line(1.0, 0.0, 0.5, 5, 9)
    assert np.isnan(calibration.limits(["A"], np.zeros((1, 1)))).all()
    for wrong in ([1, 2], "abc", 1, [1.0, 0.0, float("nan")], [-1.0, 0.0, 1.0], [1.0, 5.0, 1.0], [1, 0, None]):
        path.write_text(json.dumps({**facts, "lines": {"A": line | {"covariance": wrong}}}))
        with pytest.raises(EvaluationError, match=r"calibration\.json: not a calibration file"):
            Calibration.load(path)


def test_a_table_of_predictions_keeps_the_limits_of_calibrated_findings_alone(tmp_path: Path) -> None:
    margins = np.array([[0.5, 1.0], [-2.0, 0.0]])
    limits = fitted().limits(["A", "B"], margins)
    identity = pd.DataFrame({"volume": ["v", "w"], "patient": ["p", "q"], "scan": ["v", "w"], "warnings": ""})
    table = prediction_table(identity, ["A", "B"], np.full((2, 2), 0.5), margins, {}, intervals=limits, model="m", spec="s")  # fmt: skip
    write_predictions(tmp_path / "predictions.csv", table)
    again, names = read_predictions(tmp_path / "predictions.csv")
    assert names == ["A", "B"]
    np.testing.assert_allclose(again[["lower:A", "upper:A"]], limits[:, 0], rtol=1e-6)
    assert not {"lower:B", "upper:B"} & set(again.columns)
    with pytest.raises(EvaluationError, match="cannot name a finding"):
        check_names(["upper:A"])


def test_a_detection_shows_the_intervals_it_has() -> None:
    shares = {"probabilities": {"A": 0.62, "B": 0.4}, "margins": {"A": 1.0, "B": -1.0}, "values": {}}
    facts = {"scan": "s", "calibrated": "calibrated, except B", "model": "m", "spec": "s", **shares}
    detection = Detection(**facts, thresholds={"A": 0.5}, intervals={"A": (0.41, 0.793)})
    line_a, line_b = [line for line in str(detection).splitlines() if line[:1] in "AB" and line[1:2] == " "][:2]
    assert "62.0%*" in line_a
    assert "41.0% to 79.3%" in line_a
    assert " to " not in line_b
    assert line_a.index("+1.00") == line_b.index("-1.00")
    assert "41.0% to 79.3%" in detection._repr_html_()
    assert list(detection.frame().loc["A"]) == [0.62, 0.41, 0.793, 1.0, 0.5]
    assert detection.frame().loc["B"].isna().sum() == 3
    assert [one["interval"] for one in of_detection(detection)["findings"]] == [(0.41, 0.793), None]
    assert "interval" not in str(Detection(**facts))
