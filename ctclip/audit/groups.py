"""Groups of the volumes of a store: labels, and columns of the cohort table with few distinct values."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from ctclip.preprocessing.cohorts import COLUMNS, label_names
from ctclip.preprocessing.facts import GEOMETRY_COLUMNS

# At most this many values of a column are compared, the most frequent ones; a value with fewer volumes is ignored.
MOST_VALUES, FEWEST_VOLUMES = 12, 10
# Words in the names of columns that identify a scan or a patient.
NAMES = ("id", "uid", "number", "accession", "index", "name", "key", "hash", "path")
# 20240131, 2024-01-31, 2024-01-31 12:00.
DATE = re.compile(r"((?:19|20)\d\d)-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])(?:[T ].*|\.0)?")
# Columns that describe a patient, with or without "patient" before them.
PATIENT = ("age", "sex", "gender", "ethnicity", "ethnicgroup", "race", "size", "weight", "bmi")
AGES = (0, 40, 60, 75, 200)


def group_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Text values (n,) of each column that groups volumes, "" where unknown: scanner, kernel, hospital, sex and similar
    columns as the cohort names them; dates by year, age in four classes, other numbers with many values in thirds, slice
    spacing in mm, and the split.

    ``table``: rows of a cohort table.
    """
    groups = {"split": table["split"].astype(str).to_numpy()}
    patients = table["patient"].to_numpy(dtype=str)
    labels = set(label_names(table))
    own = {*COLUMNS, *GEOMETRY_COLUMNS, "no_chest", *labels}
    for name in [str(column) for column in table.columns if column not in own]:
        values = table[name].fillna("").astype(str).str.strip().to_numpy()
        groups[name] = _ages(values) if _field(name) == "age" else _classes(name, values)
    if "z_spacing" in table:
        numbers = pd.to_numeric(table["z_spacing"], errors="coerce").round(1)
        groups["slice spacing"] = numbers.map(lambda value: f"{value:g} mm" if value == value else "").to_numpy(
            dtype=str
        )
    return {name: kept for name, values in groups.items() if (kept := _usual(values, patients)) is not None}


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


def _usual(values: np.ndarray, patients: np.ndarray) -> np.ndarray | None:
    """Values with the rare ones replaced by ""; None if fewer than two values remain. Of more than ``MOST_VALUES``, a value must
    be of several patients: names of patients are no groups, however many volumes they have."""
    names, counts = np.unique(values[values != ""], return_counts=True)
    if len(names) > MOST_VALUES:
        by_value = pd.Series(patients).groupby(values).nunique()
        counts = np.asarray(by_value.loc[names].to_numpy(dtype=np.int64))
    frequent = np.argsort(-counts, kind="stable")[:MOST_VALUES]
    kept = names[frequent[counts[frequent] >= FEWEST_VOLUMES]]
    if len(kept) < 2:
        return None
    return np.where(np.isin(values, kept), values, "")


def _classes(name: str, values: np.ndarray) -> np.ndarray:
    """Replace dates by their year, and numbers with more than ``MOST_VALUES`` distinct values by thirds."""
    known = values != ""
    distinct = np.unique(values[known])
    if len(distinct) <= MOST_VALUES:
        return values
    dates = [DATE.fullmatch(value) for value in values]
    if sum(date is not None for date in dates) > 0.9 * known.sum():
        return np.array([date[1] if date else "" for date in dates], dtype=object).astype(str)
    numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(dtype=float, copy=True)
    numbers[~np.isfinite(numbers)] = np.nan
    finite = numbers[~np.isnan(numbers)]
    # Whole numbers that hardly ever recur identify a scan or a patient too.
    is_name = (finite % 1 == 0).all() and len(np.unique(finite)) > 0.9 * len(finite)
    if len(finite) <= 0.9 * known.sum() or is_name or set(re.findall("[a-z]+", _spaced(name))) & set(NAMES):
        return values
    low, high = np.nanquantile(numbers, [1 / 3, 2 / 3])
    words = [f"below {low:g}", f"{low:g} to {high:g}", f"above {high:g}"]
    thirds = np.select([numbers < low, numbers <= high, numbers > high], words, "")
    return np.asarray(thirds).astype(str)


def _spaced(name: str) -> str:
    """PatientID and patient_id as two words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()


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
