"""Declared protocols, calibration, paired tests and retrieval, each compared with an independent implementation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from ctclip.config_files import configs_folder
from ctclip.errors import ConfigError, EvaluationError
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.charts import Series, auroc_chart
from ctclip.evaluation.evaluate import evaluate
from ctclip.evaluation.pages import label_table
from ctclip.evaluation.protocol import Protocol, default_protocol, load_protocol
from ctclip.evaluation.run_calibration import run_calibration
from ctclip.evaluation.run_evaluation import run_evaluation
from ctclip.evaluation.run_report import compare_reports
from ctclip.evaluation.tables import embedding_table, prediction_table, read_labels, write_predictions
from ctclip.labels import load_labels
from ctclip.phantom.prevalence import FINDINGS


def recorded(volumes: int = 240, seed: int = 0, skill: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions as `ctclip zero-shot` writes them, and CT-RATE labels, for patients with two volumes each."""
    random = np.random.default_rng(seed)
    names = [f"valid_{i // 2 + 1}_a_{i % 2 + 1}" for i in range(volumes)]
    patients = [name.rsplit("_", 2)[0] for name in names]
    truth = np.repeat(np.random.default_rng(1).random((volumes // 2, 18)) < 0.3, 2, axis=0).astype(int)
    margins = random.normal(0, 1, (volumes, 18)) + skill * truth - 2
    identity = pd.DataFrame(
        {"volume": names, "patient": patients, "scan": [f"{p}_a" for p in patients], "warnings": ""}
    )
    scores = 1 / (1 + np.exp(-margins))
    table = prediction_table(identity, list(FINDINGS), scores, margins, {}, model="m", spec="s", prompts="p")
    labels = pd.DataFrame(truth, columns=list(FINDINGS))
    labels.insert(0, "VolumeName", [f"{name}.nii.gz" for name in names])
    return table, labels


def read_back(labels: pd.DataFrame, folder: Path, names: list[str] | None = None) -> pd.DataFrame:
    labels.to_csv(folder / "labels.csv", index=False)
    return read_labels(folder / "labels.csv", names or list(FINDINGS))


def test_every_protocol_file_loads_and_its_labels_are_known() -> None:
    for path in sorted((configs_folder() / "protocols").glob("*.yaml")):
        assert set(load_protocol(path.stem).predicted()) <= set(FINDINGS)


def threshold_of_the_scripts(scores: np.ndarray, truth: np.ndarray) -> float:
    """The protocol of CT-CLIP's successors, by counting: of 100 thresholds, the last of those nearest to the corner."""
    thresholds = np.linspace(0, 1, 100)
    called, present = scores[:, None] > thresholds, truth[:, None] == 1
    missed = (~called & present).sum(axis=0) / present.sum()
    wrong = (called & ~present).sum(axis=0) / (~present).sum()
    distance = np.sqrt(missed**2 + wrong**2)
    return float(thresholds[np.flatnonzero(distance <= distance.min() + 1e-12)[-1]])


@pytest.mark.parametrize("tied", [False, True])
def test_the_published_protocol_is_scikit_learns_definitions_label_by_label(tmp_path: Path, tied: bool) -> None:
    table, labels = recorded()
    if tied:
        table[list(FINDINGS)] = table[list(FINDINGS)].round(2)
        table = table[[column for column in table.columns if not column.startswith("margin:")]]
    protocol = load_protocol("ct_rate").model_copy(update={"thresholds": "published"})
    found = evaluate(table, read_back(labels, tmp_path), protocol, resamples=20)["zero_shot"]
    called = {}
    for name in FINDINGS:
        truth, score = labels[name].to_numpy(), table[name].to_numpy()
        called[name] = score > threshold_of_the_scripts(score, truth)
        expected = {
            "value": roc_auc_score(truth, score), "average_precision": average_precision_score(truth, score),
            "f1": f1_score(truth, called[name]), "weighted_f1": f1_score(truth, called[name], average="weighted"),
            "accuracy": accuracy_score(truth, called[name]), "precision": precision_score(truth, called[name]),
            "sensitivity": recall_score(truth, called[name]), "specificity": recall_score(truth, called[name], pos_label=0),
            "brier": brier_score_loss(truth, score),
        }  # fmt: skip
        for metric, value in expected.items():
            assert found["auroc"][name][metric] == pytest.approx(value, abs=1e-12), (name, metric)
        assert found["auroc"][name]["lower"] <= found["auroc"][name]["value"] <= found["auroc"][name]["upper"]
    for average in ("macro", "micro", "weighted"):
        expected = f1_score(labels[list(FINDINGS)], pd.DataFrame(called)[list(FINDINGS)], average=average)
        assert found["f1"][average] == pytest.approx(expected, abs=1e-12)
    error = found["means"]["calibration_error"]
    assert error["interval"][0] <= error["value"] <= error["interval"][1]
    assert "optimistic" in found["thresholds"]


def test_rad_chestct_as_published_takes_the_larger_of_two_scores(tmp_path: Path) -> None:
    protocol = load_protocol("rad_chestct_published")
    table, _ = recorded(60)
    truth = pd.DataFrame(np.random.default_rng(3).integers(0, 2, (60, len(protocol.columns()))), columns=protocol.columns())  # fmt: skip
    truth.insert(0, "NoteAcc_DEID", table["volume"])
    truth.to_csv(tmp_path / "rad.csv", index=False)
    labels = protocol.merged(read_labels(tmp_path / "rad.csv", protocol.columns()))
    found = evaluate(table, labels, protocol, resamples=10)["zero_shot"]["auroc"]
    larger = np.maximum(table["Arterial wall calcification"], table["Coronary artery wall calcification"])
    assert found["Calcification"]["value"] == pytest.approx(roc_auc_score(truth["calcification"], larger), abs=1e-12)
    assert len(found) == 16
    assert "Mosaic attenuation pattern" not in found


def test_one_reconstruction_a_scan_holds_for_everything(tmp_path: Path) -> None:
    table, labels = recorded(60)
    vectors = np.random.default_rng(0).normal(size=(60, 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pq.write_table(embedding_table(list(table["volume"]), volume_embedding=unit, report_embedding=unit), tmp_path / "embeddings.parquet")  # fmt: skip
    write_predictions(tmp_path / "p.csv", table)
    labels.to_csv(tmp_path / "labels.csv", index=False)
    found = run_evaluation(tmp_path / "p.csv", tmp_path / "out", "ct_rate_one_per_scan", labels=tmp_path / "labels.csv", bootstrap=10)  # fmt: skip
    assert found["volumes"] == 30
    assert found["whole_set"] is False
    assert found["retrieval"]["volume_to_volume"]["pool"] == 30
    rows = pd.read_csv(tmp_path / "out" / "metrics.csv", index_col=0)
    first = table[table["volume"].str.endswith("_1")]
    truth = labels.loc[first.index, "Emphysema"]
    assert rows.at["Emphysema", "auroc"] == pytest.approx(roc_auc_score(truth, first["Emphysema"]), abs=1e-12)
    assert rows.at["mean of 18", "auroc"] == pytest.approx(rows["auroc"].iloc[:18].mean(), abs=1e-12)
    assert (tmp_path / "out" / "reliability.png").is_file()


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


def test_thresholds_come_from_the_calibration_split_never_from_the_test(tmp_path: Path, capsys) -> None:
    table, labels = recorded()
    write_predictions(tmp_path / "calibration.csv", table)
    labels.to_csv(tmp_path / "labels.csv", index=False)
    kept = tmp_path / "model" / "heads" / "prompts" / "calibration.json"
    kept.parent.mkdir(parents=True)
    fitted = run_calibration(tmp_path / "calibration.csv", tmp_path / "model", kept, model_hash="m", labels=tmp_path / "labels.csv")  # fmt: skip
    test, held = recorded(seed=3)
    write_predictions(tmp_path / "test.csv", test)
    arguments = {
        "labels": tmp_path / "labels.csv",
        "calibration": kept,
        "bootstrap": 10,
    }
    with pytest.raises(EvaluationError, match="must not come from the test set"):
        run_evaluation(tmp_path / "test.csv", tmp_path / "out", "ct_rate", **arguments)
    for frame, column in ((test, "patient"), (test, "volume"), (held, "VolumeName")):
        frame[column] = "other_" + frame[column]
    write_predictions(tmp_path / "prompts.csv", test.assign(prompts="x"))
    with pytest.raises(EvaluationError, match="run `ctclip calibrate` again"):
        run_evaluation(tmp_path / "prompts.csv", tmp_path / "out", "ct_rate", **arguments)
    write_predictions(tmp_path / "test.csv", test)
    held.to_csv(tmp_path / "held.csv", index=False)
    found = run_evaluation(
        tmp_path / "test.csv", tmp_path / "out", "ct_rate", labels=tmp_path / "held.csv",
        calibration=kept, bootstrap=10,
    )  # fmt: skip
    for name in FINDINGS:
        assert found["zero_shot"]["auroc"][name]["threshold"] == fitted.lines[name].threshold
    assert "calibration split" in found["zero_shot"]["thresholds"]
    assert "cannot be checked" not in capsys.readouterr().err
    given = tmp_path / "given.json"
    Calibration.load(kept).without_patients().save(given)
    run_evaluation(
        tmp_path / "test.csv",
        tmp_path / "out",
        "ct_rate",
        **arguments | {"labels": tmp_path / "held.csv", "calibration": given},
    )
    assert "it cannot be checked whether some of them are in this test set" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match="not predictions of"):
        run_calibration(
            tmp_path / "calibration.csv", tmp_path / "model", kept, model_hash="n", labels=tmp_path / "labels.csv"
        )


def test_two_evaluations_on_one_page_and_their_protocols_told_apart(tmp_path: Path) -> None:
    for folder, protocol, skill in (("one", "ct_rate", 1.0), ("two", "ct_rate_16", 0.5)):
        table, labels = recorded(skill=skill)
        write_predictions(tmp_path / f"{folder}.csv", table)
        labels.to_csv(tmp_path / "labels.csv", index=False)
        run_evaluation(
            tmp_path / f"{folder}.csv", tmp_path / folder, protocol, labels=tmp_path / "labels.csv", bootstrap=10
        )
    page = compare_reports(tmp_path / "one", tmp_path / "two", tmp_path / "page.html").read_text()
    assert "The protocols differ" in page
    assert "18 labels, with Medical material, Lymphadenopathy" in page
    assert "mean over the 16 common labels" in page
    assert "16 labels, here 18" in page
    assert "not the 3,039 of the protocol&#39;s set" in page
    assert "http" not in page.replace("http-equiv", "")
    with pytest.raises(EvaluationError, match=r"no metrics\.json"):
        compare_reports(tmp_path, None, tmp_path / "x.html")
    file = tmp_path / "two" / "metrics.json"
    whole = json.loads(file.read_text())
    for change in ({"protocol": {}}, {"volumes": None}, {"zero_shot": []}, {"zero_shot": {"auroc": {"a": 3}}}, {"retrieval": "x"}):  # fmt: skip
        file.write_text(json.dumps(whole | change))
        with pytest.raises(EvaluationError, match=r"two/metrics\.json: does not hold what `ctclip evaluate` writes"):
            compare_reports(tmp_path / "one", tmp_path / "two", tmp_path / "damaged.html")
    assert not (tmp_path / "damaged.html").exists()


def test_bad_tables_are_named(tmp_path: Path) -> None:
    table, labels = recorded(40)
    for change, said in (
        (lambda t: t.rename(columns={"Emphysema": "emphysema"}), "no label column 'Emphysema' .it has 'emphysema'"),
        (lambda t: t.assign(Emphysema=2), "'Emphysema' holds .*'2' .line 2.; labels are 0, 1, or empty"),
        (lambda t: t.assign(Emphysema="seen"), "'Emphysema' holds .*'seen'"),
        (lambda t: pd.concat([t, t.head(1)]), "twice"),
    ):
        with pytest.raises(EvaluationError, match=said):
            read_back(change(labels), tmp_path)
    alone = labels.assign(Emphysema=0)
    found = evaluate(table, read_back(alone, tmp_path), load_protocol("ct_rate"), resamples=10)["zero_shot"]
    assert found["auroc"]["Emphysema"]["value"] is None
    assert found["labels_undefined"] == ["Emphysema"]
    assert found["auroc"]["Emphysema"]["sensitivity"] is None
    assert found["means"]["sensitivity"]["labels"] == 17
    assert json.dumps(found)
    alone.assign(**dict.fromkeys(FINDINGS, 0)).to_csv(tmp_path / "none.csv", index=False)
    write_predictions(tmp_path / "p.csv", table)
    nothing = run_evaluation(
        tmp_path / "p.csv", tmp_path / "out", "ct_rate", labels=tmp_path / "none.csv", bootstrap=10
    )
    assert nothing["zero_shot"]["mean_auroc"] is None
    assert "undefined" in (tmp_path / "out" / "report.html").read_text()
    unknown = evaluate(
        table, read_back(labels.assign(Emphysema=None), tmp_path), load_protocol("ct_rate"), resamples=10
    )
    assert unknown["zero_shot"]["auroc"]["Emphysema"]["n"] == 0
    assert unknown["zero_shot"]["labels_defined"] == 17
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml"):
        load_protocol(str(path))
    path.write_text("{name: x, describes: x, labels: [A], mapping: {B: [b]}}")
    with pytest.raises(ConfigError, match="not among the labels"):
        load_protocol(str(path))
    for line in ("columns_of: [A]", "without: 3", "without: {A: [1]}", "mapping: 3"):
        path.write_text(f"{{name: x, describes: x, labels: ct_rate_18, {line}}}")
        with pytest.raises(ConfigError, match=r"empty\.yaml: ") as error:
            load_protocol(str(path))
        assert "\n" not in str(error.value)


def test_union_of_columns_is_unknown_only_where_it_must_be() -> None:
    protocol = Protocol(name="p", describes="", labels=("A",), mapping={"A": ("x", "y")})
    values = [0.0, 1.0, np.nan]
    table = pd.DataFrame(list(itertools.product(values, values)), columns=["x", "y"])
    expected = [max(pair) if 1.0 in pair or not np.isnan(pair).any() else np.nan for pair in table.to_numpy().tolist()]
    expected = [1.0 if 1.0 in pair else value for pair, value in zip(table.to_numpy().tolist(), expected, strict=True)]
    assert np.array_equal(protocol.merged(table)["A"].to_numpy(float), np.array(expected), equal_nan=True)


def test_a_label_that_the_control_cannot_be_fitted_to_is_undefined_in_the_table() -> None:
    known = {"value": 0.8, "lower": 0.7, "upper": 0.9, "positives": 3, "n": 15}
    head, row = label_table({"Cardiomegaly": known}, {"Cardiomegaly": float("nan")})
    assert (head[-1], row[-1]) == ("histogram control", "undefined")


def test_a_protocol_names_a_label_set() -> None:
    """All labels of the set except those excluded; for another cohort, the labels for which it has columns."""
    sixteen = load_protocol("ct_rate_16")
    assert set(FINDINGS) - set(sixteen.labels) == {"Medical material", "Lymphadenopathy"}
    assert [name for name in FINDINGS if name in sixteen.labels] == list(sixteen.labels)
    values = {"name": "p", "describes": "", "labels": "ct_rate_18"}
    elsewhere = Protocol.model_validate(values | {"columns_of": "rad_chestct"})
    assert elsewhere.mapping["Lung nodule"] == ("nodule", "nodulegr1cm", "scattered_nod")
    assert set(FINDINGS) - set(elsewhere.labels) == {"Medical material", "Mosaic attenuation pattern"}
    with pytest.raises(ValueError, match="without: 'Gallstones' is not a label of 'ct_rate_18'"):
        Protocol.model_validate(values | {"without": ["Gallstones"]})


def test_without_a_protocol_the_label_set_says_what_is_scored() -> None:
    """The set's own protocol; if it has none, or some of its labels were not predicted, the predicted labels, in their
    columns."""
    ours, columns = load_labels("ct_rate_18"), list(FINDINGS)
    assert default_protocol(ours, "", columns, columns) == load_protocol("ct_rate")
    assert default_protocol(None, ours.identity, columns, columns) == load_protocol("ct_rate")
    part = default_protocol(ours, "", columns, ["Emphysema", "Lung nodule", "Mass"])
    assert part.labels == ("Emphysema", "Lung nodule")
    abdomen = load_labels("merlin_30")
    scored = default_protocol(abdomen, "", ["free_air", "Ascites", "age"], ["Ascites", "Free air", "Fracture"])
    assert scored.labels == ("Ascites", "Free air")
    assert scored.mapping == {"Free air": ("free_air",)}
    assert default_protocol(None, "", ["x", "Stones"], ["Stones", "y"]).labels == ("Stones",)
    with pytest.raises(EvaluationError, match=r"none of the predicted names \(y \.\.\.\) has a column"):
        default_protocol(None, "", ["x"], ["y"])


def test_a_chart_has_every_value_where_it_belongs() -> None:
    """From 0.4, the tenth below the lowest limit, to 1; a label without a value has no row."""
    per_label = {
        "Nodule": {"value": 0.7, "lower": 0.46, "upper": 0.85},
        "Effusion": {"value": 1.0, "lower": float("nan"), "upper": None},
        "Hernia": {"value": None, "lower": None, "upper": None},
    }
    chart = auroc_chart(Series("ours", per_label), Series("control", {"Nodule": {"value": 0.55}}), {"Nodule": "12"})
    assert [row["name"] for row in chart["rows"]] == ["Effusion", "Nodule (12)"]
    assert chart["rows"][0]["marks"] == [{"kind": "first", "left": 100.0, "start": 0, "width": None}]
    assert chart["rows"][1]["marks"] == [
        {"kind": "first", "left": 50.0, "start": 10.0, "width": 65.0},
        {"kind": "second hollow", "left": 25.0, "start": 0, "width": None},
    ]
    assert chart["rows"][1]["words"] == "Nodule: ours 0.700 (0.460 to 0.850); control 0.550"
    assert [tick["value"] for tick in chart["ticks"]] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
