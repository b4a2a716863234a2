"""Cohorts as they lie on disk, brought to one table: a row a volume. Adding a layout is adding one function."""

from __future__ import annotations

import ast
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd

from preprocessing.errors import PreprocessingError

# The table's columns. After them comes one nullable Int8 column a label, named as the finding.
COLUMNS = (
    "volume", "patient", "scan", "reconstruction", "split", "path",
    "clinical_information", "technique", "findings", "impression", "label_source",
    "rescale_slope", "rescale_intercept",
)  # fmt: skip
SECTIONS = {
    "ClinicalInformation_EN": "clinical_information",
    "Technique_EN": "technique",
    "Findings_EN": "findings",
    "Impressions_EN": "impression",
}
NOT_GIVEN = re.compile(r"\s*not given\.?\s*", re.IGNORECASE)
CT_RATE_NAME = re.compile(r"((?:train|valid)_\d+)_([a-z]+)_(\d+)")
FILES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz", ".zip")
RAD_CHESTCT_SPLITS = {"trn": "train", "val": "valid", "tst": "test"}


def read_cohort(root: str | os.PathLike[str], layout: str = "auto") -> tuple[pd.DataFrame, list[str]]:
    """The cohort table of ``root`` and warnings about it.

    ``layout``: ct-rate, rad-chestct, folder, or auto (by the tables that are found). A ``.csv`` with a ``path`` column is
    a cohort too.
    """
    folder = Path(root)
    if not folder.exists():
        raise PreprocessingError(f"{folder}: no such cohort")
    if folder.is_file() and folder.suffix == ".csv":
        return _from_csv(folder), []
    if layout == "auto":
        layout = _recognised(folder)
    if layout == "ct-rate":
        return _ct_rate(folder)
    if layout == "rad-chestct":
        return _rad_chestct(folder)
    return _plain_folder(folder), []


def hold_out(table: pd.DataFrame, fraction: float, *, source: str = "train", name: str = "calibration") -> pd.DataFrame:
    """The table with ``fraction`` of the patients of split ``source`` moved to split ``name``.

    Who is moved follows from the patient's id alone: the same on every machine, and whatever else is in the cohort.
    """

    def drawn(patient: str) -> float:
        return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8]) / 2**64

    moved = (table["split"] == source) & (table["patient"].map(drawn) < fraction)
    return table.assign(split=table["split"].where(~moved, name))


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


