"""The prediction table and the embedding table: the only coupling between inference and evaluation.

One row a volume each. A prediction table holds a probability a finding, its margin (positive minus negative logit,
before calibration), graded findings as ``value: name [unit]``, and which model and preprocessing spec they are of.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ctclip.errors import EvaluationError
from preprocessing.files import written_beside

IDENTITY = ("volume", "patient", "scan")
PROVENANCE = ("model", "spec", "warnings")
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
) -> pd.DataFrame:
    """identity: columns volume, patient, scan, warnings; probabilities, margins (volumes, names); values: graded
    findings, "name [unit]" to (volumes,)."""
    table = identity.loc[:, list(IDENTITY)].reset_index(drop=True)
    scores = pd.DataFrame(probabilities, columns=names)
    logits = pd.DataFrame(margins, columns=[f"{MARGIN}{name}" for name in names])
    graded = pd.DataFrame({f"{VALUE}{name}": column for name, column in values.items()}, index=table.index)
    provenance = pd.DataFrame({"model": model, "spec": spec, "warnings": identity["warnings"].to_numpy()})
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
    found: dict[str, np.ndarray] = {"volume": table["volume"].to_numpy(zero_copy_only=False).astype(str)}
    for name in table.column_names:
        if pa.types.is_fixed_size_list(table[name].type):
            column = table[name].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            found[name] = flat.reshape(len(table), column.type.list_size)
    return found


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
    names = [
        str(c) for c in table.columns if c not in (*IDENTITY, *PROVENANCE) and not str(c).startswith((MARGIN, VALUE))
    ]
    if not names:
        raise EvaluationError(f"{path}: has no column of scores")
    if table["volume"].duplicated().any():
        twice = table["volume"][table["volume"].duplicated()].iloc[0]
        raise EvaluationError(f"{path}: volume {twice!r} is listed twice; keep one row a volume")
    scores = table[names].apply(pd.to_numeric, errors="coerce")
    if scores.isna().any().any():
        name = scores.columns[scores.isna().any()][0]
        raise EvaluationError(f"{path}: column {name!r} holds a value that is not a number")
    if ((scores < 0) | (scores > 1)).any().any():
        raise EvaluationError(f"{path}: scores lie outside [0, 1]; give probabilities")
    for name in ("model", "spec"):
        if name in table.columns and table[name].nunique() > 1:
            raise EvaluationError(
                f"{path}: rows of different {name}s ({', '.join(map(str, table[name].unique()[:3]))}); split the file"
            )
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
    for name in names:
        places = [column for column in table.columns if str(column).startswith(f"{name}*")]
        if name not in table.columns and places:
            table[name] = table[places].max(axis=1)
    if "VolumeName" in table.columns:
        table = table.rename(columns={"VolumeName": "volume"})
        table["volume"] = table["volume"].str.removesuffix(".nii.gz")
    if "volume" not in table.columns:
        raise EvaluationError(
            f"{path}: neither a column 'volume' nor 'VolumeName'; give a cohort table or a labels CSV"
        )
    absent = [name for name in names if name not in table.columns]
    if absent:
        known = ", ".join(str(column) for column in table.columns[:8])
        raise EvaluationError(
            f"{path}: no label column {absent[0]!r} (it has {known} ...); rename it, or choose another --protocol"
        )
    if table["volume"].duplicated().any():
        twice = table["volume"][table["volume"].duplicated()].iloc[0]
        raise EvaluationError(f"{path}: volume {twice!r} is listed twice")
    labels = table.set_index("volume")[names].astype("Float64").astype(float)
    values = labels.to_numpy()
    if not np.isin(values[~np.isnan(values)], (0, 1)).all():
        raise EvaluationError(f"{path}: labels hold values other than 0 and 1")
    return labels


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, keep_default_na=True)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:160]})") from error
    if table.empty:
        raise EvaluationError(f"{path}: is empty")
    return table
