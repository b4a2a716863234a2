"""Reading tables of any origin (CSV, TSV, Parquet), all in the same way, and words that stand for a missing value."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ctclip.preprocessing.csv_files import unguarded
from ctclip.preprocessing.errors import PreprocessingError

VOLUME_SUFFIXES = (
    ".nii.gz", ".nii", ".hdr.gz", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz", ".zip", ".tar.gz", ".tar.bz2", ".tgz",
    ".tar",
)  # fmt: skip
SEPARATORS = (",", "\t", ";", "|")
LONGEST_CELL = 10_000_000
# A value that is not there, in a column of numbers or labels.
MISSING = frozenset(
    ["", "-", "--", "---", ".", "?", "na", "n/a", "n.a.", "#n/a", "nan", "<na>", "none", "null", "nil", "missing", "unknown",
     "not available", "not given", "not applicable"]
)  # fmt: skip
YES, NO = frozenset(["1", "true", "t", "yes", "y"]), frozenset(["0", "false", "f", "no", "n"])
# A section of a report that says nothing: the whole of it, but for case, spaces and full stops.
NO_REPORT = MISSING | frozenset(
    ["not provided", "not stated", "not reported", "not recorded", "not specified", "none given", "none provided",
     "no report", "no report available", "no findings given", "no impression given", "see above", "see below", "see report",
     "see findings", "see impression", "see body of report", "as above", "as below", "as described above", "same as above",
     "to follow", "report to follow", "pending", "report pending", "empty", "blank", "x", "xxx", "tbd"]
)  # fmt: skip
# Columns of 0 and 1 that describe the patient or the scan: never something a report finds.
METADATA = frozenset(
    ["sex", "gender", "male", "female", "is_male", "is_female", "age", "birth_year", "year", "weight", "height", "bmi",
     "ethnicity", "race", "smoker", "smoking", "ever_smoker", "pack_years", "contrast", "iv_contrast", "with_contrast",
     "gated", "split", "fold", "group", "subset", "train", "valid", "test", "training", "validation", "site", "centre", "center",
     "hospital", "scanner", "manufacturer", "model", "kernel", "kvp", "dose", "index", "id", "row", "include", "included",
     "exclude", "excluded", "quality", "dead", "deceased", "death", "died", "event", "inpatient", "outpatient", "emergency",
     "no_chest", "weighted", "label_source", "study", "series", "number", "date", "time"]
)  # fmt: skip


def read_table(path: Path) -> pd.DataFrame:
    """A table as stripped strings, "" where nothing stands; its index is the line (of Parquet, the row) a record begins in.

    The separator of a text file is the one its header has most of; text is UTF-8, with or without a byte order mark.
    Columns without a name (``Unnamed: 0``) are dropped. Raises PreprocessingError with the file, the line and the fault.
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        return _from_parquet(path)
    try:
        text = _decoded(path)
        first, _, rest = text.partition("\n")
        if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:
            # Excel's own way to say it.
            return _from_text(path, rest, first.strip()[4], lines_before=1)
        counts = {mark: re.sub(r'"[^"]*"', "", first).count(mark) for mark in SEPARATORS}
        return _from_text(path, text, max(SEPARATORS, key=lambda mark: counts[mark]))
    except OSError as error:
        raise PreprocessingError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PreprocessingError(f"{path}: is UTF-16; save it as CSV in UTF-8")
    if content.startswith(b"PK\x03\x04") or content.startswith(b"\xd0\xcf\x11\xe0"):
        raise PreprocessingError(
            f"{path}: is a spreadsheet or an archive, whatever its name says; save it as CSV in UTF-8"
        )
    if b"\0" in content:
        raise PreprocessingError(f"{path}: cannot be read as CSV (it holds binary data); save it as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PreprocessingError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}; Latin-1 or Windows-1252?); "
            f"save it as CSV in UTF-8"
        ) from error


def _from_text(path: Path, text: str, separator: str, lines_before: int = 0) -> pd.DataFrame:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=True)
    names: list[str] | None = None
    records, lines, begins = [], [], 1
    try:
        for record in reader:
            line, begins = begins + lines_before, reader.line_num + 1
            cells = [unguarded(cell.strip()) for cell in record]
            if not any(cells):
                continue
            if names is None:
                names = cells
                continue
            while len(cells) > len(names) and not cells[-1]:
                cells.pop()
            if len(cells) > len(names):
                raise PreprocessingError(
                    f"{path}: line {line} has {len(cells)} cells, the header {len(names)}; quote cells that hold "
                    f"{separator!r}"
                )
            records.append(cells + [""] * (len(names) - len(cells)))
            lines.append(line)
    except csv.Error as error:
        raise PreprocessingError(f"{path}: cannot be read as CSV (line {begins + lines_before}: {error})") from error
    if names is None:
        raise PreprocessingError(f"{path}: cannot be read as CSV (it is empty)")
    table = pd.DataFrame(records, columns=names, index=pd.Index(lines, name="line"), dtype=str)
    return _named(path, table)


