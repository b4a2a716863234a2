"""The prediction table: the only coupling between detection and evaluation. One row a volume."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.errors import EvaluationError
from preprocessing.files import written_beside

IDENTITY = ("volume", "patient", "scan")
PROVENANCE = ("model", "spec", "warnings")
MARGIN = "margin:"


def prediction_table(
    identity: pd.DataFrame, names: list[str], probabilities: np.ndarray, margins: np.ndarray, model: str, spec: str,
    warnings: list[str] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """identity: columns volume, patient, scan; probabilities, margins (volumes, names)."""
    table = identity.loc[:, list(IDENTITY)].reset_index(drop=True)
    scores = pd.DataFrame(probabilities, columns=names)
    logits = pd.DataFrame(margins, columns=[f"{MARGIN}{name}" for name in names])
    provenance = pd.DataFrame({"model": model, "spec": spec, "warnings": warnings or [""] * len(table)})
    return pd.concat([table, scores, logits, provenance], axis=1)


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
    names = [str(c) for c in table.columns if c not in (*IDENTITY, *PROVENANCE) and not str(c).startswith(MARGIN)]
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
    """Labels indexed by volume id, columns ``names``, values 0, 1 or NaN: of a cohort table or a CT-RATE CSV."""
    table = _read_table(Path(path))
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
            f"{path}: no label column {absent[0]!r} (it has {known} ...); rename it, or choose another protocol"
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
