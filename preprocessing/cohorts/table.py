"""The cohort table: one row per volume, with the same columns for every layout on disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.facts import GEOMETRY_COLUMNS
from ctclip.preprocessing.tables import VOLUME_SUFFIXES, volume_name

# The table's columns. They are followed by the known METADATA_COLUMNS, the user's metadata as strings, and one
# nullable Int8 column per label, named after the finding.
COLUMNS = (
    "volume", "patient", "scan", "reconstruction", "split", "path",
    "clinical_information", "technique", "findings", "impression", "label_source",
    "rescale_slope", "rescale_intercept",
)  # fmt: skip
# ``no_chest``: whether the cohort lists the volume among those that show no chest.
METADATA_COLUMNS = ("no_chest", *GEOMETRY_COLUMNS)
SECTIONS = ("clinical_information", "technique", "findings", "impression")
# Names under which tables hold whole reports, the most likely first.
WHOLE_REPORTS = ("text", "report_text", "report", "radiology_report", "full_report")
IDS = ("volume", "patient", "scan", "split")
TEXTS = (*IDS, "path", *SECTIONS)
FILES = VOLUME_SUFFIXES
DEFAULTS = {
    "reconstruction": 1, "split": "all", "clinical_information": "", "technique": "", "findings": "", "impression": "",
    "label_source": "", "rescale_slope": 1.0, "rescale_intercept": 0.0,
}  # fmt: skip


@dataclass
class Cohort:
    """``table`` contains no identifiers and may be stored; ``files`` holds the path of each volume, which may name a
    patient.

    ``series`` names the DICOM series of volumes that share their folder with others. ``unmatched``: one line each on
    volumes without a table row, and the reverse. ``left_out`` and ``refused`` give the reason for each volume that is
    not read; rows of ``left_out`` are not in ``table``. ``notes`` describe how the cohort was interpreted. ``unused``
    counts files that were not used, by kind.
    """

    table: pd.DataFrame
    files: dict[str, Path]
    warnings: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    series: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)


def cohort_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as a cohort table. Missing columns are filled in; by default, each volume is a separate scan of a
    separate patient."""
    filled = []
    for record in records:
        volume = str(record["volume"])
        scan = str(record.get("scan", volume))
        filled.append({"patient": scan, **DEFAULTS, **record, "volume": volume, "scan": scan})
    table = pd.DataFrame(filled)
    return table[[*COLUMNS, *(name for name in table.columns if name not in COLUMNS)]]


def identity(path: Path) -> str:
    """The id of a volume: its file name without the suffix."""
    return volume_name(path.name)


def label_names(table: pd.DataFrame) -> list[str]:
    """Label columns of a cohort table, in order: nullable Int8, where metadata are strings."""
    others = {*COLUMNS, *METADATA_COLUMNS}
    return [name for name in table.columns if name not in others and str(table[name].dtype) == "Int8"]


def check_table(table: pd.DataFrame, source: Path) -> pd.DataFrame:
    """Return the table if it has every column of ``COLUMNS``, text in text columns, and no empty or duplicate id."""
    for name in COLUMNS:
        if name not in table.columns:
            raise PreprocessingError(f"{source}: column {name!r} is missing; `ctclip preprocess` writes this table")
        odd = [value for value in table[name] if not isinstance(value, str)] if name in TEXTS else []
        if odd or (name in IDS and (table[name] == "").any()):
            what = f"holds {type(odd[0]).__name__}" if odd else "has empty cells"
            raise PreprocessingError(f"{source}: column {name!r} {what}; `ctclip preprocess` writes text there")
    twice = table["volume"][table["volume"].duplicated()]
    if len(twice):
        raise PreprocessingError(f"{source}: volume {twice.iloc[0]!r} is listed twice")
    return table


def hold_out(table: pd.DataFrame, fraction: float, *, source: str = "train", name: str = "calibration") -> pd.DataFrame:
    """Move ``fraction`` of the patients of split ``source`` to split ``name``.

    The choice depends only on the patient's id, so it is the same on every machine and does not change with the rest of
    the cohort.
    """

    def drawn(patient: str) -> float:
        return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8]) / 2**64

    moved = (table["split"] == source) & (table["patient"].map(drawn) < fraction)
    return table.assign(split=table["split"].where(~moved, name))
