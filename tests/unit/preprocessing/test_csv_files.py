"""Tables are harmless in a spreadsheet or on a terminal, and are read back unchanged."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from ctclip.evaluation.tables import read_predictions, write_predictions
from ctclip.preprocessing.csv_files import guarded, read_csv, unguarded, write_csv
from ctclip.preprocessing.outcomes import Outcome, read_outcomes, write_outcomes
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import read_table

FORMULAS = ["＝cmd", "=cmd|' /C calc'!A0", "+1+cmd", "-2+3+cmd", "@SUM(1)", '=HYPERLINK("http://x")']
PLAIN = ["valid_1_a_1", "-5", "+3.5e-2", "-", "'quoted'", "a=b", "", "Erguss, links"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_text(tmp_path: Path, text: str) -> None:
    table = pd.DataFrame({"volume": [text, "b"], text: [0.25, -1.5]})
    write_csv(tmp_path / "t.csv", table)
    with (tmp_path / "t.csv").open(newline="") as stream:
        cells = [cell for record in csv.reader(stream) for cell in record]
    assert not any(cell[:1] in ("=", "+", "@", "＝") or cell.startswith("-2+") for cell in cells)
    assert "-1.5" in cells
    for read in (read_csv(tmp_path / "t.csv", dtype={"volume": str}), read_table(tmp_path / "t.csv")):
        assert list(read.columns) == ["volume", text]
        assert list(read["volume"]) == [text, "b"]
    assert read_csv(tmp_path / "t.csv")[text].tolist() == [0.25, -1.5]


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text: str) -> None:
    assert guarded(text) == text
    assert unguarded(text) == text


def test_no_terminal_obeys_a_table() -> None:
    assert guarded("a\x1b[2Jb\x9b1mc\rd") == "a\\x1b[2Jb\\x9b1mc\\rd"
    assert guarded("two\nlines\tand a tab") == "two\nlines\tand a tab"


def test_predictions_and_outcomes_come_back(tmp_path: Path) -> None:
    names = [*FORMULAS, "v1"]
    table = pd.DataFrame({name: names for name in ("volume", "patient", "scan")} | {"=finding": 0.5})
    write_predictions(tmp_path / "p.csv", table)
    read, findings = read_predictions(tmp_path / "p.csv")
    assert list(read["volume"]) == names
    assert findings == ["=finding"]
    store = VolumeStore.create(tmp_path / "store", PreprocessingSpec("test", (5.0, 4.0, 4.0), (8, 8, 8)))
    write_outcomes(store, [Outcome(name, None, ("-warned",)) for name in names], (1, 1))
    assert read_outcomes(store) == {name: Outcome(name, None, ("-warned",)) for name in names}
    assert "\n=" not in (store.path / "outcomes.csv").read_text()
