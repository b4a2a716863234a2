"""The cohort table: a row a volume, the same columns whatever the cohort looks like on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip.preprocessing.errors import PreprocessingError

# The table's columns. After them comes one nullable Int8 column a label, named as the finding.
COLUMNS = (
    "volume", "patient", "scan", "reconstruction", "split", "path",
    "clinical_information", "technique", "findings", "impression", "label_source",
    "rescale_slope", "rescale_intercept",
)  # fmt: skip
FILES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz", ".zip")
DEFAULTS = {
    "reconstruction": 1, "split": "all", "clinical_information": "", "technique": "", "findings": "", "impression": "",
    "label_source": "", "rescale_slope": 1.0, "rescale_intercept": 0.0,
}  # fmt: skip


@dataclass
class Cohort:
    """``table`` as it may be kept and shown; ``files``, where each of its volumes lies, which may name a patient.

    ``unmatched``: what one of volumes and tables holds and the other does not, a line each.
    """

    table: pd.DataFrame
    files: dict[str, Path]
    warnings: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def rows(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as a table, with what they do not say filled in: each volume its own scan of its own patient."""
    filled = []
    for record in records:
        volume = str(record["volume"])
        scan = str(record.get("scan", volume))
        filled.append({"patient": scan, **DEFAULTS, **record, "volume": volume, "scan": scan})
    table = pd.DataFrame(filled)
    return table[[*COLUMNS, *(name for name in table.columns if name not in COLUMNS)]]


def identity(path: Path) -> str:
    """A volume's id: its file's name without the suffix of its format."""
    name = path.name
    for suffix in FILES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def label_names(table: pd.DataFrame) -> list[str]:
    """Label columns of a cohort table, in order."""
    return [name for name in table.columns if name not in COLUMNS]


def check_table(table: pd.DataFrame, source: Path) -> pd.DataFrame:
    """The table, if it has every column of ``COLUMNS`` and no id twice."""
    for name in COLUMNS:
        if name not in table.columns:
            raise PreprocessingError(f"{source}: column {name!r} is missing; `ctclip preprocess` writes this table")
    twice = table["volume"][table["volume"].duplicated()]
    if len(twice):
        raise PreprocessingError(f"{source}: volume {twice.iloc[0]!r} is listed twice")
    return table


def read_csv(path: Path, *, numbers: bool = False) -> pd.DataFrame:
    """A CSV of a stranger as strings, or with ``numbers`` as what its columns hold; one that is none is named."""
    try:
        return pd.read_csv(path) if numbers else pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise PreprocessingError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from error


def zeros_and_ones(column: pd.Series, said: str) -> pd.Series:
    """A label column as nullable Int8; anything but 0, 1 and nothing is refused."""
    values = pd.to_numeric(column.replace("", None), errors="coerce")
    if (column.replace("", None).notna() & ~values.isin([0, 1])).any():
        raise PreprocessingError(f"{said} holds values other than 0 and 1")
    return values.astype("Int8")


def hold_out(table: pd.DataFrame, fraction: float, *, source: str = "train", name: str = "calibration") -> pd.DataFrame:
    """The table with ``fraction`` of the patients of split ``source`` moved to split ``name``.

    Who is moved follows from the patient's id alone: the same on every machine, and whatever else is in the cohort.
    """

    def drawn(patient: str) -> float:
        return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8]) / 2**64

    moved = (table["split"] == source) & (table["patient"].map(drawn) < fraction)
    return table.assign(split=table["split"].where(~moved, name))
