"""CT-RATE (Hamamci et al. 2024) as it lies on disk: patient, scan and reconstruction folders, and four CSV tables."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pandas as pd

from ctclip.preprocessing.cohorts.table import Cohort, identity, read_csv, rows, zeros_and_ones
from ctclip.preprocessing.errors import PreprocessingError

SECTIONS = {
    "ClinicalInformation_EN": "clinical_information",
    "Technique_EN": "technique",
    "Findings_EN": "findings",
    "Impressions_EN": "impression",
}
NOT_GIVEN = re.compile(r"\s*not given\.?\s*", re.IGNORECASE)
NAME = re.compile(r"((?:train|valid)_\d+)_([a-z]+)_(\d+)")


def recognised(root: Path) -> bool:
    return root.is_dir() and any(root.rglob("*reports*.csv"))


def read(root: Path) -> Cohort:
    """Volumes and the tables of reports, labels and metadata, wherever under ``root`` they lie."""
    files, warnings = _files(root)
    reports = _tables(root, "*reports*.csv", ("VolumeName", *SECTIONS))
    labels = _tables(root, "*labels*.csv", ("VolumeName",))
    metadata = _tables(root, "*metadata*.csv", ("VolumeName", "RescaleSlope", "RescaleIntercept"))
    unmatched = []
    if orphans := sorted(set(reports.index) - set(files)):
        unmatched.append(f"{len(orphans)} of the reports have no volume on disk (the first: {orphans[0]})")
    if silent := sorted(set(files) - set(reports.index)):
        unmatched.append(f"{len(silent)} of the volumes have no report (the first: {silent[0]})")
    records = []
    for volume, path in files.items():
        match = NAME.fullmatch(volume)
        assert match is not None
        sections = {ours: _section(reports, volume, theirs) for theirs, ours in SECTIONS.items()}
        records.append(
            {
                "volume": volume, "patient": match[1], "scan": f"{match[1]}_{match[2]}", "reconstruction": int(match[3]),
                "split": match[1].split("_")[0], "path": str(path.relative_to(root)), **sections,
                "label_source": "CT-RATE labels CSV" if volume in labels.index else "",
                "rescale_slope": _number(metadata, volume, "RescaleSlope", 1.0),
                "rescale_intercept": _number(metadata, volume, "RescaleIntercept", 0.0),
            }
        )  # fmt: skip
    table = rows(records)
    known = labels.reindex(table["volume"]).reset_index(drop=True)
    for name in known.columns:
        table[name] = zeros_and_ones(known[name], f"{root}: label {name!r}")
    return Cohort(table, files, warnings, unmatched)


def _files(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Each volume's file. Of several of one name the least deep is taken (segmentations lie in folders of their own
    under the same names), of those the last (``train_fixed`` comes after ``train``)."""
    found: dict[str, Path] = {}
    again = 0
    for path in sorted(root.rglob("*.nii.gz")):
        volume = identity(path)
        if NAME.fullmatch(volume):
            again += volume in found
            if volume not in found or len(path.parts) <= len(found[volume].parts):
                found[volume] = path
    if not found:
        raise PreprocessingError(f"{root}: no volumes named like train_1_a_1.nii.gz below it")
    if not again:
        return found, []
    return found, [f"{again} files share their name with another; the least deep is taken, of those the last"]


def _tables(root: Path, pattern: str, required: tuple[str, ...]) -> pd.DataFrame:
    """All CSVs of a pattern stacked, indexed by volume id."""
    parts = []
    for path in sorted(root.rglob(pattern)):
        part = read_csv(path)
        for name in required:
            if name not in part.columns:
                raise PreprocessingError(
                    f"{path}: column {name!r} is missing (it has {', '.join(part.columns[:6])}); take CT-RATE's own table"
                )
        parts.append(part)
    if not parts:
        return pd.DataFrame(columns=list(required[1:]), index=pd.Index([], dtype=str))
    stacked = pd.concat(parts, ignore_index=True)
    stacked.index = pd.Index([identity(Path(name)) for name in stacked.pop("VolumeName")])
    return stacked[~stacked.index.duplicated()]


def _section(table: pd.DataFrame, volume: str, column: str) -> str:
    if volume not in table.index:
        return ""
    text = str(table.at[volume, column]).strip()
    return "" if NOT_GIVEN.fullmatch(text) else text


def _number(table: pd.DataFrame, volume: str, column: str, default: float) -> float:
    if volume not in table.index:
        return default
    text = str(table.at[volume, column]).strip()
    try:
        value = ast.literal_eval(text) if text else default
        return float(value[0] if isinstance(value, list | tuple) else value)
    except (ValueError, SyntaxError, TypeError) as error:
        raise PreprocessingError(f"metadata of {volume}: {column} is {text!r}, not a number") from error
