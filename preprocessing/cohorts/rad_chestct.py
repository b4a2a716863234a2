"""RAD-ChestCT (Draelos et al. 2021) as it lies on disk: ``trn00001.npz`` and its table of abnormalities by location."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ctclip.preprocessing.cohorts.table import Cohort, read_csv, rows
from ctclip.preprocessing.errors import PreprocessingError

TABLES = "*Abnormality_and_Location_Labels.csv"
SPLITS = {"trn": "train", "val": "valid", "tst": "test"}
SOURCE = "RAD-ChestCT abnormality and location labels"


def recognised(root: Path) -> bool:
    return root.is_dir() and any(root.rglob(TABLES))


def read(root: Path) -> Cohort:
    """Volumes and ``img*_Abnormality_and_Location_Labels.csv``, wherever under ``root``.

    A label is an abnormality at any place: the union of the table's columns ``abnormality*location``. Reports are not
    part of the data set.
    """
    files = {path.stem: path for path in sorted(root.rglob("*.npz"))}
    if not files:
        raise PreprocessingError(f"{root}: no volumes named like trn00001.npz below it")
    parts = [_labels(path) for path in sorted(root.rglob(TABLES))]
    labels = pd.concat(parts) if parts else pd.DataFrame(index=pd.Index([], dtype=str))
    labels = labels[~labels.index.duplicated()]
    orphans = sorted(set(labels.index) - set(files))
    warnings = [f"{len(orphans)} labelled volumes are not on disk, the first {orphans[0]}: left out"] if orphans else []
    table = rows([
        {
            "volume": name, "path": str(path.relative_to(root)), "split": SPLITS.get(name[:3], "all"),
            "label_source": SOURCE if name in labels.index else "",
        }
        for name, path in files.items()
    ])  # fmt: skip
    known = labels.reindex(table["volume"]).reset_index(drop=True)
    return Cohort(pd.concat([table, known.astype("Int8")], axis=1), files, warnings)


def _labels(path: Path) -> pd.DataFrame:
    part = read_csv(path, numbers=True)
    if "NoteAcc_DEID" not in part.columns:
        raise PreprocessingError(f"{path}: column 'NoteAcc_DEID' is missing; take RAD-ChestCT's own table")
    places = part.drop(columns="NoteAcc_DEID").select_dtypes("number")
    if not places.isin([0, 1]).all(axis=None):
        raise PreprocessingError(f"{path}: holds values other than 0 and 1")
    found = places.T.groupby([str(column).partition("*")[0] for column in places.columns]).max().T
    return found.set_index(part["NoteAcc_DEID"].astype(str))
