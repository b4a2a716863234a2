"""A folder of volumes and DICOM series, a table of their paths, or a single scan."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip.preprocessing.cohorts.dicom_folders import Scan, dicom_scans
from ctclip.preprocessing.cohorts.table import (
    COLUMNS,
    DEFAULTS,
    FILES,
    METADATA_COLUMNS,
    SECTIONS,
    WHOLE_REPORTS,
    Cohort,
    cohort_table,
    identity,
)
from ctclip.preprocessing.cohorts.walk import Tree
from ctclip.preprocessing.errors import PreprocessingError, counted, printable
from ctclip.preprocessing.facts import GEOMETRY_COLUMNS
from ctclip.preprocessing.formats import archive, text_header
from ctclip.preprocessing.identifiers import all_headers, anonymous_id, masked
from ctclip.preprocessing.label_columns import Columns, label_columns, zeros_and_ones
from ctclip.preprocessing.no_report import is_no_report, report_text
from ctclip.preprocessing.tables import MISSING, numbers, read_table

TABLES = (".csv", ".tsv", ".parquet")
SAMPLED_BYTES = 1 << 16
# Names, in lower case, of columns that are probably reports.
REPORTS = {*WHOLE_REPORTS, *SECTIONS, "impressions", "conclusion", "findings_en", "impressions_en"}


def recognised(tree: Tree) -> bool:
    """Whether the root is a single file: a scan, or a table of scans."""
    return tree.root.is_file()


def read(tree: Tree, *, labels: Sequence[str] | None = None) -> Cohort:
    """Read every volume file and DICOM series below a folder, or the rows of a table, whose label columns ``labels``
    names. Each volume is a patient of its own, unless headers or bytes of two are the same."""
    root = tree.root
    if root.is_file():
        return _from_table(root, labels) if root.suffix.lower() in TABLES else _named(root.parent, [root])
    volumes = [path for path in tree.files if path.name.lower().endswith(FILES)]
    voxels = _voxel_files(volumes, tree.files)
    # Many programs use this suffix; only a NIfTI header has a voxel file beside it.
    volumes = [path for path in volumes if ".hdr" not in path.name.lower()[-7:] or path in voxels]
    known = {*volumes, *voxels.values()}
    rest = [path for path in tree.files if path not in known]
    scans, read_files, images_unused = dicom_scans(rest, alone=not volumes)
    if not volumes and not scans:
        raise PreprocessingError(f"{root}: no {', '.join(FILES)} and no DICOM slices below it")
    series = {scan.name_folder: scan for scan in scans}
    places = sorted(
        [*volumes, *series], key=lambda path: (path.parts if path in series else path.parent.parts, path.name)
    )
    cohort = _named(root, places, series, voxels)
    cohort.unused = tree.others(known | read_files) + images_unused
    return cohort


def _voxel_files(volumes: list[Path], files: list[Path]) -> dict[Path, Path]:
    """The voxel files of volumes that are detached headers, if they exist."""
    by_name = {(path.parent, path.name.lower()): path for path in files}
    voxels: dict[Path, Path] = {}
    for path in volumes:
        kind = path.name[len(identity(path)) :].lower()
        if kind in (".hdr", ".hdr.gz"):
            names = [identity(path) + end for end in (".img", ".img.gz")]
        else:
            names = [name] if kind in (".mhd", ".nhdr") and (name := text_header.data_file(path)) else []
        for place in (path.parent / name for name in names):
            if (place.parent, place.name.lower()) in by_name:
                voxels.setdefault(path, by_name[place.parent, place.name.lower()])
    return voxels


def _named(
    root: Path, paths: list[Path], series: dict[Path, Scan] | None = None, voxels: dict[Path, Path] | None = None
) -> Cohort:
    """Assign ids from file names, or from whole paths if names repeat; ids are anonymous if a path contains the
    patient's name. ``voxels``: the voxel files of detached headers."""
    series = series or {}
    places = [path.relative_to(root) if path != root else Path(root.resolve().name) for path in paths]
    names = _unlike([identity(place) for place in places], [str(place) for place in places])
    records: list[dict[str, Any]] = []
    keys: list[list[str]] = []
    for name, place, path in zip(names, places, paths, strict=True):
        scan = series.get(path)
        headers = scan.headers if scan else _headers(path)
        name_masked = masked(str(place), headers)
        known = name_masked == str(place)
        records.append({
            "volume": name if known else anonymous_id(headers, name_masked), "path": printable(name_masked) if path != root else ".",
        })  # fmt: skip
        uid = str(headers[0].get("SeriesInstanceUID", "") or "") if headers else ""
        keys.append([f"series {uid}" * bool(uid)] + ([f"study {scan.study}" * bool(scan.study)] if scan else []))
    different = {scan.patient for scan in series.values() if scan.patient}
    for path, own in zip(paths, keys, strict=True):
        # A patient id shared by all scans does not identify a patient.
        if path in series and series[path].patient and len(different) > 1:
            own.append(f"patient {series[path].patient}")
    # Headers of different patients may be identical, so their voxels are compared.
    copies = _copies({path: (voxels or {}).get(path, path) for path in paths if path not in series})
    for path, own in zip(paths, keys, strict=True):
        own.append(f"content {copies[path]}" if path in copies else "")
    warnings = _same_patients(records, keys)
    if copies:
        warnings.append(
            f"{len(copies)} volume files are identical to another (the first: {printable(str(min(copies)))}): "
            f"taken as scans of one patient"
        )
    table = cohort_table(records)
    files = {
        name: series[path].folder if path in series else path for name, path in zip(table["volume"], paths, strict=True)
    }
    chosen = {
        name: str(series[path].series)
        for name, path in zip(table["volume"], paths, strict=True)
        if path in series and series[path].series
    }
    return Cohort(table, files, warnings, series=chosen)