def _ct_rate(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """CT-RATE: nested patient/scan/reconstruction folders and its CSV tables, wherever under ``root`` they lie."""
    files = {identity(path): path for path in sorted(root.rglob("*.nii.gz")) if CT_RATE_NAME.fullmatch(identity(path))}
    if not files:
        raise PreprocessingError(f"{root}: no volumes named like train_1_a_1.nii.gz below it")
    reports = _tables(root, "*reports*.csv", ("VolumeName", *SECTIONS))
    labels = _tables(root, "*labels*.csv", ("VolumeName",))
    metadata = _tables(root, "*metadata*.csv", ("VolumeName", "RescaleSlope", "RescaleIntercept"))
    warnings = []
    orphans = sorted(set(reports.index) - set(files))
    if orphans:
        warnings.append(f"{len(orphans)} reports have no volume on disk, the first {orphans[0]}: left out")
    silent = sorted(set(files) - set(reports.index))
    if silent:
        warnings.append(f"{len(silent)} volumes have no report, the first {silent[0]}: kept without text")
    rows = []
    for volume, path in files.items():
        match = CT_RATE_NAME.fullmatch(volume)
        assert match is not None
        sections = {ours: _section(reports, volume, theirs) for theirs, ours in SECTIONS.items()}
        rows.append(
            {
                "volume": volume, "patient": match[1], "scan": f"{match[1]}_{match[2]}", "reconstruction": int(match[3]),
                "split": match[1].split("_")[0], "path": str(path.relative_to(root)), **sections,
                "label_source": "CT-RATE labels CSV" if volume in labels.index else "",
                "rescale_slope": _number(metadata, volume, "RescaleSlope", 1.0),
                "rescale_intercept": _number(metadata, volume, "RescaleIntercept", 0.0),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    known = labels.reindex(table["volume"]).reset_index(drop=True)
    for name in known.columns:
        values = pd.to_numeric(known[name], errors="coerce")
        if ((known[name].notna()) & ~values.isin([0, 1])).any():
            raise PreprocessingError(f"{root}: label {name!r} holds values other than 0 and 1")
        table[name] = values.astype("Int8")
    return table, warnings


def _recognised(folder: Path) -> str:
    if any(folder.rglob("*reports*.csv")):
        return "ct-rate"
    return "rad-chestct" if any(folder.rglob("*Abnormality_and_Location_Labels.csv")) else "folder"


def _rad_chestct(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """RAD-ChestCT: ``trn00001.npz`` and ``img*_Abnormality_and_Location_Labels.csv``, wherever under ``root``.

    A label is an abnormality at any place: the union of the table's columns ``abnormality*location``. Reports are not
    part of the data set.
    """
    files = {path.stem: path for path in sorted(root.rglob("*.npz"))}
    if not files:
        raise PreprocessingError(f"{root}: no volumes named like trn00001.npz below it")
    parts = []
    for path in sorted(root.rglob("*Abnormality_and_Location_Labels.csv")):
        try:
            part = pd.read_csv(path)
        except (ValueError, OSError, UnicodeDecodeError) as error:
            raise PreprocessingError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from error
        if "NoteAcc_DEID" not in part.columns:
            raise PreprocessingError(f"{path}: column 'NoteAcc_DEID' is missing; take RAD-ChestCT's own table")
        places = part.drop(columns="NoteAcc_DEID").select_dtypes("number")
        if not places.isin([0, 1]).all(axis=None):
            raise PreprocessingError(f"{path}: holds values other than 0 and 1")
        found = places.T.groupby([str(column).partition("*")[0] for column in places.columns]).max().T
        parts.append(found.set_index(part["NoteAcc_DEID"].astype(str)))
    labels = pd.concat(parts) if parts else pd.DataFrame(index=pd.Index([], dtype=str))
    labels = labels[~labels.index.duplicated()]
    orphans = sorted(set(labels.index) - set(files))
    warnings = [f"{len(orphans)} labelled volumes are not on disk, the first {orphans[0]}: left out"] if orphans else []
    source = "RAD-ChestCT abnormality and location labels"
    table = _rows([
        {
            "volume": name, "path": str(path.relative_to(root)), "split": RAD_CHESTCT_SPLITS.get(name[:3], "all"),
            "label_source": source if name in labels.index else "",
        }
        for name, path in files.items()
    ])  # fmt: skip
    known = labels.reindex(table["volume"]).reset_index(drop=True)
    return pd.concat([table, known.astype("Int8")], axis=1), warnings


def _tables(root: Path, pattern: str, required: tuple[str, ...]) -> pd.DataFrame:
    """All CSVs of a pattern stacked, indexed by volume id."""
    parts = []
    for path in sorted(root.rglob(pattern)):
        try:
            part = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (ValueError, OSError, UnicodeDecodeError) as error:
            raise PreprocessingError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from error
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


def identity(path: Path) -> str:
    name = path.name
    for suffix in FILES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


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


def _plain_folder(root: Path) -> pd.DataFrame:
    """Every volume file below a folder, and every folder of DICOM slices; each its own patient."""
    paths = []
    for folder, _, files in sorted(os.walk(root)):
        volumes = [Path(folder, name) for name in sorted(files) if name.lower().endswith(FILES)]
        paths += volumes
        if not volumes and any(_is_dicom(Path(folder, name)) for name in sorted(files)[:3]):
            paths.append(Path(folder))
    if not paths:
        raise PreprocessingError(f"{root}: no {', '.join(FILES)} and no DICOM slices below it")
    places = [path.relative_to(root) if path != root else Path(root.resolve().name) for path in paths]
    names = [re.sub(r"[^A-Za-z0-9._-]", "_", identity(place)) for place in places]
    unique = [re.sub(r"[^A-Za-z0-9._-]", "_", str(place)) for place in places]
    names = unique if len(set(names)) < len(names) else names
    return _rows([{"volume": n, "path": os.path.relpath(p, root)} for n, p in zip(names, paths, strict=True)])


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _from_csv(path: Path) -> pd.DataFrame:
    """A CSV with ``path`` and any other columns of the cohort table; paths are relative to the CSV."""
    table = pd.read_csv(path)
    if "path" not in table.columns:
        raise PreprocessingError(f"{path}: column 'path' is missing (it has {', '.join(map(str, table.columns[:6]))})")
    if "volume" not in table.columns:
        table["volume"] = [identity(Path(name)) for name in table["path"]]
    return check_table(_rows(table.to_dict("records")), path)


def _rows(records: list[dict[Any, Any]]) -> pd.DataFrame:
    """Records with what they do not say filled in."""
    filled = []
    for record in records:
        volume = str(record["volume"])
        filled.append(
            {
                "patient": volume, "scan": volume, "reconstruction": 1, "split": "all", "clinical_information": "",
                "technique": "", "findings": "", "impression": "", "label_source": "", "rescale_slope": 1.0,
                "rescale_intercept": 0.0, **record,
            }
        )  # fmt: skip
    return pd.DataFrame(filled)
