"""Read volumes of a store with their reports into batches.

Each voxel is written once: the store decompresses int16 HU directly into the batch, and the training device normalises
and augments it (``normalise.py``, ``augment.py``). Labels and other columns are read only if requested; a run that
trains on reports alone never reads them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ctclip.config import DataConfig
from ctclip.data.air import BodyTokens
from ctclip.data.augment import Change, draw_change
from ctclip.data.batch import StoredBatch, Tokens
from ctclip.data.label_table import read_label_table
from ctclip.data.pair_scores import good_pairs
from ctclip.data.reports import ReportViews, reports_of, sentence_numbers, stated_sentences
from ctclip.errors import DataError
from ctclip.labels import LabelSet
from ctclip.language import load_language
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore


@dataclass(frozen=True)
class Tokenisers:
    """Tokenisers for the reading processes: ``texts`` for the text encoder, ``words`` (whole reports) for objectives on
    words, or None; ``parts``: number of micro-batches per batch."""

    texts: Callable[[Sequence[str]], Tokens]
    words: Callable[[Sequence[str]], Tokens] | None = None
    parts: int = 1


class StoredVolumes(Dataset):
    """The stored volumes of ``split`` with views of their reports, in batches."""

    def __init__(
        self,
        config: DataConfig,
        split: str,
        *,
        seed: int = 0,
        training: bool = True,
        columns: Iterable[str] = (),
        labels: LabelSet | None = None,
        sentences: Sequence[str] | None = None,
    ) -> None:
        """``columns``: inputs of objectives besides volumes and texts; ``labels`` stands for the columns of the label
        set, ``sentences`` for the numbers of the reports' sentences, any other name is a column of the store
        (``VolumeStore.read_column``). ``sentences``: the sentences to number; None: those of this split."""
        if config.store is None:
            raise DataError("data.store is not set: name the folder that `ctclip preprocess` wrote")
        self.store = VolumeStore(Path(config.store))
        self.table = stored_volumes(self.store, split)
        if config.label_table is not None:
            self.table = with_own_labels(self.table, read_label_table(Path(config.label_table), self.store), training)
        if training:
            self.table = with_report(self.table, config.sections, f"{self.store.path}: split {split!r}")
            self.table = good_pairs(self.table, self.store, config.min_pair_score, config.best_pairs)
        if training and config.volumes is not None:
            self.table = some_scans(self.table, config.volumes, seed)
        self.scan_numbers = pd.factorize(self.table["scan"])[0]
        self.config, self.split, self.seed, self.training = config, split, seed, training
        self.views = ReportViews(config.views, load_language(config.language), config.shuffle_sentences)
        self.reports = reports_of(self.table, config.sections)
        self.labels = label_array(self.table, labels) if labels is not None else None
        self.columns = tuple(columns)
        self.sentences: tuple[str, ...] = ()
        if "sentences" in self.columns:
            if (own := self.store.path / "columns" / "sentences").is_dir():
                raise DataError(
                    f"{own}: objectives receive the sentences of the reports under this name; rename the column"
                )
            stated = stated_sentences(self.reports)
            every = {sentence for report in stated for sentence in report}
            self.sentences = tuple(sorted(every) if sentences is None else sentences)
            self.sentence_numbers = sentence_numbers(stated, self.sentences)
        if "labels" in self.columns and self.labels is None:
            raise DataError(f"{self.store.path}: an objective needs labels, but no label set is named")
        self.tokenisers: Tokenisers | None = None
        self.body: BodyTokens | None = None

    @property
    def spec(self) -> PreprocessingSpec:
        return self.store.spec

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, keys: Sequence[tuple[int, int]]) -> StoredBatch:
        """``keys``: (row, draw) each; the same draw gives the same voxels and views, in any worker on any rank."""
        hu = _memory((len(keys), 1, *self.spec.shape))
        changes: list[Change] = []
        texts: list[str] = []
        for voxels, (row, draw) in zip(hu.numpy()[:, 0], keys, strict=True):
            random = np.random.default_rng([self.seed, row, draw])
            self.store.read_into(self.table["volume"].iloc[row], voxels)
            if self.training:
                changes.append(draw_change(self.config.augment, random))
                texts += [self.views.draw(self.reports[row], random) for _ in range(self.config.views_per_volume)]
            else:
                texts.append(self.reports[row].text())
        rows = [row for row, _ in keys]
        return StoredBatch(
            hu=hu,
            changes=changes,
            texts=texts,
            tokens=self._tokens(texts),
            words=self._words(texts, len(keys)),
            scans=torch.from_numpy(self.scan_numbers[rows]),
            text_identities=torch.tensor([zlib.crc32(text.encode()) for text in texts]),
            body=self._body(hu, changes),
            columns={name: self._column(name, rows) for name in self.columns},
        )

    # DataLoader calls this method for a whole batch.
    __getitems__ = batch

    def _tokens(self, texts: list[str]) -> list[Tokens]:
        if self.tokenisers is None:
            return []
        size = len(texts) // self.tokenisers.parts
        return [self.tokenisers.texts(texts[first : first + size]) for first in range(0, len(texts), size)]

    def _words(self, texts: list[str], volumes: int) -> list[Tokens] | None:
        if self.tokenisers is None or self.tokenisers.words is None:
            return None
        first_views = texts[:: len(texts) // volumes]
        size = volumes // self.tokenisers.parts
        return [self.tokenisers.words(first_views[first : first + size]) for first in range(0, volumes, size)]

    def _body(self, hu: Tensor, changes: list[Change]) -> Tensor | None:
        if self.body is None:
            return None
        given: Sequence[Change | None] = changes or [None] * len(hu)
        volumes = zip(hu.numpy()[:, 0], given, strict=True)
        return torch.from_numpy(np.stack([self.body.of_hu(volume, change) for volume, change in volumes]))

    def _column(self, name: str, rows: list[int]) -> Tensor:
        if name == "labels":
            assert self.labels is not None
            return torch.from_numpy(self.labels[rows])
        if name == "sentences":
            return torch.from_numpy(self.sentence_numbers[rows])
        return torch.from_numpy(
            np.stack([self.store.read_column(name, self.table["volume"].iloc[row]) for row in rows])
        )


def as_read(batch: Any) -> StoredBatch:
    """``collate_fn`` of a DataLoader over StoredVolumes, which returns complete batches."""
    whole: StoredBatch = batch
    return whole


def _memory(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised int16 memory; in a worker, it is shared with the training process."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.int16)
    storage = torch.UntypedStorage._new_shared(2 * math.prod(shape))
    return torch.empty(0, dtype=torch.int16).set_(storage, 0, shape)  # type: ignore[call-overload]


def stored_volumes(store: VolumeStore, split: str | None) -> pd.DataFrame:
    """The rows of the cohort table whose volumes are stored, of one split or of all, in a fixed order."""
    table = store.cohort
    stored = table[table["volume"].isin(set(store.volumes))]
    if split is not None:
        stored = stored[stored["split"] == split]
    if stored.empty:
        known = ", ".join(sorted(table["split"].unique()))
        raise DataError(f"{store.path}: no stored volume of split {split!r} (the cohort has: {known})")
    return stored.sort_values("volume").reset_index(drop=True)


def with_report(table: pd.DataFrame, sections: Sequence[str], where: str) -> pd.DataFrame:
    """The rows with a text in any of ``sections``; other volumes cannot be used for training."""
    written = np.array([bool(report.text()) for report in reports_of(table, sections)])
    if not written.any():
        raise DataError(f"{where} has no volume with a report; preprocess the cohort together with its reports table")
    return table[written].reset_index(drop=True)


def with_own_labels(table: pd.DataFrame, labels: pd.DataFrame, training: bool) -> pd.DataFrame:
    """The volumes with the columns of ``labels`` (indexed by volume, 0, 1 and NaN) in place of their own; if they are
    used for training, volumes without a label are left out."""
    others = table.drop(columns=[name for name in labels.columns if name in table.columns])
    joined = others.join(labels, on="volume")
    if not training:
        return joined
    known = joined[list(labels.columns)].notna().any(axis=1)
    if not known.any():
        raise DataError("none of the volumes of this split has a label in data.label_table")
    return joined[known].reset_index(drop=True)


def some_scans(table: pd.DataFrame, volumes: int, seed: int) -> pd.DataFrame:
    """``volumes`` volumes of randomly drawn scans, with complete scans as far as possible. A smaller draw is a subset
    of a larger one."""
    scans = pd.factorize(table["scan"])[0]
    place = np.random.default_rng([seed, 11]).permutation(scans.max() + 1)[scans]
    chosen = np.argsort(place, kind="stable")[:volumes]
    return table.iloc[np.sort(chosen)].reset_index(drop=True)


def label_array(table: pd.DataFrame, labels: LabelSet) -> np.ndarray:
    """(volumes, labels) float32 of 0, 1 and NaN where unknown. Raises DataError if the table lacks a label."""
    columns = labels.columns(table.columns)
    absent = [name for name in labels.names if name not in columns]
    if absent:
        raise DataError(
            f"the cohort table has no column for the label {absent[0]!r} of the label set {labels.name!r}; name the "
            f"store's own set (labels=null), or add the column"
        )
    return np.stack([united(table, columns[name]) for name in labels.names], axis=1).astype("float32")


def united(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """The union of label columns (volumes,): 1 where any of ``columns`` is 1, 0 where all are 0, else NaN."""
    values = table[list(columns)].to_numpy(dtype="float64", na_value=np.nan)
    present = (values == 1).any(axis=1)
    return np.where(present, 1.0, np.where(np.isnan(values).any(axis=1), np.nan, 0.0))