def _same_patients(records: list[dict[str, Any]], keys: list[list[str]]) -> list[str]:
    """Assign records with a common key to the patient of the first, because scans of one patient must not be in
    different splits."""
    first: dict[str, int] = {}
    owner = list(range(len(records)))

    def root_of(index: int) -> int:
        while owner[index] != index:
            index = owner[index]
        return index

    for index, own in enumerate(keys):
        for key in filter(None, own):
            one, other = root_of(first.setdefault(key, index)), root_of(index)
            owner[max(one, other)] = min(one, other)
    joined = 0
    for index, record in enumerate(records):
        if root_of(index) != index:
            record["patient"] = records[root_of(index)]["volume"]
            joined += 1
    return (
        [f"{counted(joined, 'scan', 'belongs|belong')} to a patient or a study of an earlier scan: kept together"]
        if joined
        else []
    )


def _copies(files: dict[Path, Path]) -> dict[Path, str]:
    """Volumes whose files have the same bytes as another, each with a hash."""
    sizes: dict[int, list[Path]] = {}
    for path, file in files.items():
        if file.is_file() and file.stat().st_size:
            sizes.setdefault(file.stat().st_size, []).append(path)
    patients: dict[Path, str] = {}
    for size, members in sizes.items():
        for step in (_sampled, _whole):
            groups: dict[str, list[Path]] = {}
            for path in members if len(members) > 1 else []:
                groups.setdefault(step(files[path], size), []).append(path)
            members = [path for group in groups.values() if len(group) > 1 for path in group]
        patients |= {path: value for value, group in groups.items() if len(group) > 1 for path in group}
    return patients


def _sampled(path: Path, size: int) -> str:
    digest = hashlib.blake2b()
    try:
        with path.open("rb") as stream:
            for share in (0.0, 0.3, 0.5, 0.7, 1.0):
                stream.seek(int(share * max(0, size - SAMPLED_BYTES)))
                digest.update(stream.read(SAMPLED_BYTES))
    except OSError:
        return str(path)
    return digest.hexdigest()


