"""Read tables from any source (CSV, TSV, Parquet) in the same way, and recognise missing values in their cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ctclip.preprocessing.csv_files import unguarded
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import regular
from ctclip.preprocessing.parquet import read_parquet

VOLUME_SUFFIXES = (
    ".nii.gz", ".nii", ".hdr.gz", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz", ".zip", ".tar.gz", ".tar.bz2", ".tgz",
    ".tar",
)  # fmt: skip
# Text around and between numbers: type names and arguments, units, a multiplication sign.
PROGRAMS = re.compile(r"\b[A-Za-z_][\w.]*(?=\()|,\s*dtype=[\w.]+|(?<=[\d.])\s*mm\b|(?<=[\dm\s])[x×](?=\s*\d)")
SEPARATORS = (",", "\t", ";", "|")
LONGEST_CELL = 10_000_000
MOST_ROWS = 10_000_000
# Spellings of a missing value in a column of numbers or labels.
MISSING = frozenset(
    ["", "-", "--", "---", "–", "—", ".", "?", "na", "n/a", "n.a.", "n.a", "n / a", "#n/a", "nan", "<na>", "none", "null",
     "nil", "missing", "unknown", "not available", "not given", "not applicable"]
)  # fmt: skip
# Characters that strip() does not remove: direction marks, joiners, byte order marks of appended files.
INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
SIGNATURES = (
    (b"PK\x03\x04", "a spreadsheet or an archive"), (b"\xd0\xcf\x11\xe0", "a spreadsheet"), (b"\x1f\x8b", "compressed (gzip)"),
    (b"BZh", "compressed (bzip2)"), (b"\xfd7zXZ", "compressed (xz)"), (b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip


def read_table(path: Path) -> pd.DataFrame:
    """Read a table as stripped strings, "" for missing values; its index is the line (in Parquet, the row) in which a
    record begins.

    The separator of a text file is the most frequent one in its header; text is UTF-8, with or without a byte order
    mark. Columns without a name (``Unnamed: 0``) are dropped. Raises PreprocessingError with the file, the line and the
    fault.
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        return _from_parquet(path)
    try:
        text = _decoded(path)
        first, _, rest = text.partition("\n")
        stated = first.strip().strip('"').lower()
        if stated.startswith("sep=") and len(stated) == 5:
            # Excel's separator declaration.
            return _from_text(path, rest, stated[4], lines_before=1)
        return _from_text(path, text, _separator(text))
    except OSError as error:
        raise PreprocessingError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error


def _decoded(path: Path) -> str:
    content = regular(path).read_bytes()
    for signature, what in SIGNATURES:
        if content.startswith(signature):
            raise PreprocessingError(f"{path}: is {what}, whatever its name says; save it as CSV in UTF-8")
    if content.startswith(b"version https://git-lfs"):
        raise PreprocessingError(f"{path}: is a pointer of Git LFS, not the table itself; fetch it with `git lfs pull`")
    if b"\0" in content:
        # In UTF-16, every second byte of Latin letters is 0.
        what = "is UTF-16" if content[:200].count(0) > 0.3 * len(content[:200]) else "holds binary data"
        raise PreprocessingError(f"{path}: cannot be read as CSV (it {what}); save it as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PreprocessingError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}; perhaps Latin-1, Windows-1252 or GB18030); "
            f"save it as CSV in UTF-8"
        ) from error


def _separator(text: str) -> str:
    """The most frequent separator in the header, outside quotes; the header is the first non-empty record."""
    header = re.match(r'(?:"[^"]*"|[^"\n])*', text.lstrip())
    bare = re.sub(r'"[^"]*"', "", header[0] if header else "")
    return max(SEPARATORS, key=bare.count)


def _from_text(path: Path, text: str, separator: str, lines_before: int = 0) -> pd.DataFrame:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=True)
    names: list[str] | None = None
    records, lines, begins = [], [], 1
    try:
        for record in reader:
            line, begins = begins + lines_before, reader.line_num + 1
            cells = [unguarded(stripped(cell)) for cell in record]
            # A repeated header: tables were concatenated.
            if not any(cells) or cells == names:
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
        table = read_parquet(checked_parquet(path)).to_pandas()
        if any(name is not None for name in table.index.names):
            # The index of a data frame may hold the names.
            table = table.reset_index()
        # Strings are decoded only here.
        columns = {n: [cell_text(value) for value in table.iloc[:, n].tolist()] for n in range(table.shape[1])}
    except PreprocessingError:
        raise
    except Exception as error:
        # The library parses untrusted bytes, which can make it raise any exception.
        raise PreprocessingError(
            f"{path}: cannot be read as Parquet ({type(error).__name__}); copy it again"
        ) from error
    frame = pd.DataFrame(columns, index=pd.RangeIndex(1, len(table) + 1, name="row"), dtype=str)
    frame.columns = pd.Index([stripped(str(name)) for name in table.columns])
    return _named(path, frame)