def _from_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
        # Strings are decoded only here.
        columns = {n: [_cell(value) for value in table.iloc[:, n].tolist()] for n in range(table.shape[1])}
    except Exception as error:
        # The library parses bytes of strangers, and raises whatever they make it raise.
        raise PreprocessingError(
            f"{path}: cannot be read as Parquet ({type(error).__name__}); copy it again"
        ) from error
    frame = pd.DataFrame(columns, index=pd.RangeIndex(1, len(table) + 1, name="row"), dtype=str)
    frame.columns = pd.Index([str(name).strip() for name in table.columns])
    return _named(path, frame)


def _cell(value: object) -> str:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return ""
    return str(value).strip()


def _named(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Without columns that have no name; two of one name are refused."""
    kept = [bool(name) and not re.fullmatch(r"Unnamed: \d+(_level_\d+)?", name) for name in table.columns]
    table = table.loc[:, kept]
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise PreprocessingError(f"{path}: has two columns called {twice[0]!r}; rename or remove one")
    return table


def volume_name(text: str) -> str:
    """A volume's id in a table or a list: its file's name without folders and without the suffix of its format."""
    name = re.split(r"[/\\]", text.strip())[-1]
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def one_row_each(parts: Iterable[tuple[Path, pd.DataFrame]], key: str) -> pd.DataFrame:
    """Tables stacked and indexed by the volume id in column ``key``; the column ``at`` says where each row stands.

    Rows that repeat another are dropped; rows of one volume that contradict each other are refused.
    """
    stacked = []
    for path, table in parts:
        part = table.drop(columns=key).assign(at=[f"{path}, {table.index.name} {line}" for line in table.index])
        part.index = pd.Index([volume_name(name) for name in table[key]], dtype=object)
        stacked.append(part[part.index != ""])
    if not stacked:
        return pd.DataFrame()
    whole = pd.concat(stacked).fillna("")
    for name in whole.index[whole.index.duplicated()].unique():
        rows = whole.loc[[name]]
        for column in rows.columns.drop("at"):
            values = rows[column].drop_duplicates()
            if len(values) > 1:
                first, second = (rows["at"].iloc[(rows[column] == value).to_numpy().argmax()] for value in values[:2])
                raise PreprocessingError(
                    f"{first}: {name} has another {column} than in {second}; keep the row that is right"
                )
    return whole[~whole.index.duplicated()]


def zeros_and_ones(column: pd.Series, what: str) -> pd.Series:
    """A label column as nullable Int8: 0 and 1, their words (``true``, ``no``), and nothing; else the first bad cell is
    quoted with where it stands."""
    values = [_label(cell) for cell in column]
    for place, cell, value in zip(column.index, column, values, strict=True):
        if value is NotALabel:
            where = f"{column.index.name} {place}" if column.index.name else str(place)
            raise PreprocessingError(f"{what} holds values other than 0 and 1: {str(cell)[:40]!r} ({where})")
    return pd.Series(values, index=column.index, dtype="Int8")


NotALabel = object()


def _label(cell: object) -> object:
    text = _cell(cell).casefold()
    if text in MISSING:
        return pd.NA
    if text in YES or text in NO:
        return int(text in YES)
    try:
        number = float(text)
    except ValueError:
        return NotALabel
    return int(number) if number in (0.0, 1.0) else NotALabel


class Columns(NamedTuple):
    """Names of the columns that are labels, and of those that are metadata, each with why."""

    labels: list[str]
    metadata: dict[str, str]


def label_columns(table: pd.DataFrame, names: Sequence[str] | None = None) -> Columns:
    """Which columns of a stranger's table are labels.

    ``names``: exactly these; one that is missing or holds anything but 0, 1 and nothing is refused. Without names: columns
    that hold 0, 1 and nothing else, but for those called like a property of the patient or the scan (``METADATA``).
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
        if re.sub(r"[\s_-]+", "_", name.strip().casefold()).rstrip("?") in METADATA:
            metadata[name] = "describes the patient or the scan"
        elif bad is not None:
            place = f"{table.index.name or 'row'} {table.index[bad]}"
            metadata[name] = f"{str(table[name].iloc[bad])[:40]!r} in {place} is neither 0 nor 1"
        elif all(value is pd.NA for value in values):
            metadata[name] = "empty"
        else:
            labels.append(name)
    return Columns(labels, metadata)


def report_text(text: object) -> str:
    """A section of a report, or "" where it holds nothing but a word for "no report" (``Not given.``, ``nan``, ``-``)."""
    cell = _cell(text)
    return "" if is_no_report(cell) else cell


def is_no_report(text: str) -> bool:
    """Whether a section of a report only says that there is none; empty text is one."""
    bare = " ".join(text.split()).strip(" .:;!*[]()\"'_").casefold()
    return bare in NO_REPORT or not re.search(r"\w", bare)


def numbers(text: object, count: int) -> list[float] | None:
    """``count`` finite numbers of a cell: ``[0.7, 0.7]``, ``(0.7; 0.7)``, ``['0.7', '0.7']``, ``0.7\\\\0.7``, ``0.7``; None
    if it holds another number of them, or anything else."""
    bare = re.sub(r"[\[\](){}'\"]", " ", _cell(text))
    if bare.strip().casefold() in MISSING:
        return None
    parts = [part for part in re.split(r"[\s,;\\|]+", bare) if part]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None