def _whole(path: Path, size: int) -> str:
    real = os.path.realpath(path)
    try:
        with open(real, "rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()
    except OSError:
        return str(path)


def scan_id(path: Path) -> str:
    """The id of a scan outside a cohort: its file name, or an anonymous id if the name of the file or folder contains
    the patient's name."""
    headers = _headers(path)
    place = f"{path.parent.name}/{path.name}"
    return printable(identity(path)) if masked(place, headers) == place else anonymous_id(headers, "")


def scan_ids(paths: Sequence[Path]) -> list[str]:
    """``scan_id`` of each path. If names repeat, the folder name is prepended; anonymous ids are numbered instead,
    because folders may name patients. Files with the same name in folders with the same name keep equal ids."""
    ids = [scan_id(path) for path in paths]
    if len(set(ids)) == len(ids):
        return ids
    seen: Counter[str] = Counter()
    for index, (path, name) in enumerate(zip(paths, list(ids), strict=True)):
        seen[name] += 1
        if name == printable(identity(path)):
            ids[index] = f"{printable(path.parent.name)}/{name}"
        elif seen[name] > 1:
            ids[index] = f"{name}-{seen[name]}"
    return ids


def _headers(path: Path) -> list[Any]:
    """The DICOM headers at a path, one per set of identifiers; other formats contain no patient."""
    name = path.name.lower()
    # Unlike Path's methods, these treat names that are too long as missing files.
    other = os.path.isfile(path) and name.endswith(FILES) and not name.endswith(archive.SUFFIXES)
    return [] if other or not os.path.exists(path) else all_headers(path)


def _unlike(names: list[str], places: list[str]) -> list[str]:
    """Distinct ids that are valid file names: the name, the whole path if names repeat, and with a hash of the path if
    these still collide."""
    ids = [_safe(name) for name in names]
    if _alike(ids):
        ids = [_safe(place) for place in places]
    repeated = _alike(ids)
    return [
        f"{name}-{_digest(place)}" if name.casefold() in repeated else name
        for name, place in zip(ids, places, strict=True)
    ]


def _alike(ids: list[str]) -> set[str]:
    # Some file systems ignore case.
    return {name for name, count in Counter(map(str.casefold, ids)).items() if count > 1}


def _safe(name: str) -> str:
    """A name with only letters, digits, ``.``, ``_`` and ``-``; a hash replaces non-ASCII letters."""
    name = unicodedata.normalize("NFC", name)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", plain if not name.isascii() else name).lstrip("._-") or "scan"
    return safe if name.isascii() else f"{safe}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _from_table(path: Path, label_names: Sequence[str] | None) -> Cohort:
    """Read a table with ``path`` (relative to the table), any other columns of the cohort table, labels of 0, 1 or
    empty cells, and metadata."""
    table = read_table(path)
    if "path" not in table.columns:
        raise PreprocessingError(f"{path}: column 'path' is missing (it has {', '.join(map(str, table.columns[:6]))})")
    if table.empty or (table["path"] == "").any():
        raise PreprocessingError(
            f"{path}: {'no rows' if table.empty else 'a row without a path'}; list one scan per row"
        )
    table = table.rename(
        columns={theirs: ours for ours, theirs in GEOMETRY_COLUMNS.items() if ours not in table.columns}
    )
    places = [path.parent / place for place in table["path"]]
    volumes, paths, notes = _ids(path, table, places)
    table = table.assign(volume=volumes, path=paths)
    for name in ("rescale_slope", "rescale_intercept", "reconstruction"):
        if name in table.columns:
            table[name] = pd.Series(
                _numbers(path, table[name], DEFAULTS[name]), table.index, dtype=type(DEFAULTS[name])
            )
    silent = Counter(
        cell for name in SECTIONS if name in table.columns for cell in table[name] if cell and is_no_report(cell)
    )
    if silent:
        notes.append(
            f"{counted(silent.total(), 'section')} of reports with only a placeholder (such as {min(silent)!r}) taken as empty"
        )
    for name in SECTIONS:
        if name in table.columns:
            table[name] = table[name].map(report_text)
    own = [name for name in table.columns if name in COLUMNS or name in METADATA_COLUMNS]
    chosen = label_columns(table.drop(columns=own), label_names)
    labels = {name: zeros_and_ones(table[name], f"{path}: label column {name!r}").to_numpy() for name in chosen.labels}
    reports = [name for name in chosen.metadata if "_".join(str(name).casefold().split()) in REPORTS]
    warnings = [
        f"the column {name!r} is kept, but not read as a report; name it {SECTIONS[2]!r}, or {SECTIONS[3]!r}, if it is one"
        for name in reports
    ]
    notes += _columns_told(chosen, reports)
    records = table[own].to_dict("records")
    cohort = cohort_table([{str(name): value for name, value in record.items() if value != ""} for record in records])
    if "no_chest" in cohort.columns:
        cohort["no_chest"] = (zeros_and_ones(table["no_chest"], f"{path}: column 'no_chest'").fillna(0) == 1).to_numpy()
    geometry = [name for name in GEOMETRY_COLUMNS if name in cohort.columns]
    cohort[geometry] = cohort[geometry].fillna("")
    extra = {name: table[name].to_numpy() for name in chosen.metadata if name not in cohort.columns}
    cohort = cohort.assign(**extra, **{name: pd.array(values, dtype="Int8") for name, values in labels.items()})
    return Cohort(cohort, dict(zip(cohort["volume"], places, strict=True)), warnings=warnings, notes=notes)


def _ids(path: Path, table: pd.DataFrame, places: list[Path]) -> tuple[list[str], list[str], list[str]]:
    """Volume ids that are valid file names, the paths in a form that may be shown, and notes."""
    named = "volume" in table.columns
    if named:
        names = table["volume"].tolist()
        ids = [_safe(name) for name in names]
        if len({*zip(names, ids, strict=True)}) > len(set(ids)):
            ids = [one if one == name else f"{one}-{_digest(name)}" for name, one in zip(names, ids, strict=True)]
    else:
        twice = table["path"].duplicated()
        if twice.any():
            raise PreprocessingError(
                f"{path}: {table['path'][twice].iloc[0]!r} is listed twice (line {table.index[twice][0]})"
            )
        names = ids = _unlike([identity(place) for place in places], table["path"].tolist())
    volumes, masked_paths = [], []
    for line, name, text, place in zip(table.index, ids, table["path"], places, strict=True):
        headers = _headers(place)
        masked_paths.append(masked(text, headers))
        if masked(name, headers) == name:
            volumes.append(name)
        elif named:
            raise PreprocessingError(
                f"{path}: the volume id in line {line} names the patient of its DICOM header; choose another"
            )
        else:
            volumes.append(anonymous_id(headers, masked_paths[-1]))
    changed = [(name, one) for name, one in zip(names, volumes, strict=True) if named and name != one]
    if not changed:
        return volumes, masked_paths, []
    note = (
        f"{counted(len(changed), 'volume id')} changed to a valid file name, such as {changed[0][0]!r} to "
        f"{changed[0][1]!r}"
    )
    return volumes, masked_paths, [note]


def _numbers(path: Path, column: pd.Series, default: Any) -> list[float]:
    numbers_read: list[float] = []
    for line, cell in column.items():
        values = [default] if cell.casefold() in MISSING else numbers(cell, 1)
        if values is None:
            raise PreprocessingError(f"{path}: column {column.name!r} holds {cell[:40]!r}, not a number (line {line})")
        numbers_read.append(values[0])
    return numbers_read


def _columns_told(columns: Columns, reports: Sequence[str]) -> list[str]:
    """Notes on the use of columns, which quote cells, but none of the columns ``reports``."""
    notes = []
    if columns.labels:
        notes.append(f"label columns: {', '.join(columns.labels)}")
    told = [f"{name} ({why})" for name, why in columns.metadata.items() if name not in reports]
    if told:
        metadata = ", ".join(told)
        notes.append(f"kept as metadata, not as labels: {metadata}")
    return notes