def checked_parquet(path: Path) -> Path:
    """The absolute path of a Parquet file. Raises OSError if it is not a regular file, whatever pyarrow raises if it is
    damaged, and PreprocessingError if it has more than ``MOST_ROWS`` rows: a few bytes can hold billions of equal ones."""
    rows = pq.read_metadata(regular(path).absolute()).num_rows
    if rows > MOST_ROWS:
        raise PreprocessingError(f"{path}: has {rows:,} rows, more than any table of volumes; give another file")
    return path.absolute()


def read_own_parquet(
    path: Path, remedy: str, *, texts: Iterable[str] = (), numbers: Iterable[str] = ()
) -> pd.DataFrame:
    """A Parquet table that a command wrote, with its types. Raises PreprocessingError, with the ``remedy``, if it is damaged or
    lacks one of the columns of ``texts`` and ``numbers``."""
    try:
        table = read_parquet(checked_parquet(path)).to_pandas()
    except PreprocessingError:
        raise
    except Exception as error:
        # The library parses untrusted bytes, which can make it raise any exception.
        raise PreprocessingError(f"{path}: cannot be read as Parquet ({type(error).__name__}); {remedy}") from error
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise PreprocessingError(f"{path}: has two columns called {twice[0]!r}; {remedy}")
    for name in (*texts, *numbers):
        if name not in table.columns:
            raise PreprocessingError(f"{path}: column {name!r} is missing; {remedy}")
        odd = name in texts and any(not isinstance(value, str) for value in table[name])
        if odd or (name in numbers and not pd.api.types.is_numeric_dtype(table[name])):
            raise PreprocessingError(f"{path}: column {name!r} holds no {'text' if odd else 'numbers'}; {remedy}")
    return table


def cell_text(value: object) -> str:
    """A value of a table as text, "" for a missing value."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return ""
    return stripped(str(value))


def stripped(cell: str) -> str:
    """A cell without spaces and invisible characters at its ends."""
    return cell.strip().strip(INVISIBLE).strip()


def _named(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Drop columns without a name; refuse duplicate names."""
    kept = [
        bool(name) and not re.fullmatch(r"Unnamed: [\d.]+(_level_\d+)?|__index_level_\d+__", name)
        for name in table.columns
    ]
    table = table.loc[:, kept]
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise PreprocessingError(f"{path}: has two columns called {twice[0]!r}; rename or remove one")
    return table


def volume_name(text: str) -> str:
    """The id of a volume in a table or a list: its file name without folders and suffix."""
    name = re.split(r"[/\\]", text.strip())[-1]
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def one_row_each(parts: Iterable[tuple[Path, pd.DataFrame]], key: str) -> pd.DataFrame:
    """Concatenate tables and index them by the volume id in column ``key``; the column ``at`` states file and line of
    each row.

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
                raise PreprocessingError(f"{first}: {name} has another {column} than in {second}; keep the correct row")
    return whole[~whole.index.duplicated()]


def numbers(text: object, count: int) -> list[float] | None:
    """``count`` finite numbers of a cell: ``[0.7, 0.7]``, ``(0.7; 0.7)``, ``['0.7', '0.7']``, ``0.7\\\\0.7``, ``0,7;
    0,7``, ``0.7``, ``0.7 x 0.7 mm``, ``array([0.7, 0.7])``, ``[np.float64(0.7), ...]``; None if the cell has a
    different count of numbers or other text, or is ambiguous (``-1,024``)."""
    cell = PROGRAMS.sub(" ", cell_text(text)).strip()
    bare = re.sub(r"[\[\](){}'\"]", " ", cell).strip()
    if bare.casefold() in MISSING or (count == 1 and re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", bare)):
        return None
    parts = [part for part in re.split(r"[\s,;\\|]+", bare) if part]
    if "." not in bare and re.search(r"\d,\d", bare):
        decimals = re.split(r"[\s;\\|]+", bare.replace(",", "."))
        # "0,75" is one number even if two are expected; "1,1" and "[1,2]" are two.
        if len(decimals) == count or (len(decimals) == 1 and bare == cell and len(parts) == len(set(parts)) == 2):
            parts = decimals
    try:
        values = [float(part) for part in parts]
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def without_suffix(volume: str) -> str:
    """A volume's id without the file suffix. A folder in the id is kept, because it distinguishes scans with the same
    name."""
    suffix = next((suffix for suffix in VOLUME_SUFFIXES if volume.lower().endswith(suffix)), "")
    return volume.removesuffix(volume[len(volume) - len(suffix) :])
