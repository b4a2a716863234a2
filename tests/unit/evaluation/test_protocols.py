"""Declared protocols, calibration, paired tests and retrieval, each against something written another way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score, roc_curve

from ctclip.config import configs_folder
from ctclip.errors import ConfigError, EvaluationError
from ctclip.evaluation import metrics
from ctclip.evaluation.calibration import Calibration, fit_calibration
from ctclip.evaluation.command import run_calibration, run_evaluation
from ctclip.evaluation.evaluate import evaluate
from ctclip.evaluation.paired import paired_test
from ctclip.evaluation.protocol import Protocol, load_protocol
from ctclip.evaluation.retrieval import precision_by_labels
from ctclip.evaluation.run_report import compare_reports
from ctclip.evaluation.tables import prediction_table, read_labels, write_predictions
from ctclip.findings import FINDINGS


def recorded(volumes: int = 240, seed: int = 0, skill: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions as `ctclip zero-shot` writes them, and CT-RATE labels, of patients with two volumes each."""
    random = np.random.default_rng(seed)
    names = [f"valid_{i // 2 + 1}_a_{i % 2 + 1}" for i in range(volumes)]
    patients = [name.rsplit("_", 2)[0] for name in names]
    truth = np.repeat(np.random.default_rng(1).random((volumes // 2, 18)) < 0.3, 2, axis=0).astype(int)
    margins = random.normal(0, 1, (volumes, 18)) + skill * truth - 2
    identity = pd.DataFrame(
        {"volume": names, "patient": patients, "scan": [f"{p}_a" for p in patients], "warnings": ""}
    )
    scores = 1 / (1 + np.exp(-margins))
    table = prediction_table(identity, list(FINDINGS), scores, margins, {}, model="m", spec="s")
    labels = pd.DataFrame(truth, columns=list(FINDINGS))
    labels.insert(0, "VolumeName", [f"{name}.nii.gz" for name in names])
    return table, labels


def read_back(labels: pd.DataFrame, folder: Path, names: list[str] | None = None) -> pd.DataFrame:
    labels.to_csv(folder / "labels.csv", index=False)
    return read_labels(folder / "labels.csv", names or list(FINDINGS))


def test_every_protocol_file_loads_and_its_labels_are_known() -> None:
    for path in sorted((configs_folder() / "protocols").glob("*.yaml")):
        assert set(load_protocol(path.stem).labels) <= set(FINDINGS)


def test_the_published_protocol_is_scikit_learns_definitions_label_by_label(tmp_path: Path) -> None:
    table, labels = recorded()
    protocol = load_protocol("ct_rate").model_copy(update={"thresholds": "published"})
    found = evaluate(table, read_back(labels, tmp_path), protocol, resamples=20)["zero_shot"]
    for name in FINDINGS:
        truth, score = labels[name].to_numpy(), table[name].to_numpy()
        false_rate, sensitivity, thresholds = roc_curve(truth, score, drop_intermediate=False)
        best = thresholds[np.argmin((1 - sensitivity) ** 2 + false_rate**2)]
        precision, recall, f1, _ = precision_recall_fscore_support(truth, score >= best, average="binary")
        entry = found["auroc"][name]
        assert entry["value"] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
        assert entry["average_precision"] == pytest.approx(average_precision_score(truth, score), abs=1e-12)
        assert entry["threshold"] == pytest.approx(best, abs=1e-12)
        assert (entry["precision"], entry["sensitivity"], entry["f1"]) == pytest.approx(
            (precision, recall, f1), abs=1e-12
        )
        assert entry["lower"] <= entry["value"] <= entry["upper"]
    assert "optimistic" in found["thresholds"]


def test_rad_chestct_columns_are_merged_by_the_mapping(tmp_path: Path) -> None:
    protocol = load_protocol("rad_chestct")
    columns = protocol.columns()
    table = pd.DataFrame(0, index=range(3), columns=columns)
    table.loc[0, "scattered_nod"] = 1
    table.loc[1, "groundglass"] = 1
    table.insert(0, "NoteAcc_DEID", ["trn1", "trn2", "trn3"])
    table = table.drop(columns="emphysema")
    table["emphysema*right_lung"], table["emphysema*left_lung"] = [0, 0, 1], [0, 0, 0]
    table.to_csv(tmp_path / "rad.csv", index=False)
    merged = protocol.merged(read_labels(tmp_path / "rad.csv", columns))
    assert merged["Lung nodule"].tolist() == [1, 0, 0]
    assert merged["Lung opacity"].tolist() == [0, 1, 0]
    assert merged["Emphysema"].tolist() == [0, 0, 1]


def test_platt_is_logistic_regression_and_calibrates(tmp_path: Path) -> None:
    table, labels = recorded(4000)
    margins = table[[f"margin:{name}" for name in FINDINGS]].to_numpy()
    truth = labels[list(FINDINGS)].to_numpy(float)
    fitted = fit_calibration(truth, margins, FINDINGS, method="platt", fitted_on="x", model="m")
    fitted.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == fitted
    line = fitted.lines["Emphysema"]
    column = FINDINGS.index("Emphysema")
    reference = LogisticRegression(C=1e6, tol=1e-10).fit(margins[:, [column]], truth[:, column])
    # Platt's smoothed targets differ from 0 and 1 by one part in the number of positives.
    assert line.slope == pytest.approx(reference.coef_[0, 0], rel=0.02)
    assert line.intercept == pytest.approx(reference.intercept_[0], abs=0.03)
    slope, intercept = fitted.of(FINDINGS)
    other, held = recorded(4000, seed=5)
    probabilities = 1 / (1 + np.exp(-(other[[f"margin:{n}" for n in FINDINGS]].to_numpy() * slope + intercept)))
    before = np.mean([metrics.calibration_error(held[n].to_numpy(), other[n].to_numpy()) for n in FINDINGS])
    after = [metrics.calibration_error(held[n].to_numpy(), probabilities[:, i]) for i, n in enumerate(FINDINGS)]
    assert np.mean(after) < 0.03 < before
    one = fit_calibration(truth, margins, FINDINGS, method="temperature", fitted_on="x", model="m")
    assert len({line.slope for line in one.lines.values()}) == 1


def test_thresholds_come_from_the_calibration_split_never_from_the_test(tmp_path: Path) -> None:
    table, labels = recorded()
    write_predictions(tmp_path / "calibration.csv", table)
    labels.to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "model").mkdir()
    fitted = run_calibration(tmp_path / "calibration.csv", tmp_path / "model", model_hash="m", labels=tmp_path / "labels.csv")  # fmt: skip
    test, held = recorded(seed=3)
    write_predictions(tmp_path / "test.csv", test)
    held.to_csv(tmp_path / "held.csv", index=False)
    found = run_evaluation(
        tmp_path / "test.csv", tmp_path / "out", "ct_rate", labels=tmp_path / "held.csv",
        calibration=tmp_path / "model" / "calibration.json", bootstrap=10,
    )  # fmt: skip
    for name in FINDINGS:
        assert found["zero_shot"]["auroc"][name]["threshold"] == fitted.lines[name].threshold
    assert "calibration split" in found["zero_shot"]["thresholds"]
    with pytest.raises(EvaluationError, match="not predictions of"):
        run_calibration(
            tmp_path / "calibration.csv", tmp_path / "model", model_hash="n", labels=tmp_path / "labels.csv"
        )


def test_paired_test_sees_a_better_model_and_not_a_copy(tmp_path: Path) -> None:
    ours, labels = recorded(skill=1.5)
    theirs, _ = recorded(seed=9, skill=0.5)
    truth = read_back(labels, tmp_path)
    protocol = load_protocol("ct_rate")
    found = paired_test(ours, theirs.sample(frac=1, random_state=0), truth, protocol, resamples=400)
    assert found["mean"]["lower"] > 0
    assert found["mean"]["p"] <= 2 / 401 + 1e-12
    same = paired_test(ours, ours, truth, protocol, resamples=50)
    assert same["mean"]["difference"] == 0
    assert same["mean"]["p"] == 1
    with pytest.raises(EvaluationError, match="different volumes"):
        paired_test(ours, theirs.head(100), truth, protocol, resamples=10)


def test_map_by_labels_is_the_brute_force_one() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(30, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = (random.random((30, 3)) < 0.5).astype(float)
    scans = np.repeat(np.arange(15), 2)
    found = precision_by_labels(vectors, labels, scans, (5, 10))
    for k in (5, 10):
        values = []
        for query in range(30):
            others = sorted(
                (j for j in range(30) if scans[j] != scans[query]), key=lambda j: -(vectors[query] @ vectors[j])
            )
            mine = {i for i in range(3) if labels[query, i]}
            hits = []
            for j in others[:k]:
                theirs = {i for i in range(3) if labels[j, i]}
                union = mine | theirs
                hits.append(not union or len(mine & theirs) / len(union) >= 0.5)
            precisions = [sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit]
            values.append(sum(precisions) / len(precisions) if precisions else 0.0)
        assert found[f"map@{k}"] == pytest.approx(np.mean(values), abs=1e-12)


def test_two_evaluations_on_one_page_and_their_protocols_told_apart(tmp_path: Path) -> None:
    for folder, protocol, skill in (("one", "ct_rate", 1.0), ("two", "ct_rate_16", 0.5)):
        table, labels = recorded(skill=skill)
        write_predictions(tmp_path / f"{folder}.csv", table)
        labels.to_csv(tmp_path / "labels.csv", index=False)
        run_evaluation(
            tmp_path / f"{folder}.csv", tmp_path / folder, protocol, labels=tmp_path / "labels.csv", bootstrap=10
        )
    page = compare_reports(tmp_path / "one", tmp_path / "two", tmp_path / "page.html").read_text()
    assert "Not the same protocol" in page
    assert "label-supervised" in page or "labels derived from the reports" in page
    assert "http" not in page.replace("http-equiv", "")
    with pytest.raises(EvaluationError, match=r"no metrics\.json"):
        compare_reports(tmp_path, None, tmp_path / "x.html")


def test_bad_tables_are_named(tmp_path: Path) -> None:
    table, labels = recorded(40)
    for change, said in (
        (lambda t: t.rename(columns={"Emphysema": "emphysema"}), "'Emphysema'"),
        (lambda t: t.assign(Emphysema=2), "other than 0 and 1"),
        (lambda t: pd.concat([t, t.head(1)]), "twice"),
    ):
        with pytest.raises(EvaluationError, match=said):
            read_back(change(labels), tmp_path)
    alone = labels.assign(Emphysema=0)
    found = evaluate(table, read_back(alone, tmp_path), load_protocol("ct_rate"), resamples=10)["zero_shot"]
    assert found["auroc"]["Emphysema"]["value"] is None
    assert found["labels_undefined"] == ["Emphysema"]
    assert json.dumps(found)
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml"):
        load_protocol(str(path))
    path.write_text("{name: x, describes: x, labels: [A], mapping: {B: [b]}}")
    with pytest.raises(ConfigError, match="not among the labels"):
        load_protocol(str(path))


def test_union_of_columns_is_unknown_only_where_it_must_be() -> None:
    protocol = Protocol(name="p", describes="", labels=("A",), mapping={"A": ("x", "y")})
    values = [0.0, 1.0, np.nan]
    table = pd.DataFrame(list(itertools.product(values, values)), columns=["x", "y"])
    expected = [max(pair) if 1.0 in pair or not np.isnan(pair).any() else np.nan for pair in table.to_numpy().tolist()]
    expected = [1.0 if 1.0 in pair else value for pair, value in zip(table.to_numpy().tolist(), expected, strict=True)]
    assert np.array_equal(protocol.merged(table)["A"].to_numpy(float), np.array(expected), equal_nan=True)
