"""The layout of CT-RATE (Hamamci et al. 2024): patient, scan and reconstruction folders, and tables beside them.

The first release has blank NIfTI headers and unscaled values: geometry, slope and intercept are only in the metadata
table. In the second ("fixed") release both are applied. A folder may contain either release, or both.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ctclip.preprocessing.cohorts.table import Cohort, cohort_table, identity
from ctclip.preprocessing.cohorts.walk import Tree
from ctclip.preprocessing.errors import PreprocessingError, counted
from ctclip.preprocessing.facts import GEOMETRY_COLUMNS
from ctclip.preprocessing.label_columns import label_columns, mostly_binary, zeros_and_ones
from ctclip.preprocessing.no_report import is_no_report, report_text
from ctclip.preprocessing.tables import MISSING, numbers, one_row_each, read_table, volume_name

SECTIONS = {
    "ClinicalInformation_EN": "clinical_information",
    "Technique_EN": "technique",
    "Findings_EN": "findings",
    "Impressions_EN": "impression",
}
NAME = re.compile(r"((?:train|valid)_\d+)_([a-z]+)_(\d+)")
# Columns of scanner and patient, for `ctclip audit`.
ACQUISITION = {
    "manufacturer": "Manufacturer", "kernel": "ConvolutionKernel", "sex": "PatientSex", "age": "PatientAge",
}  # fmt: skip
RESCALE = {"rescale_slope": ("RescaleSlope", 1.0), "rescale_intercept": ("RescaleIntercept", 0.0)}


def recognised(tree: Tree) -> bool:
    """Whether the tree has volumes with names like train_1_a_1.nii.gz, or a table of reports with CT-RATE's columns and
    volumes."""
    if not tree.root.is_dir():
        return False
    if any(NAME.fullmatch(identity(path)) for path in tree.named(".nii.gz")):
        return True
    return any(_is_ours(path) for path in _tables_named(tree, "reports"))


def _is_ours(path: Path) -> bool:
    try:
        table = read_table(path)
    except PreprocessingError:
        return False
    names = table.get("VolumeName", pd.Series(dtype=str))
    return set(SECTIONS) & set(table.columns) != set() and any(NAME.fullmatch(volume_name(name)) for name in names)


def read(tree: Tree, *, keep_no_chest: bool = False) -> Cohort:
    """Read the volumes and the tables of reports, labels and metadata, anywhere in the tree.

    Volumes that the data set lists as showing no chest (``no_chest*.txt``) are left out unless ``keep_no_chest``;
    those without a ZSpacing in the metadata table are refused.
    """
    root = tree.root
    files, warnings = _files(tree)
    reports = _tables(tree, "reports", ("VolumeName", *SECTIONS))
    labels = _tables(tree, "labels", ("VolumeName",))
    metadata = _tables(tree, "metadata", ("VolumeName", "RescaleSlope", "RescaleIntercept"))
    no_chest, lists = _no_chest(tree)
    left_out = {name: f"listed as no chest in {no_chest[name].name}" for name in files if name in no_chest}
    if keep_no_chest:
        left_out = {}
    kept = {name: path for name, path in files.items() if name not in left_out}
    unmatched = []
    # Reports of volumes that were left out do not count as reports without a volume.
    if orphans := sorted(set(reports.index) - set(files) - set(no_chest)):
        unmatched.append(f"{len(orphans)} of the reports have no volume on disk (the first: {orphans[0]})")
    silent = sorted(set(kept) - set(reports.index))
    if silent and len(reports):
        unmatched.append(f"{len(silent)} of the volumes have no report (the first: {silent[0]})")
    elif silent:
        warnings.append("there is no table of reports: all volumes are stored without text")
    table = (
        cohort_table([_record(root, volume, path, reports, labels, metadata) for volume, path in kept.items()])
        if kept
        else None
    )
    if table is None:
        raise PreprocessingError(
            f"{root}: all of its volumes are listed as showing no chest; --keep-no-chest keeps them"
        )
    table["no_chest"] = table["volume"].isin(set(no_chest))
    notes = _notes(reports, kept)
    names, others = _labels(labels)
    known = labels.reindex(table["volume"])
    for name in names:
        table[name] = zeros_and_ones(known[name].set_axis(known["at"]), f"label {name!r}").to_numpy()
        table[name] = table[name].astype("Int8")
    for name in others:
        if name not in table.columns:
            table[name] = known[name].fillna("").to_numpy()
    if others:
        notes.append(f"kept as metadata, not as labels: {', '.join(others)}")
    unused = tree.others(
        {*files.values(), *lists, *(p for kind in ("reports", "labels", "metadata") for p in _tables_named(tree, kind))}
    )
    return Cohort(
        table, kept, warnings, unmatched, left_out=left_out, refused=_without_spacing(metadata, kept), notes=notes,
        unused=unused,
    )  # fmt: skip


def _source(root: Path, stated: str) -> str:
    """The source of the labels: stated by their table, or CT-RATE. A synthetic cohort, which has the same layout,
    states its source in a file of its own."""
    if (root / "phantom.json").is_file():
        return f"synthetic, {stated}" if stated else "synthetic"
    return stated or "CT-RATE labels CSV"


def _record(
    root: Path, volume: str, path: Path, reports: pd.DataFrame, labels: pd.DataFrame, metadata: pd.DataFrame
) -> dict[str, object]:
    match = NAME.fullmatch(volume)
    assert match is not None
    sections = {ours: report_text(_cell(reports, volume, theirs)) for theirs, ours in SECTIONS.items()}
    return {
        "volume": volume, "patient": match[1], "scan": f"{match[1]}_{match[2]}", "reconstruction": int(match[3]),
        "split": match[1].split("_")[0], "path": str(path.relative_to(root)), **sections,
        "label_source": _source(root, _cell(labels, volume, "label_source")) if volume in labels.index else "",
        **{ours: _number(metadata, volume, theirs, default) for ours, (theirs, default) in RESCALE.items()},
        **{ours: _cell(metadata, volume, theirs) for ours, theirs in (GEOMETRY_COLUMNS | ACQUISITION).items()},
    }  # fmt: skip


def _files(tree: Tree) -> tuple[dict[str, Path], list[str]]:
    """The file of each volume. Of several files with the same name, the one in the least deep folder is used
    (segmentations have the same names in folders of their own), and of these the last (``train_fixed`` comes after
    ``train``)."""
    files: dict[str, Path] = {}
    repeated = 0
    for path in sorted(tree.named(".nii.gz")):
        volume = identity(path)
        if NAME.fullmatch(volume):
            repeated += volume in files
            if volume not in files or len(path.parts) <= len(files[volume].parts):
                files[volume] = path
    if not files:
        raise PreprocessingError(f"{tree.root}: no volumes named like train_1_a_1.nii.gz below it")
    if not repeated:
        return files, []
    return files, [
        f"{repeated} files share their name with another; the one in the least deep folder is used, and the last of these"
    ]


def _tables_named(tree: Tree, kind: str) -> list[Path]:
    names = (".csv", ".tsv", ".parquet")
    return [path for path in tree.files if kind in path.name.lower() and path.suffix.lower() in names]


def _tables(tree: Tree, kind: str, required: tuple[str, ...]) -> pd.DataFrame:
    """All tables of a kind, concatenated and indexed by volume id; the column ``at`` states file and line of a row."""
    parts = []
    for path in _tables_named(tree, kind):
        part = read_table(path)
        for name in required:
            if name not in part.columns:
                raise PreprocessingError(
                    f"{path}: column {name!r} is missing (it has {', '.join(part.columns[:6])}); use CT-RATE's own "
                    f"table"
                )
        parts.append((path, part))
    whole = one_row_each(parts, "VolumeName")
    return whole if parts else pd.DataFrame(columns=[*required[1:], "at"], index=pd.Index([], dtype=str), dtype=str)


def _no_chest(tree: Tree) -> tuple[dict[str, Path], list[Path]]:
    """The volumes listed in ``no_chest*.txt``, one per line, with or without folder and suffix, and the lists."""
    lists = [path for path in tree.named(".txt") if path.name.lower().startswith("no_chest")]
    listed: dict[str, Path] = {}
    for path in lists:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        for line in re.split(r"[\r\n,;]+", text):
            if name := volume_name(line.strip().strip("'\"[]")):
                listed.setdefault(name, path)
    return listed, lists


def _without_spacing(metadata: pd.DataFrame, files: dict[str, Path]) -> dict[str, str]:
    """Volumes without a slice distance in the metadata table: projections, and stray report images."""
    if "ZSpacing" not in metadata.columns:
        return {}
    return {
        name: f"{files[name].name}: the metadata table has no ZSpacing for it: a projection or another image that is "
              f"not a volume"
        for name in files
        if name in metadata.index and not (numbers(metadata.at[name, "ZSpacing"], 1) or [0])[0]
    }  # fmt: skip


def _labels(labels: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Label columns, and other columns: these describe the patient or the scan, or hold words instead of 0 and 1. A
    column with mostly 0 and 1 is a label, and its other values are refused."""
    columns = label_columns(labels.drop(columns="at"))
    words = [name for name, why in columns.metadata.items() if why != "empty" and not mostly_binary(labels[name])]
    others = [name for name, why in columns.metadata.items() if "describes" in why or name in words]
    return [name for name in labels.columns if name not in (*others, "at")], others


def _notes(reports: pd.DataFrame, files: dict[str, Path]) -> list[str]:
    mine = reports.loc[reports.index.isin(set(files)), list(SECTIONS)]
    words = [cell for column in SECTIONS for cell in mine[column] if cell and is_no_report(cell)]
    notes = []
    if words:
        notes.append(
            f"{counted(len(words), 'section')} of reports with only a placeholder (such as {words[0]!r}) taken as empty"
        )
    silent = [
        n for n, row in mine.iterrows() if is_no_report(row["Findings_EN"]) and is_no_report(row["Impressions_EN"])
    ]
    if silent:
        notes.append(f"{counted(len(silent), 'report')} with neither findings nor impression (the first: {silent[0]})")
    return notes


def _cell(table: pd.DataFrame, volume: str, column: str) -> str:
    return str(table.at[volume, column]) if column in table.columns and volume in table.index else ""


def _number(table: pd.DataFrame, volume: str, column: str, default: float) -> float:
    text = _cell(table, volume, column)
    if text.casefold() in MISSING:
        return default
    values = numbers(text, 1)
    if values is None:
        raise PreprocessingError(f"{table.at[volume, 'at']!s}: {column} of {volume} is {text[:40]!r}, not a number")
    return values[0]
