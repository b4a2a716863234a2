"""The prediction table and the embedding table: the only coupling between inference and evaluation.

One row a volume each. A prediction table holds a probability a finding, its margin (positive minus negative logit,
before calibration), graded findings as ``value:name [unit]``, and which model (and what it learned from), preprocessing
spec and prompts they are of.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ctclip.errors import EvaluationError
from ctclip.preprocessing.files import written_beside

IDENTITY = ("volume", "patient", "scan")
PROVENANCE = ("model", "supervision", "trained_on", "spec", "prompts", "labels", "warnings")
IDS = (*IDENTITY, "VolumeName", "NoteAcc_DEID")
MARGIN = "margin:"
VALUE = "value:"


def prediction_table(
    identity: pd.DataFrame,
    names: list[str],
    probabilities: np.ndarray,
    margins: np.ndarray,
    values: dict[str, np.ndarray],
    *,
    model: str,
    spec: str,
    supervision: str = "",
    trained_on: str = "",
    prompts: str = "",
    labels: str = "",
) -> pd.DataFrame:
    """identity: columns volume, patient, scan, warnings; probabilities, margins (volumes, names); values: graded
    findings, "name [unit]" to (volumes,)."""
    table = identity.loc[:, list(IDENTITY)].reset_index(drop=True)
    scores = pd.DataFrame(probabilities, columns=names)
    logits = pd.DataFrame(margins, columns=[f"{MARGIN}{name}" for name in names])
    graded = pd.DataFrame({f"{VALUE}{name}": column for name, column in values.items()}, index=table.index)
    provenance = pd.DataFrame({
        "model": model, "supervision": supervision, "trained_on": trained_on, "spec": spec, "prompts": prompts,
        "labels": labels, "warnings": identity["warnings"].to_numpy(),
    })  # fmt: skip
    return pd.concat([table, scores, logits, graded, provenance], axis=1)


def embedding_table(volumes: list[str], **embeddings: np.ndarray) -> pa.Table:
    """A table of ``volume`` and columns of float32 vectors: each of ``embeddings`` is (volumes, dim)."""
    columns: dict[str, pa.Array] = {"volume": pa.array(volumes, pa.string())}
    for name, vectors in embeddings.items():
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table(columns)


def read_embeddings(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """``volume`` (n,) and each column of vectors (n, dim) float32 of a file that ``ctclip embed`` or ``zero-shot``
    wrote."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(
            f"{path}: cannot be read as embeddings ({' '.join(str(error).split())[:160]}); `ctclip embed` writes them"
        ) from error
    if "volume" not in table.column_names or len(table.column_names) < 2:
        raise EvaluationError(f"{path}: no columns of embeddings; `ctclip embed` writes them")
    arrays: dict[str, np.ndarray] = {"volume": table["volume"].to_numpy(zero_copy_only=False).astype(str)}
    for name in table.column_names:
        if pa.types.is_fixed_size_list(table[name].type):
            column = table[name].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            arrays[name] = flat.reshape(len(table), column.type.list_size)
    return arrays


def write_predictions(path: str | os.PathLike[str], table: pd.DataFrame) -> None:
    """Write as CSV or, by its ending, Parquet: whole or not at all."""
    with written_beside(path) as partial:
        if Path(path).suffix == ".parquet":
            table.to_parquet(partial, index=False)
        else:
            table.to_csv(partial, index=False, float_format="%.9g")


def read_predictions(path: str | os.PathLike[str]) -> tuple[pd.DataFrame, list[str]]:
    """A checked prediction table and the names of its abnormalities."""
    table = _read_table(Path(path))
    for name in IDENTITY:
        if name not in table.columns:
            raise EvaluationError(f"{path}: column {name!r} is missing; `ctclip zero-shot` writes prediction tables")
        if table[name].isna().any():
            raise EvaluationError(f"{path}: column {name!r} is empty in places; every row needs {', '.join(IDENTITY)}")
    names = [
        str(c) for c in table.columns if c not in (*IDENTITY, *PROVENANCE) and not str(c).startswith((MARGIN, VALUE))
    ]
    if not names:
        raise EvaluationError(f"{path}: has no column of scores")
    if table["volume"].duplicated().any():
        twice = table["volume"][table["volume"].duplicated()].iloc[0]
        raise EvaluationError(f"{path}: volume {twice!r} is listed twice; keep one row a volume")
    table[list(IDENTITY)] = table[list(IDENTITY)].astype(str)
    scores = table[names].apply(pd.to_numeric, errors="coerce")
    if scores.isna().any().any():
        name = scores.columns[scores.isna().any()][0]
        raise EvaluationError(f"{path}: column {name!r} holds a value that is not a number")
    if ((scores < 0) | (scores > 1)).any().any():
        name = scores.columns[((scores < 0) | (scores > 1)).any()][0]
        raise EvaluationError(f"{path}: scores of {name!r} lie outside [0, 1]; give probabilities")
    margins = [f"{MARGIN}{name}" for name in names if f"{MARGIN}{name}" in table.columns]
    table[margins] = table[margins].apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(table[margins].to_numpy(dtype=float)).all():
        name = next(name for name in margins if not np.isfinite(table[name].to_numpy(dtype=float)).all())
        raise EvaluationError(
            f"{path}: column {name!r} holds a value that is not a finite number; volumes are ranked by it"
        )
    for name in ("model", "spec", "prompts", "labels"):
        if name in table.columns and table[name].nunique() > 1:
            some = ", ".join(map(str, table[name].unique()[:3]))
            raise EvaluationError(f"{path}: rows of different {name} ({some}); split the file")
    table[names] = scores
    return table, names


