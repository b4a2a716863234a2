"""Prediction and label tables: what is read back, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ctclip.errors import EvaluationError
from ctclip.evaluation.evaluate import evaluate
from ctclip.evaluation.protocol import Protocol
from ctclip.evaluation.tables import prediction_table, read_labels, read_predictions, write_predictions

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
