"""Labels from a user's table, used instead of those in the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ctclip.errors import DataError
from ctclip.preprocessing.label_columns import label_columns, mostly_binary, zeros_and_ones
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import one_row_each, read_table

ID_COLUMNS = ("volume", "VolumeName", "scan", "file", "path", "NoteAcc_DEID")


def read_label_table(path: Path, store: VolumeStore, known: Sequence[str] = ()) -> pd.DataFrame:
    """Read a user's label table, indexed by volume: a column of volume names (``ID_COLUMNS``) and columns of 0, 1 and
    empty cells. ``known``: label names of the model, whose columns must be valid labels.

    Raises PreprocessingError for a cell with any other value, and DataError if no volume is in the store.
    """
    table = read_table(path)
    by_name = {str(column).casefold(): str(column) for column in table.columns}
    key = next((by_name[name.casefold()] for name in ID_COLUMNS if name.casefold() in by_name), None)
    if key is None:
        raise DataError(
            f"{path}: has no column of volume names ({', '.join(ID_COLUMNS[:3])} ...; it has "
            f"{', '.join(map(str, table.columns[:6]))}); add one"
        )
    whole = one_row_each([(path, table)], key).drop(columns="at")
    chosen = _label_columns(path, table.drop(columns=key), known)
    stored = store.cohort["volume"].astype(str)
    here = whole.index.intersection(pd.Index(stored))
    if not len(here):
        raise DataError(
            f"{path}: none of its {len(whole)} volumes is in the store {store.path} (the first is {whole.index[0]!r}, the "
            f"store's {stored.iloc[0]!r}); name the store's volumes in the column {key!r}"
        )
    if len(here) < len(whole):
        print(f"note: {path}: {len(whole) - len(here)} of {len(whole)} volumes are not in {store.path}: left out")
    for name in chosen:
        # Check before indexing by volume, so that the error names the line of the file.
        zeros_and_ones(table[name], f"{path}: column {name!r}")
    labels = {name: zeros_and_ones(whole[name], f"{path}: {name!r}").astype("Float64") for name in chosen}
    return pd.DataFrame(labels, index=whole.index).astype(float)


def _label_columns(path: Path, table: pd.DataFrame, known: Sequence[str]) -> list[str]:
    """Columns of 0, 1 and empty cells, and columns that are meant as labels (with a name of the model, or mostly 0 and
    1), whose other values are then refused."""
    columns = label_columns(table)
    names = {name.casefold() for name in known}
    described = ("empty", "describes the patient or the scan")
    meant = {
        name for name, reason in columns.metadata.items()
        if reason not in described and (name.casefold() in names or mostly_binary(table[name]))
    }  # fmt: skip
    chosen = [str(name) for name in table.columns if name in columns.labels or name in meant]
    if not chosen:
        raise DataError(f"{path}: has no label column (one of 0, 1 and empty cells)")
    left = [str(name) for name in columns.metadata if name not in meant]
    if left:
        print(f"note: {path}: not labels: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
    return chosen
