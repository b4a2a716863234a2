"""Prediction and label tables: tables that are read back, and tables that are refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctclip.errors import EvaluationError
from ctclip.evaluation.evaluate import evaluate
from ctclip.evaluation.protocol import Protocol
from ctclip.evaluation.tables import (
    binary_columns,
    embedding_table,
    prediction_table,
    read_embeddings,
    read_labels,
    read_predictions,
    write_predictions,
)

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
        (lambda t: t.assign(**{"margin:B": np.nan}), "margin:B"),
        (lambda t: t.assign(**{"margin:A": "high"}), "margin:A"),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolons.csv", "VolumeName;sex;A;B\nv0.nii.gz;1;1;0\nv1.nii.gz;0;;1\n"),
        ("tabs.tsv", "VolumeName\tsex\tA\tB\nv0\t1\t1\t0\nv1\t0\t\t1\n"),
        ("mark.csv", "\ufeffVolumeName,sex,A,B\nv0,1,1,0\nv1,0,,1\n"),
        ("pandas.csv", "Unnamed: 0,VolumeName,sex,A,B\n0,v0,1,1,0\n1,v1,0,,1\n"),
        ("words.csv", "VolumeName,sex,A,B\n v0.nii.gz ,1,True,no\nv1.mha,0,not given,yes\n"),
        ("both.csv", "volume,VolumeName,sex,A,B\nv0,a.nii.gz,1,1.0,0\nv1,b.nii.gz,0,,1.0\n"),
    ],
)
def test_label_tables_of_strangers_are_read_as_cohort_tables_are(tmp_path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    labels = read_labels(tmp_path / name, ["A", "B"])
    assert labels.index.tolist() == ["v0", "v1"]
    np.testing.assert_array_equal(labels.to_numpy(), [[1, 0], [np.nan, 1]])
    assert binary_columns(tmp_path / name).labels == ["A", "B"]


def test_a_column_that_describes_the_patient_is_a_label_only_by_name(tmp_path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("volume,contrast,A\nv0,1,0\nv1,0,1\n")
    assert binary_columns(path).metadata == {"contrast": "describes the patient or the scan"}
    assert binary_columns(path, ["contrast"]).labels == ["contrast"]
    path.write_text("volume,contrast\nv0,1\n")
    with pytest.raises(EvaluationError, match="--column"):
        binary_columns(path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_predictions_saved_again_by_a_spreadsheet_are_read(tmp_path, separator: str) -> None:
    original = table().assign(volume=[f"v{index}.nii.gz" for index in range(6)])
    original.to_csv(tmp_path / "p.csv", sep=separator, encoding="utf-8-sig")
    again, names = read_predictions(tmp_path / "p.csv")
    assert names == ["A", "B"]
    assert again["volume"].tolist() == [f"v{index}" for index in range(6)]
    np.testing.assert_array_equal(again[["A", "margin:B"]], table()[["A", "margin:B"]])
    original.to_csv(tmp_path / "p.csv", sep=";", decimal=",", index=False)
    np.testing.assert_array_equal(read_predictions(tmp_path / "p.csv")[0]["A"], table()["A"])
    broken = original.assign(A=["0;5", *original["A"][1:]])
    broken.to_csv(tmp_path / "p.csv", sep=";", index=False)
    with pytest.raises(EvaluationError, match=r"'A' holds '0;5' \(line 2\)"):
        read_predictions(tmp_path / "p.csv")


def test_a_scan_may_be_called_as_missing_values_are(tmp_path) -> None:
    """NA.nii.gz and null.nii.gz are ordinary file names."""
    names = ["NA", "null", "nan", "1", "01", "None"]
    for name in ("p.csv", "p.parquet"):
        write_predictions(tmp_path / name, table().assign(volume=names, patient=names, scan=names))
        assert read_predictions(tmp_path / name)[0]["volume"].tolist() == names


def test_embeddings_that_are_damaged_are_told(tmp_path) -> None:
    path = tmp_path / "embeddings.parquet"
    good = embedding_table(["a", "b"], volume_embedding=np.eye(2), report_embedding=np.full((2, 2), np.nan))
    pq.write_table(good, path)
    arrays = read_embeddings(path)
    assert arrays["volume"].tolist() == ["a", "b"]
    assert arrays["volume_embedding"] == pytest.approx(np.eye(2))
    infinite = embedding_table(["a", "b"], volume_embedding=np.full((2, 2), np.inf))
    for table, what in (
        (good.drop_columns("volume"), "volume"),
        (good.set_column(0, "volume", pa.array(["a", "a"])), "does not hold one name per volume"),
        (good.set_column(0, "volume", pa.array([None, "b"])), "does not hold one name per volume"),
        (good.set_column(0, "volume", pa.array([1, 2])), "does not hold one name per volume"),
        (good.set_column(2, "report_embedding", pa.array([[1.0], []])), "'report_embedding' does not hold one vector per volume"),
        (good.set_column(1, "volume_embedding", pa.array([None, [0.0, 1.0]], pa.list_(pa.float32(), 2))), "'volume_embedding' does not hold one vector per volume"),
        (good.append_column("wide", pa.array([[0.0] * 3] * 2, pa.list_(pa.float32(), 3))), "vectors of equal length"),
        (good.select(["volume"]), "vectors of equal length"),
        (infinite, "'volume_embedding' holds infinite numbers"),
    ):  # fmt: skip
        pq.write_table(table, path)
        with pytest.raises(EvaluationError, match=rf"embeddings\.parquet: cannot be read as embeddings.*{what}"):
            read_embeddings(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EvaluationError, match=r"cannot be read as embeddings"):
        read_embeddings(path)
