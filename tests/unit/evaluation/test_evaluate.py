"""An evaluation reverses no finding, gives no intervals for one patient, and reports missing parts of a split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from typer.testing import CliRunner

from ctclip.cli import app
from ctclip.evaluation.calibration import Calibration, Line
from ctclip.evaluation.evaluate import evaluate, plain
from ctclip.evaluation.intervals import auroc_interval
from ctclip.evaluation.paired import paired_test
from ctclip.evaluation.protocol import Protocol
from ctclip.evaluation.ranking import ranking_scores
from ctclip.evaluation.run_evaluation import run_evaluation
from ctclip.evaluation.tables import prediction_table, read_predictions, write_predictions
from ctclip.preprocessing.store import VolumeStore

NAMES = ["A", "B"]
PROTOCOL = Protocol(name="p", describes="", labels=("A", "B"), bootstrap=50)


def table(volumes: int, *, patients: int | None = None, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions and labels with one patient per volume, or fewer patients."""
    random = np.random.default_rng(seed)
    truth = random.permuted(np.tile(np.arange(volumes)[:, None] % 2, (1, 2)), axis=0).astype(float)
    margins = random.normal(truth, 1)
    names = [f"v{index}" for index in range(volumes)]
    people = [f"p{index % (patients or volumes)}" for index in range(volumes)]
    identity = pd.DataFrame({"volume": names, "patient": people, "scan": names, "warnings": ""})
    predictions = prediction_table(identity, NAMES, 1 / (1 + np.exp(-margins)), margins, {}, model="m", spec="", prompts="p")  # fmt: skip
    return predictions, pd.DataFrame(truth, columns=NAMES, index=names)


def turned(predictions: pd.DataFrame) -> pd.DataFrame:
    """The same margins, with probabilities from a calibration with negative slope."""
    return predictions.assign(**{name: 1 / (1 + np.exp(predictions[f"margin:{name}"] + 1)) for name in NAMES})


def test_a_turned_calibration_turns_no_ranking() -> None:
    predictions, labels = table(80)
    result = evaluate(turned(predictions), labels, PROTOCOL)["zero_shot"]
    for name in NAMES:
        margin, probability = predictions[f"margin:{name}"], turned(predictions)[name]
        entry = result["auroc"][name]
        assert entry["value"] == pytest.approx(roc_auc_score(labels[name], margin))
        assert entry["average_precision"] == pytest.approx(average_precision_score(labels[name], margin))
        assert entry["brier"] == pytest.approx(brier_score_loss(labels[name], probability))
        limits = auroc_interval(labels[name].to_numpy(), margin.to_numpy(), predictions["patient"].to_numpy())
        assert (entry["lower"], entry["upper"]) == pytest.approx((limits.lower, limits.upper))
        assert entry["intervals"]["average_precision"][0] < entry["average_precision"] < entry["intervals"]["average_precision"][1]  # fmt: skip
    assert result["mean_auroc_interval"][0] < result["mean_auroc"] < result["mean_auroc_interval"][1]
    paired = paired_test(predictions, turned(predictions), labels, PROTOCOL)
    assert paired["mean"]["difference"] == 0


def test_without_margins_probabilities_rank() -> None:
    predictions, labels = table(40)
    without = turned(predictions).drop(columns=["margin:A", "margin:B"])
    result = evaluate(without, labels, PROTOCOL)["zero_shot"]["auroc"]
    assert result["A"]["value"] == pytest.approx(roc_auc_score(labels["A"], without["A"]))
    partly = turned(predictions).drop(columns="margin:A")
    ranking = ranking_scores(partly, PROTOCOL)
    assert np.array_equal(ranking, partly[["A", "margin:B"]].to_numpy())
    united = Protocol(name="p", describes="", labels=("C",), scores={"C": ("A", "B")})
    larger = predictions[["margin:A", "margin:B"]].max(axis=1).to_numpy()
    assert np.array_equal(ranking_scores(predictions.assign(C=0.5), united)[:, 0], larger)


def test_what_is_not_calibrated_is_called_at_one_half_and_named() -> None:
    predictions, labels = table(40)
    calibration = Calibration("platt", "a split", "m", {"A": Line(2.0, 0.0, 0.7, 9, 20)}, uncalibrated={"B": "too few"})
    result = evaluate(predictions, labels, PROTOCOL, calibration=calibration)["zero_shot"]
    assert (result["auroc"]["A"]["threshold"], result["auroc"]["B"]["threshold"]) == (0.7, 0.5)
    assert "not calibrated, with a threshold of 0.5: B (too few)" in result["thresholds"]


