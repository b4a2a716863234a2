"""The prediction table and the embedding table, the only interface between inference and evaluation.

Both have one row per volume. A prediction table holds for each finding a probability, its margin (positive minus
negative logit, before calibration) and, if calibrated, the limits of the probability's 95 % interval; graded findings
as ``value:name [unit]``; and the model (with its training data), preprocessing spec and prompts.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from ctclip.errors import EvaluationError
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.label_columns import Columns, label_columns, zeros_and_ones
from ctclip.preprocessing.parquet import read_parquet, write_parquet
from ctclip.preprocessing.tables import checked_parquet, read_table, without_suffix

IDENTITY = ("volume", "patient", "scan")
PROVENANCE = ("model", "supervision", "trained_on", "spec", "prompts", "labels", "precision", "adapted_on", "warnings")
# The id column of label tables: ours, CT-RATE's, RAD-ChestCT's.
ID_COLUMNS = ("volume", "VolumeName", "NoteAcc_DEID")
IDS = (*IDENTITY, *ID_COLUMNS[1:])
MARGIN = "margin:"
VALUE = "value:"
LIMITS = ("lower:", "upper:")
NUMBERS = (MARGIN, VALUE, *LIMITS)


def check_names(names: Sequence[str]) -> None:
    """Raise EvaluationError if a finding has the name of another column of a prediction table."""
    for name in names:
        if name in (*IDENTITY, *PROVENANCE) or name.startswith(NUMBERS):
            raise EvaluationError(f"{name!r} cannot name a finding: prediction tables have a column of that name")


def prediction_table(
    identity: pd.DataFrame,
    names: list[str],
    probabilities: np.ndarray,
    margins: np.ndarray,
    values: dict[str, np.ndarray],
    *,
    intervals: np.ndarray | None = None,
    model: str,
    spec: str,
    supervision: str = "",
    trained_on: str = "",
    prompts: str = "",
    labels: str = "",
    precision: str = "",
    adapted_on: np.ndarray | None = None,
) -> pd.DataFrame:
    """Build a prediction table. ``identity``: columns volume, patient, scan, warnings; ``probabilities``, ``margins``
    (volumes, names); ``intervals`` (volumes, names, 2) of the probabilities, NaN for names without one; ``values``:
    graded findings, "name [unit]" to (volumes,); ``adapted_on`` (volumes,): 1 where model or head were fitted to labels
    of the volume's patient, None if nothing was fitted."""
    table = identity.loc[:, list(IDENTITY)].reset_index(drop=True)
    scores = pd.DataFrame(probabilities, columns=names)
    logits = pd.DataFrame(margins, columns=[f"{MARGIN}{name}" for name in names])
    limits = pd.DataFrame(_limits(names, intervals), index=table.index)
    graded = pd.DataFrame({f"{VALUE}{name}": column for name, column in values.items()}, index=table.index)
    provenance = pd.DataFrame({
        "model": model, "supervision": supervision, "trained_on": trained_on, "spec": spec, "prompts": prompts,
        "labels": labels, "precision": precision, "warnings": identity["warnings"].to_numpy(),
    })  # fmt: skip
    if adapted_on is not None:
        provenance.insert(len(provenance.columns) - 1, "adapted_on", adapted_on.astype(int))
    return pd.concat([table, scores, logits, limits, graded, provenance], axis=1)


def _limits(names: Sequence[str], intervals: np.ndarray | None) -> dict[str, np.ndarray]:
    """Columns for the known interval limits."""
    if intervals is None:
        return {}
    known = [index for index in range(len(names)) if np.isfinite(intervals[:, index]).all()]
    return {f"{limit}{names[index]}": intervals[:, index, side] for index in known for side, limit in enumerate(LIMITS)}


def embedding_table(volumes: list[str], **embeddings: np.ndarray) -> pa.Table:
    """A table of ``volume`` and columns of float32 vectors: each of ``embeddings`` is (volumes, dim)."""
    columns: dict[str, pa.Array] = {"volume": pa.array(volumes, pa.string())}
    for name, vectors in embeddings.items():
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table(columns)