def read_labels(path: str | os.PathLike[str], names: list[str]) -> pd.DataFrame:
    """Labels indexed by volume id, columns ``names``, values 0, 1 or NaN.

    Of a cohort table, a CT-RATE CSV (``VolumeName``) or a RAD-ChestCT CSV (``NoteAcc_DEID``; a finding's columns
    ``finding*location`` are united where there is no column of the finding itself).
    """
    table = _read_table(Path(path))
    if "NoteAcc_DEID" in table.columns:
        table = table.rename(columns={"NoteAcc_DEID": "volume"})
        united = {name: [c for c in table.columns if str(c).startswith(f"{name}*")] for name in names}
        table = table.assign(**{n: table[p].max(axis=1) for n, p in united.items() if p and n not in table.columns})
    if "VolumeName" in table.columns:
        table = table.rename(columns={"VolumeName": "volume"})
    if "volume" not in table.columns:
        raise EvaluationError(
            f"{path}: neither a column 'volume' nor 'VolumeName'; give a cohort table or a labels CSV"
        )
    absent = [name for name in names if name not in table.columns]
    if absent:
        columns = {str(column).casefold(): str(column) for column in table.columns}
        near = difflib.get_close_matches(absent[0].casefold(), columns, n=1, cutoff=0.75)
        there = f"it has {columns[near[0]]!r}" if near else f"it has {', '.join(map(str, table.columns[:6]))} ..."
        raise EvaluationError(
            f"{path}: no label column {absent[0]!r} ({there}); rename it, or choose another --protocol"
        )
    table["volume"] = table["volume"].astype(str).str.removesuffix(".nii.gz")
    if table["volume"].duplicated().any():
        twice = table["volume"][table["volume"].duplicated()].iloc[0]
        raise EvaluationError(f"{path}: volume {twice!r} is listed twice; keep one row a volume")
    given = table.set_index("volume")[names]
    labels = given.apply(pd.to_numeric, errors="coerce").astype("Float64").astype(float)
    wrong = given.notna().to_numpy() & ~np.isin(labels.to_numpy(), (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise EvaluationError(
            f"{path}: {names[column]!r} of {labels.index[row]!r} is {str(given.iloc[row, column])!r}; labels are 0, 1, or "
            f"empty where unknown"
        )
    return labels


def label_file(labels: Path | None, store: Path | None) -> Path:
    """The label table: ``labels`` if given, else the cohort table of ``store``."""
    if labels is None and store is None:
        raise EvaluationError("give --labels, or --store whose cohort table has them")
    return labels if labels is not None else Path(str(store)) / "cohort.parquet"


def read_columns(path: str | os.PathLike[str]) -> list[str]:
    """Names of the columns of a label table."""
    return [str(column) for column in _read_table(Path(path)).columns]


def binary_columns(path: Path, columns: list[str] | None = None) -> list[str]:
    """Columns of a table that hold nothing but 0, 1 and empty cells, and both 0 and 1 or either; or ``columns``, checked.

    Raises EvaluationError naming the first column that is missing or holds another value.
    """
    table = _read_table(path)
    wanted = [str(c) for c in table.columns if c not in IDS] if columns is None else columns
    binary = []
    for name in wanted:
        if name not in table.columns:
            raise EvaluationError(f"{path}: no column {name!r} (it has {', '.join(map(str, table.columns[:6]))} ...)")
        values = pd.to_numeric(table[name], errors="coerce")
        if values.notna().any() and values[table[name].notna()].isin([0, 1]).all():
            binary.append(name)
        elif columns is not None:
            raise EvaluationError(f"{path}: column {name!r} holds values other than 0 and 1")
    if not binary:
        raise EvaluationError(f"{path}: has no column of 0 and 1")
    return binary


def provenance(table: pd.DataFrame, name: str) -> str:
    """``model``, ``spec`` or ``prompts`` of a prediction table, "" where a table does not say."""
    return str(table[name].iloc[0]) if name in table.columns and table[name].notna().any() else ""


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=dict.fromkeys(IDS, str))
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:160]})") from error
    if table.empty:
        raise EvaluationError(f"{path}: is empty")
    return table