def test_few_patients_are_counted_and_marked() -> None:
    predictions, labels = table(60, patients=30)
    labels["B"] = [1.0] * 4 + [0.0] * 56
    result = evaluate(predictions, labels, PROTOCOL)
    first, second = (result["zero_shot"]["auroc"][name] for name in NAMES)
    assert first["interval_trusted"]
    assert not second["interval_trusted"]
    assert (second["positive_patients"], second["negative_patients"]) == (4, 30)
    assert result["zero_shot"]["intervals_not_trusted"] == ["B"]


@pytest.mark.parametrize("volumes", [1, 2, 6])
def test_one_patient_has_values_and_no_intervals(volumes: int) -> None:
    predictions, labels = table(volumes, patients=1)
    result = evaluate(predictions, labels, PROTOCOL)
    zero = result["zero_shot"]
    assert zero["mean_auroc_interval"] == [None, None]
    assert (zero["mean_auroc"] is None) == (volumes == 1)
    for entry in zero["auroc"].values():
        assert entry["lower"] is entry["upper"] is None
        assert not entry["interval_trusted"]
        assert set(map(tuple, entry["intervals"].values())) == {(None, None)}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("volumes", "classes"), [(1, 1), (4, 1), (4, 2)])
def test_the_command_ends_well_on_one_patient(tmp_path: Path, volumes: int, classes: int) -> None:
    predictions, labels = table(volumes, patients=1)
    if classes == 1:
        labels[:] = 1.0
    write_predictions(tmp_path / "p.csv", predictions)
    labels.to_csv(tmp_path / "l.csv", index_label="volume")
    (tmp_path / "p.yaml").write_text("{name: p, describes: two labels, labels: [A, B], bootstrap: 20}")
    arguments = ["evaluate", tmp_path / "p.csv", "--labels", tmp_path / "l.csv", "--protocol", tmp_path / "p.yaml", "--against", tmp_path / "p.csv", "--output", tmp_path / "out"]  # fmt: skip
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == 0, outcome.output
    assert "only one patient: intervals cannot be computed" in outcome.output
    assert ("mean AUROC undefined" in outcome.output) == (classes == 1 or volumes == 1)
    text = (tmp_path / "out" / "metrics.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["paired"]["mean"]["lower"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "undefined to undefined" in page
    assert " nan" not in page


def test_json_holds_no_nan() -> None:
    value = {
        "a": float("nan"),
        1: [np.float64("inf"), (np.int64(3),)],
        "b": np.array([0.5, np.nan]),
        "c": "NaN",
        "d": None,
    }
    assert plain(value) == {"a": None, "1": [None, [3]], "b": [0.5, None], "c": "NaN", "d": None}
    assert isinstance(plain(np.int64(3)), int)


@pytest.mark.parametrize("volumes", ["all", "one-per-scan"])
def test_a_part_of_a_split_is_said_to_be_one(store: Path, tmp_path: Path, volumes: str) -> None:
    cohort = VolumeStore(store).cohort
    valid = cohort[cohort["split"] == "valid"].reset_index(drop=True)
    assert len(valid) > 3
    few = valid.head(3)
    names = ["Emphysema", "Cardiomegaly"]
    random = np.random.default_rng(0)
    margins = random.normal(size=(len(few), 2))
    write_predictions(tmp_path / "p.csv", prediction_table(few.assign(warnings=""), names, 1 / (1 + np.exp(-margins)), margins, {}, model="m", spec=""))  # fmt: skip
    (tmp_path / "p.yaml").write_text(f"{{name: p, describes: x, labels: [Emphysema, Cardiomegaly], bootstrap: 10, volumes: {volumes}}}")  # fmt: skip
    result = run_evaluation(tmp_path / "p.csv", tmp_path / "out", str(tmp_path / "p.yaml"), store=store)
    unit = "scan" if volumes == "one-per-scan" else "volume"
    total, scored = valid[unit].nunique(), few[unit].nunique()
    expected = {
        "names": ["valid"],
        "unit": unit,
        "expected": total,
        "missing": total - scored,
        "in_store": total - scored,
    }
    assert result["split"] == expected
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split"] == expected
    words = f"{total - scored} of the {total} {unit}s of the split valid are not among the predictions"
    assert words in (tmp_path / "out" / "report.html").read_text()
    assert read_predictions(tmp_path / "p.csv")[1] == names