def read_embeddings(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """``volume`` (n,) and each column of vectors (n, dim) float32 of a file that ``ctclip embed`` or ``zero-shot``
    wrote; NaN where a volume has no report. Raises EvaluationError if it is damaged."""
    try:
        table = read_parquet(checked_parquet(Path(path)))
        arrays = {name: _vectors(name, table[name]) for name in table.column_names if name != "volume"}
        names = table["volume"].to_pylist()
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("column 'volume' does not hold one name per volume")
        if len({vectors.shape[1] for vectors in arrays.values()}) != 1:
            raise ValueError("it has no columns of vectors of equal length")
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise EvaluationError(
            f"{path}: cannot be read as embeddings ({' '.join(str(error).split())[:160]}); `ctclip embed` writes them"
        ) from error
    return {"volume": np.array(names, dtype=str), **arrays}


def _vectors(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors as (n, dim). Raises ValueError for other columns."""
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type) or column.null_count:
        raise ValueError(f"column {name!r} does not hold one vector per volume")
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = np.asarray(flat, dtype=np.float32).reshape(len(column), kind.list_size)
    if np.isinf(vectors).any():
        raise ValueError(f"column {name!r} holds infinite numbers")
    return vectors


def write_predictions(path: str | os.PathLike[str], table: pd.DataFrame) -> None:
    """Write CSV, or Parquet if the name ends in .parquet, atomically."""
    with written_beside(path) as partial:
        if Path(path).suffix == ".parquet":
            write_parquet(partial, table)
        else:
            write_csv(partial, table, float_format="%.9g")


def read_predictions(path: str | os.PathLike[str]) -> tuple[pd.DataFrame, list[str]]:
    """Read and check a prediction table; return it with the names of its abnormalities."""
    table = _read_table(Path(path))
    for name in IDENTITY:
        if name not in table.columns:
            raise EvaluationError(f"{path}: column {name!r} is missing; `ctclip zero-shot` writes prediction tables")
        if (table[name] == "").any():
            raise EvaluationError(f"{path}: column {name!r} has empty cells; every row needs {', '.join(IDENTITY)}")
    names = [str(c) for c in table.columns if c not in (*IDENTITY, *PROVENANCE) and not str(c).startswith(NUMBERS)]
    if not names:
        raise EvaluationError(f"{path}: has no column of scores")
    table["volume"] = table["volume"].map(without_suffix)
    if table["volume"].duplicated().any():
        twice = table["volume"][table["volume"].duplicated()].iloc[0]
        raise EvaluationError(f"{path}: volume {twice!r} is listed twice; keep one row per volume")
    for name in table.columns[table.columns.str.startswith(NUMBERS) | table.columns.isin(names)]:
        table[name] = _numbers(path, table[name])
    scores = table[names]
    if ((scores < 0) | (scores > 1)).any().any():
        name = scores.columns[((scores < 0) | (scores > 1)).any()][0]
        raise EvaluationError(f"{path}: scores of {name!r} lie outside [0, 1]; give probabilities")
    for name in ("model", "spec", "prompts", "labels"):
        stated: list[str] = table[name][table[name] != ""].unique().tolist() if name in table.columns else []
        if len(stated) > 1:
            raise EvaluationError(f"{path}: mixes rows of different {name} ({', '.join(stated[:3])}); split the file")
    return table.reset_index(drop=True), names


def _numbers(path: str | os.PathLike[str], column: pd.Series) -> pd.Series:
    # Excel writes 0,5 in many European locales.
    numbers = pd.to_numeric(column.str.replace(",", "."), errors="coerce")
    wrong = ~np.isfinite(numbers.to_numpy(dtype=float))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise EvaluationError(
            f"{path}: column {column.name!r} holds {column.iloc[row][:40]!r} ({column.index.name} "
            f"{column.index[row]}), not a finite number; volumes are ranked by it"
        )
    return numbers


def read_labels(path: str | os.PathLike[str], names: list[str]) -> pd.DataFrame:
    """Labels indexed by volume id, columns ``names``, values 0, 1 or NaN.

    From a cohort table, a CT-RATE CSV (``VolumeName``) or a RAD-ChestCT CSV (``NoteAcc_DEID``; the union of the
    columns ``finding*location`` if the finding has no column of its own).
    """
    table = _read_table(Path(path))
    key = next((name for name in ID_COLUMNS if name in table.columns), None)
    if key is None:
        raise EvaluationError(
            f"{path}: has neither a column 'volume' nor 'VolumeName'; give a cohort table or a labels CSV"
        )
    located = list(table.columns) if "NoteAcc_DEID" in table.columns else []
    parts = {
        name: [name] if name in table.columns else [column for column in located if column.startswith(f"{name}*")]
        for name in names
    }
    absent = [name for name in names if not parts[name]]
    if absent:
        columns = {str(column).casefold(): str(column) for column in table.columns}
        near = difflib.get_close_matches(absent[0].casefold(), columns, n=1, cutoff=0.75)
        hint = f"it has {columns[near[0]]!r}" if near else f"it has {', '.join(map(str, table.columns[:6]))} ..."
        raise EvaluationError(
            f"{path}: no label column {absent[0]!r} ({hint}); rename it, or choose another --protocol"
        )
    united = {name: pd.DataFrame({c: _labels(path, table[c]) for c in parts[name]}).max(axis=1) for name in names}
    labels = pd.DataFrame({"volume": table[key].map(without_suffix), **united}).set_index("volume")
    if labels.index.duplicated().any():
        twice = labels.index[labels.index.duplicated()][0]
        raise EvaluationError(f"{path}: volume {twice!r} is listed twice; keep one row per volume")
    return labels


def _labels(path: str | os.PathLike[str], column: pd.Series) -> pd.Series:
    try:
        return zeros_and_ones(column, f"{path}: column {column.name!r}").astype("Float64").astype(float)
    except PreprocessingError as error:
        raise EvaluationError(f"{error}; labels are 0, 1, or empty where unknown") from error


def label_file(labels: Path | None, store: Path | None) -> Path:
    """The label table: ``labels`` if given, else the cohort table of ``store``."""
    if labels is None and store is None:
        raise EvaluationError("give --labels, or --store whose cohort table has them")
    return labels if labels is not None else Path(str(store)) / "cohort.parquet"


def read_columns(path: str | os.PathLike[str]) -> list[str]:
    """Names of the columns of a label table."""
    return [str(column) for column in _read_table(Path(path)).columns]


def binary_columns(path: Path, columns: list[str] | None = None) -> Columns:
    """The label columns of a table: ``columns``, or the columns of 0, 1 and empty cells that do not describe the
    patient or the scan; see ``preprocessing.label_columns``. Raises EvaluationError naming what is missing or holds
    another value.
    """
    table = _read_table(path)
    try:
        chosen = label_columns(table.drop(columns=[name for name in IDS if name in table.columns]), columns)
    except PreprocessingError as error:
        raise EvaluationError(f"{path}: {error}") from error
    if not chosen.labels:
        raise EvaluationError(
            f"{path}: has no column of 0 and 1 that can be a label; name its label columns with --column"
        )
    for name in chosen.labels:
        _labels(path, table[name])
    return chosen


def provenance(table: pd.DataFrame, name: str) -> str:
    """``model``, ``spec`` or ``prompts`` of a prediction table, "" if the table does not state it."""
    return next((str(value) for value in table[name].dropna() if value != ""), "") if name in table.columns else ""


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    try:
        table = read_table(path)
    except PreprocessingError as error:
        raise EvaluationError(str(error)) from error
    if table.empty:
        raise EvaluationError(f"{path}: is empty")
    return table
