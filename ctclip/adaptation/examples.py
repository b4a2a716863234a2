"""Labelled volumes with embeddings, which are computed once and cached."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.data.dataset import label_array, stored_volumes
from ctclip.data.label_table import read_label_table
from ctclip.errors import DataError, EvaluationError
from ctclip.evaluation.tables import read_embeddings
from ctclip.inference.embed import embed_scans
from ctclip.inference.run import VOLUME, run_key
from ctclip.inference.scans import StoredScans
from ctclip.labels import store_labels
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.store import VolumeStore

# Number of embeddings per file, and the prefix of the file names.
TOGETHER, PART = 512, "part-"


@dataclass(frozen=True)
class Splits:
    """The splits of the cohort to learn from and to test on."""

    train: str = "train"
    test: str = "valid"


@dataclass(frozen=True)
class Labelled:
    """Labelled volumes of one split. table: one row per volume (volume, patient, scan, split); labels (n, L) float64 of
    0, 1 and NaN (unknown); names: of the labels."""

    table: pd.DataFrame
    labels: np.ndarray
    names: tuple[str, ...]

    @property
    def patients(self) -> np.ndarray:
        """Patient ids (n,)."""
        return self.table["patient"].to_numpy(dtype=str)

    def only(self, chosen: np.ndarray) -> Labelled:
        """The same volumes with only the labels in ``chosen`` (L,) bool."""
        names = tuple(name for name, kept in zip(self.names, chosen, strict=True) if kept)
        return Labelled(self.table, self.labels[:, chosen], names)


@dataclass(frozen=True)
class Examples(Labelled):
    """Labelled volumes with their embeddings: ``vectors`` (n, dim) float32 unit vectors."""

    vectors: np.ndarray


def labelled_volumes(store: VolumeStore, split: str, own: pd.DataFrame | None) -> Labelled:
    """The labelled volumes of ``split``, with the labels of the store or of ``own`` (from ``read_label_table``). Raises
    DataError if there are none."""
    table = stored_volumes(store, split)
    names, known = store_label_array(table, store) if own is None else own_label_array(table, own)
    used = ~np.isnan(known).all(axis=1)
    if not used.any():
        raise DataError(f"{store.path}: no volume of split {split!r} has a label")
    return Labelled(table[used].reset_index(drop=True), known[used], names)


def read_labelled(
    store: VolumeStore, splits: Splits, labels: Path | None, known: Sequence[str]
) -> tuple[Labelled, Labelled]:
    """Training and test volumes of a store with its own labels, or those of a table; ``known``: the model's label
    names.

    Labels with only one class among the training patients are left out, with a note. Raises DataError,
    PreprocessingError.
    """
    own = read_label_table(labels, store, known) if labels is not None else None
    train, test = (labelled_volumes(store, split, own) for split in (splits.train, splits.test))
    twice = sorted(set(train.patients.tolist()) & set(test.patients.tolist()))
    if twice:
        raise DataError(
            f"{len(twice)} patients, the first {twice[0]!r}, are in both the training and the test split; split by patient"
        )
    both = with_both_classes(train, labels or store.path)
    left_out = [name for name, has_both in zip(train.names, both, strict=True) if not has_both]
    if left_out:
        print(
            f"note: labels left out, because the training patients have only one class of them: {', '.join(left_out)}"
        )
    return train.only(both), test.only(both)


def with_both_classes(train: Labelled, source: Path) -> np.ndarray:
    """Which labels (L,) bool have positives and negatives among the training volumes. Raises DataError, naming the
    ``source`` of the labels, if there is none."""
    both = (train.labels == 1).any(axis=0) & (train.labels == 0).any(axis=0)
    if not both.any():
        raise DataError(f"{source}: every label has only one class among the training patients; label more of them")
    return np.asarray(both)


def embedded(
    loaded: ModelFolder, store: VolumeStore, volumes: Labelled, cache: Path, batch: int = 8
) -> tuple[Examples, np.ndarray]:
    """The volumes with their embeddings, and a bool (n,) of those that could be read."""
    scans = StoredScans(store, None, loaded.spec, loaded.path)
    scans.table = volumes.table
    vectors = cached_embeddings(loaded, scans, cache, batch)
    there = np.array([name in vectors for name in volumes.table["volume"]])
    table = volumes.table[there].reset_index(drop=True)
    return (
        Examples(table, volumes.labels[there], volumes.names, np.stack([vectors[name] for name in table["volume"]])),
        there,
    )


def cached_embeddings(loaded: ModelFolder, scans: StoredScans, cache: Path, batch: int) -> dict[str, np.ndarray]:
    """Unit vectors (dim,) float32 by volume. Volumes that cannot be read are left out, with a note. Raises DataError if
    none can be read.

    ``cache``: a folder that commands, models and stores may share. Only volumes that are missing there, or were stored
    again since, are embedded, ``TOGETHER`` per file, so that an interrupted command resumes.
    """
    folder = cache / run_key(loaded.hash, loaded.spec.hash, loaded.model.precision, scans.origin())
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(map(str, scans.table["volume"]))
    vectors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob(f"{PART}*.parquet")):
        vectors |= _read_part(path, scans.store)
    missing = scans.table[~scans.table["volume"].isin(list(vectors))]
    refused: dict[str, str] = {}
    for first in range(0, len(missing), TOGETHER):
        before = len(refused)
        scans_of_part = copy(scans)
        scans_of_part.table = missing.iloc[first : first + TOGETHER].reset_index(drop=True)
        waiting = folder / f"{run_key(list(scans_of_part.table['volume']))}.parquet"
        try:
            embed_scans(loaded, scans_of_part, waiting, batch, refused, force=True)
        except DataError:
            # Every volume of this part was refused; another part may be readable.
            if len(refused) - before == len(scans_of_part.table):
                continue
            raise
        arrays = read_embeddings(waiting)
        waiting.replace(folder / _part_name(arrays["volume"], scans.store))
        vectors |= dict(zip(arrays["volume"].tolist(), arrays[VOLUME], strict=True))
    for reason in refused.values():
        print(f"refused: {reason}")
    kept = {name: vectors[name] for name in wanted if name in vectors}
    if not kept:
        raise DataError(next(iter(refused.values()), f"{scans.store.path}: no volume to embed"))
    return kept


def _part_name(volumes: Sequence[str] | np.ndarray, store: VolumeStore) -> str:
    """The name of a file of embeddings, which depends on the checksums of its volumes."""
    return f"{PART}{run_key(list(map(str, volumes)), [store.checksums(str(name)) for name in volumes])}.parquet"


def _read_part(path: Path, store: VolumeStore) -> dict[str, np.ndarray]:
    """Vectors by volume; empty if the file cannot be read or its volumes have changed."""
    try:
        arrays = read_embeddings(path)
        if VOLUME not in arrays or path.name != _part_name(arrays["volume"], store):
            return {}
    except (EvaluationError, PreprocessingError):
        return {}
    return dict(zip(arrays["volume"].tolist(), arrays[VOLUME], strict=True))


def store_label_array(table: pd.DataFrame, store: VolumeStore) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and labels (n, L) of the store's own label set."""
    label_set = store_labels(store)
    if label_set is None:
        raise DataError(f"{store.path}: its cohort table has no labels; give a table of labels with --labels")
    return label_set.names, label_array(table, label_set).astype(float)


def own_label_array(table: pd.DataFrame, labels: pd.DataFrame) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and labels (n, L) of the volumes in ``table``; NaN where ``labels`` does not list one."""
    return tuple(map(str, labels.columns)), labels.reindex(table["volume"]).to_numpy(dtype=float)
