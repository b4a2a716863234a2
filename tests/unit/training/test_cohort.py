"""A resumed run recognises its training data and counts them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ctclip.data.reports import Report
from ctclip.errors import TrainingError
from ctclip.training.cohort import FILE, open_cohort


def data(reports: dict[str, str], labels: list[list[float]] | None = None) -> Any:
    """A substitute for StoredVolumes: two volumes per patient."""
    table = pd.DataFrame({"volume": list(reports), "patient": [f"p{number // 2}" for number in range(len(reports))]})
    return SimpleNamespace(
        table=table, reports=[Report({"findings": text}) for text in reports.values()],
        labels=None if labels is None else np.array(labels, dtype="float32"), store=SimpleNamespace(path=Path("store")),
    )  # fmt: skip


FIRST = {"a": "Effusion.", "b": "No effusion.", "c": "Nodule.", "d": "Emphysema."}
CHANGED = [
    ("a volume is gone", {name: FIRST[name] for name in "abc"}, "1 volumes are gone"),
    ("a volume is new", {**FIRST, "e": "Cyst."}, "1 volumes are new"),
    ("another cohort", {"x": "Cyst.", "y": "Mass."}, "4 volumes are gone, 2 volumes are new"),
    ("a report was rewritten", {**FIRST, "b": "Effusion."}, "1 have another report"),
    ("two reports were exchanged", {**FIRST, "a": FIRST["b"], "b": FIRST["a"]}, "2 have another report"),
]


@pytest.mark.parametrize(("reports", "said"), [row[1:] for row in CHANGED], ids=[row[0] for row in CHANGED])
def test_other_data_are_refused_unless_forced(reports: dict[str, str], said: str, tmp_path: Path) -> None:
    open_cohort(tmp_path, data(FIRST), learned=False)
    kept = (tmp_path / FILE).read_text()
    with pytest.raises(TrainingError, match=f"{said}.*--force") as refused:
        open_cohort(tmp_path, data(reports), learned=True)
    assert "\n" not in str(refused.value)
    assert (tmp_path / FILE).read_text() == kept
    # Patients seen earlier still count; a change that was accepted once is not reported again.
    assert len(open_cohort(tmp_path, data(reports), learned=True, force=True).seen) == len({*FIRST, *reports})
    assert len(open_cohort(tmp_path, data(reports), learned=True).seen) == len({*FIRST, *reports})


def test_weights_that_had_not_learned_have_seen_nothing(tmp_path: Path) -> None:
    open_cohort(tmp_path, data(FIRST), learned=False)
    cohort = open_cohort(tmp_path, data({"x": "Cyst."}), learned=False, force=True)
    assert (len(cohort.seen), len(cohort.patients)) == (1, 1)


def test_the_same_data_in_another_order_are_the_same(tmp_path: Path) -> None:
    open_cohort(tmp_path, data(FIRST), learned=False)
    again = open_cohort(tmp_path, data(dict(reversed(FIRST.items()))), learned=True)
    assert (len(again.seen), len(again.patients)) == (4, 2)


def test_labels_count_where_they_are_read(tmp_path: Path) -> None:
    open_cohort(tmp_path, data(FIRST, [[0, 1]] * 4), learned=False)
    with pytest.raises(TrainingError, match="1 have another report or other labels"):
        open_cohort(tmp_path, data(FIRST, [[0, 1]] * 3 + [[1, np.nan]]), learned=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"volumes": 3}', '{"volumes": [1]}', '{"volumes": {}, "seen": null}', "\xff"]
)
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(TrainingError, match=FILE):
        open_cohort(tmp_path, data(FIRST), learned=True)


def test_the_record_names_nobody(tmp_path: Path) -> None:
    open_cohort(tmp_path, data({"patient_smith": "Effusion of Smith."}), learned=False)
    text = (tmp_path / FILE).read_text().lower()
    assert "smith" not in text
    assert json.loads(text)["seen"]
