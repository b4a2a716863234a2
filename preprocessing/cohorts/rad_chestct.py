"""The layout of RAD-ChestCT (Draelos et al. 2021): ``trn00001.npz`` and its table of abnormalities by location."""

from __future__ import annotations

import pandas as pd

from ctclip.preprocessing.cohorts.table import Cohort, cohort_table, identity
from ctclip.preprocessing.cohorts.walk import Tree
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.label_columns import label_columns, zeros_and_ones
from ctclip.preprocessing.tables import one_row_each, read_table

TABLES = "abnormality_and_location_labels.csv"
SPLITS = {"trn": "train", "val": "valid", "tst": "test"}
SOURCE = "RAD-ChestCT abnormality and location labels"


def recognised(tree: Tree) -> bool:
    """Whether the tree has RAD-ChestCT's table of labels."""
    return tree.root.is_dir() and bool(tree.named(TABLES))


def read(tree: Tree) -> Cohort:
    """Read the volumes and ``img*_Abnormality_and_Location_Labels.csv``, anywhere in the tree.

    A label is an abnormality at any location: the union of the table's columns ``abnormality*location``. The data set
    has no reports.
    """
    files = {identity(path): path for path in tree.named(".npz")}
    if not files:
        raise PreprocessingError(f"{tree.root}: no volumes named like trn00001.npz below it")
    labels = _labels(tree)
    orphans = sorted(set(labels.index) - set(files))
    warnings = [f"{len(orphans)} labelled volumes are not on disk, the first {orphans[0]}: left out"] if orphans else []
    table = cohort_table([
        {
            "volume": name, "path": str(path.relative_to(tree.root)), "split": SPLITS.get(name[:3], "all"),
            "label_source": SOURCE if name in labels.index else "",
        }
        for name, path in files.items()
    ])  # fmt: skip
    known = labels.reindex(table["volume"]).reset_index(drop=True)
    unused = tree.others({*files.values(), *tree.named(TABLES)})
    return Cohort(pd.concat([table, known.astype("Int8")], axis=1), files, warnings, unused=unused)


def _labels(tree: Tree) -> pd.DataFrame:
    parts = []
    for path in tree.named(TABLES):
        part = read_table(path)
        if "NoteAcc_DEID" not in part.columns:
            raise PreprocessingError(f"{path}: column 'NoteAcc_DEID' is missing; use RAD-ChestCT's own table")
        parts.append((path, part))
    if not parts:
        return pd.DataFrame(index=pd.Index([], dtype=str))
    whole = one_row_each(parts, "NoteAcc_DEID")
    places = whole.pop("at")
    # A value such as 2 is refused; columns of words are notes.
    columns = [name for name in whole.columns if name in label_columns(whole).labels or "*" in name]
    values = {name: zeros_and_ones(whole[name].set_axis(places), f"label {name!r}").to_numpy() for name in columns}
    known = pd.DataFrame(values, index=whole.index).astype("Int8")
    return known.T.groupby([str(column).partition("*")[0] for column in columns]).max().T.astype("Int8")
