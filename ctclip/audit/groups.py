"""Groups of the volumes of a store: labels, and columns of the cohort table with few distinct values."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from ctclip.preprocessing.cohorts import COLUMNS, label_names
from ctclip.preprocessing.facts import GEOMETRY_COLUMNS

# A column with more distinct values than this does not group volumes, and a value with fewer volumes is ignored.
MOST_VALUES, FEWEST_VOLUMES = 12, 10
# Columns that describe a patient, with or without "patient" before them.
PATIENT = ("age", "sex", "gender", "ethnicity", "ethnicgroup", "race", "size", "weight", "bmi")
AGES = (0, 40, 60, 75, 200)


def group_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Text values (n,) of each column that groups volumes, "" where unknown: scanner, kernel, hospital, sex and similar
    columns as the cohort names them; age in four classes, slice spacing in mm, and the split.

    ``table``: rows of a cohort table.
    """
    groups = {"split": table["split"].astype(str).to_numpy()}
    labels = set(label_names(table))
    own = {*COLUMNS, *GEOMETRY_COLUMNS, "no_chest", *labels}
    for name in [str(column) for column in table.columns if column not in own]:
        values = table[name].fillna("").astype(str).str.strip().to_numpy()
        groups[name] = _ages(values) if _field(name) == "age" else values
    if "z_spacing" in table:
        numbers = pd.to_numeric(table["z_spacing"], errors="coerce").round(1)
        groups["slice spacing"] = numbers.map(lambda value: f"{value:g} mm" if value == value else "").to_numpy(
            dtype=str
        )
    return {name: kept for name, values in groups.items() if (kept := _usual(values)) is not None}


def is_of_patient(group: str) -> bool:
    """Whether a column describes the patient rather than the acquisition. Findings may legitimately depend on it."""
    return _field(group) in PATIENT


def label_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Values 1, 0 or NaN (n,) of each label of the table that has both classes."""
    columns = {name: table[name].to_numpy(dtype=float, na_value=np.nan) for name in label_names(table)}
    return {
        name: values
        for name, values in columns.items()
        if min((values == 1).sum(), (values == 0).sum()) >= FEWEST_VOLUMES
    }


def _field(name: str) -> str:
    """A normalised column name: PatientAge, patient_age and Age are the same."""
    return re.sub(r"[\W_]", "", name.casefold()).removeprefix("patient")


def _usual(values: np.ndarray) -> np.ndarray | None:
    """The values with rare ones replaced by ""; None if fewer than two values remain, or too many."""
    names, counts = np.unique(values[values != ""], return_counts=True)
    kept = names[counts >= FEWEST_VOLUMES]
    if not 2 <= len(kept) <= MOST_VALUES:
        return None
    return np.where(np.isin(values, kept), values, "")


def _ages(values: np.ndarray) -> np.ndarray:
    """Age classes. DICOM writes 063Y; tables write 63 or 63.0."""

    def word(value: str) -> str:
        match = re.fullmatch(r"0*(\d{1,3})(\.0+)?\s*Y?", value, re.IGNORECASE)
        if not match:
            return ""
        place = int(np.searchsorted(AGES, int(match[1]), side="right")) - 1
        return (
            f"{AGES[place]} to {AGES[place + 1] - 1} years" if place < len(AGES) - 2 else f"{AGES[-2]} years and older"
        )

    return np.array([word(value) for value in values], dtype=object).astype(str)
