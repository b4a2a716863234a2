"""Find the label columns of a user's table, and read their values as 0, 1 or empty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.tables import MISSING, cell_text

YES, NO = frozenset(["1", "true", "t", "yes", "y"]), frozenset(["0", "false", "f", "no", "n"])
# Columns of 0 and 1 that describe the patient, the scan or the study are not findings. They are recognised by the whole
# name without filler words, or by single words in the name.
METADATA = frozenset(
    ["male", "female", "birth year", "year", "weight", "height", "smoke", "pack years", "contrast", "iv contrast",
     "contrast agent", "contrast medium", "gated", "split", "fold", "group", "set", "subset", "dataset", "cohort", "batch", "train",
     "valid", "val", "test", "training", "validation", "site", "centre", "center", "hospital", "scanner", "manufacturer", "model",
     "kernel", "kvp", "dose", "slice thickness", "index", "row", "include", "included", "exclude", "flag", "quality", "dead", "icu",
     "event", "emergency", "visit", "session", "timepoint", "time point", "followup", "follow up", "baseline", "reader", "rater",
     "annotator", "reviewer", "verified", "reviewed", "no chest", "weighted", "label source", "study", "series", "scan", "patient",
     "accession", "number", "date", "time"]
)  # fmt: skip
OF_THE_PATIENT = frozenset(
    ["sex", "gender", "age", "bmi", "ethnicity", "race", "smoker", "smokers", "smoking", "deceased", "death", "died", "mortality",
     "survival", "inpatient", "outpatient", "pregnant", "excluded", "uid", "geschlecht", "alter", "sexe", "sexo", "edad",
     "cinsiyet"]
)  # fmt: skip
FILLERS = frozenset(
    ["is", "has", "was", "with", "without", "ever", "id", "ids", "patient", "subject", "yn", "m", "f", "kg", "cm"]
)


def zeros_and_ones(column: pd.Series, what: str) -> pd.Series:
    """A label column as nullable Int8: 0 and 1, their words (``true``, ``no``), and empty cells. Otherwise the error
    quotes the first invalid cell and its location."""
    values = [_label(cell) for cell in column]
    for place, cell, value in zip(column.index, column, values, strict=True):
        if value is NotALabel:
            where = f"{column.index.name} {place}" if column.index.name else str(place)
            raise PreprocessingError(f"{what} holds values other than 0 and 1: {str(cell)[:40]!r} ({where})")
    return pd.Series(values, index=column.index, dtype="Int8")


NotALabel = object()


def _label(cell: object) -> object:
    text = cell_text(cell).casefold()
    if text in MISSING:
        return pd.NA
    if text in YES or text in NO:
        return int(text in YES)
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return NotALabel
    return int(number) if number in (0.0, 1.0) else NotALabel


class Columns(NamedTuple):
    """Names of label columns, and of metadata columns with reasons."""

    labels: list[str]
    metadata: dict[str, str]


def label_columns(table: pd.DataFrame, names: Sequence[str] | None = None) -> Columns:
    """Choose the label columns of a user's table.

    ``names``: exactly these columns; one that is missing or has values other than 0, 1 and empty is refused. Without
    names: all columns with only 0, 1 and empty cells, except those named like a property of the patient or the scan
    (``METADATA``).
    """
    if names is not None:
        absent = [name for name in names if name not in table.columns]
        if absent:
            raise PreprocessingError(
                f"no label column {absent[0]!r} in the table (it has {', '.join(map(str, table.columns[:12]))})"
            )
        others = {str(name): "not among the names" for name in table.columns if name not in names}
        return Columns(list(names), others)
    labels: list[str] = []
    metadata: dict[str, str] = {}
    for name in map(str, table.columns):
        values = [_label(cell) for cell in table[name]]
        bad = next((index for index, value in enumerate(values) if value is NotALabel), None)
        if _describes(name):
            metadata[name] = "describes the patient or the scan"
        elif bad is not None:
            place = f"{table.index.name or 'row'} {table.index[bad]}"
            metadata[name] = f"{str(table[name].iloc[bad])[:40]!r} in {place} is neither 0 nor 1"
        elif all(value is pd.NA for value in values):
            metadata[name] = "empty"
        else:
            labels.append(name)
    return Columns(labels, metadata)


def mostly_binary(column: pd.Series) -> bool:
    """Whether more than half of the values of a column are 0 or 1, so that it is meant as a label."""
    cells = column.str.casefold()
    stated = cells[~cells.isin(MISSING)]
    return len(stated) > 0 and bool(stated.isin(YES | NO | {"0.0", "1.0"}).mean() > 0.5)


def _describes(name: str) -> bool:
    """Whether the name of a column describes a property of the patient, the scan or the study: ``PatientSex``,
    ``age>65``, ``with contrast``."""
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", " ", name))]
    if "indeterminate" in words:  # "age-indeterminate fracture"
        return False
    told = " ".join(word for word in words if word not in FILLERS)
    return not OF_THE_PATIENT.isdisjoint(words) or told in METADATA or bool(words and not told)
