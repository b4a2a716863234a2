"""A folder of volumes and DICOM series, a CSV of their paths, or one scan by itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pandas as pd

from ctclip.preprocessing.cohorts.table import (
    COLUMNS,
    DEFAULTS,
    FILES,
    Cohort,
    identity,
    read_csv,
    rows,
    zeros_and_ones,
)
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.identifiers import anonymous_id, first_header, masked


def recognised(root: Path) -> bool:
    return root.is_file()


def read(root: Path) -> Cohort:
    """Every volume file below a folder and every folder of DICOM slices, each its own patient; or the rows of a CSV."""
    if root.is_file():
        return _from_csv(root) if root.suffix.lower() == ".csv" else _named(root.parent, [root])
    paths: list[Path] = []
    for folder, _, files in sorted(os.walk(root)):
        volumes = [Path(folder, name) for name in sorted(files) if name.lower().endswith(FILES)]
        paths += volumes
        if len(volumes) < len(files) and first_header(Path(folder)) is not None:
            paths.append(Path(folder))
    if not paths:
        raise PreprocessingError(f"{root}: no {', '.join(FILES)} and no DICOM slices below it")
    return _named(root, paths)


def _named(root: Path, paths: list[Path]) -> Cohort:
    """Ids by file name, or by the whole path where names repeat; anonymous where a path names its patient."""
    places = [path.relative_to(root) if path != root else Path(root.resolve().name) for path in paths]
    names = [_safe(identity(place)) for place in places]
    if len(set(names)) < len(names):
        names = [_safe(str(place)) for place in places]
    records = []
    for name, place, path in zip(names, places, paths, strict=True):
        header = _header(path)
        shown = masked(str(place), header)
        known = shown == str(place)
        records.append(
            {"volume": name if known else anonymous_id(header, shown), "path": shown if path != root else "."}
        )
    table = rows(records)
    return Cohort(table, dict(zip(table["volume"], paths, strict=True)))


def scan_id(path: Path) -> str:
    """What to call one scan outside of a cohort: its file's name, or an anonymous id if that or its folder's names the
    patient."""
    header = _header(path)
    place = f"{path.parent.name}/{path.name}"
    return identity(path) if masked(place, header) == place else anonymous_id(header, "")


def _header(path: Path):  # type: ignore[no-untyped-def]
    """The DICOM header behind a path; other formats know no patient."""
    other = path.is_file() and path.name.lower().endswith(FILES) and path.suffix.lower() != ".zip"
    return None if other or not path.exists() else first_header(path)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._-") or "scan"


def _from_csv(path: Path) -> Cohort:
    """A CSV with ``path``, relative to the CSV, any other column of the cohort table, and labels of 0, 1 or nothing."""
    table = read_csv(path)
    if "path" not in table.columns:
        raise PreprocessingError(f"{path}: column 'path' is missing (it has {', '.join(map(str, table.columns[:6]))})")
    if table.empty or (table["path"].str.strip() == "").any():
        raise PreprocessingError(f"{path}: {'no rows' if table.empty else 'a row without a path'}; list one scan a row")
    places = [path.parent / place for place in table["path"]]
    given = table["volume"].tolist() if "volume" in table.columns else [_safe(identity(place)) for place in places]
    volumes, shown = [], []
    for row, (name, place) in enumerate(zip(given, places, strict=True), start=2):
        header = _header(place)
        shown.append(masked(table["path"].iloc[row - 2], header))
        if masked(name, header) == name:
            volumes.append(name)
        elif "volume" in table.columns:
            raise PreprocessingError(
                f"{path}: the volume id in line {row} names the patient of its DICOM header; choose another"
            )
        else:
            volumes.append(anonymous_id(header, shown[-1]))
    table = table.assign(volume=volumes, path=shown)
    for name in table.columns:
        if name in ("rescale_slope", "rescale_intercept", "reconstruction"):
            table[name] = pd.to_numeric(table[name].replace("", DEFAULTS[name]), errors="coerce")
            if table[name].isna().any():
                raise PreprocessingError(f"{path}: column {name!r} holds what is not a number")
        elif name not in COLUMNS:
            table[name] = zeros_and_ones(table[name], f"{path}: label column {name!r}")
    labels = {name: table[name] for name in table.columns if name not in COLUMNS}
    records = table.drop(columns=list(labels)).to_dict("records")
    made = rows([{str(name): value for name, value in record.items() if value != ""} for record in records])
    return Cohort(made.assign(**labels), dict(zip(made["volume"], places, strict=True)))
