"""Volumes of a store with their reports, read into batches.

A voxel is written once: the store decompresses int16 HU into the batch, and the device that trains does the rest
(``augment.py``). Reading labels is a separate, explicit step (``labels=``): a run that trains from reports alone never
touches the label columns.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ctclip.config import DataConfig
from ctclip.data.augment import Change, draw_change, shown
from ctclip.data.reports import Report, ReportViews
from ctclip.errors import DataError
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore


@dataclass
class Batch:
    """volumes (B, 1, D, H, W) float32; texts B * views strings, view varying fastest; scan, texts' identities."""

    volumes: Tensor
    texts: list[str]
    scans: Tensor
    text_identities: Tensor
    labels: Tensor | None


@dataclass
class ReadBatch:
    """As the store has it: hu (B, 1, D, H, W) int16, and how each volume is to be changed; the rest as in Batch."""

    hu: Tensor
    changes: list[Change]
    texts: list[str]
    scans: Tensor
    text_identities: Tensor
    labels: Tensor | None

    def pin_memory(self) -> ReadBatch:
        """What DataLoader calls on it, so that the copy to a card runs beside its work."""
        self.hu = self.hu.pin_memory()
        return self

    def on(self, device: torch.device, spec: PreprocessingSpec) -> Batch:
        """What a model on ``device`` is shown; ``spec``: the store's."""
        return Batch(
            volumes=shown(self.hu.to(device, non_blocking=True), spec, self.changes),
            texts=self.texts,
            scans=self.scans.to(device),
            text_identities=self.text_identities.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )


class StoredVolumes(Dataset):
    """The stored volumes of ``split`` with views of their reports, by the batch."""

    def __init__(
        self,
        config: DataConfig,
        split: str,
        *,
        seed: int = 0,
        training: bool = True,
        labels: Sequence[str] = (),
    ) -> None:
        if config.store is None:
            raise DataError("data.store is not set: name the folder that `ctclip preprocess` wrote")
        self.store = VolumeStore(Path(config.store))
        self.rows = stored_rows(self.store, split)
        if training:
            self.rows = with_report(self.rows, f"{self.store.path}: split {split!r}")
        if training and config.volumes is not None:
            self.rows = some_scans(self.rows, config.volumes, seed)
        self.scan_numbers = pd.factorize(self.rows["scan"])[0]
        self.config, self.seed, self.training = config, seed, training
        self.views = ReportViews(config.views, config.shuffle_sentences)
        self.reports = [Report(f, i) for f, i in zip(self.rows["findings"], self.rows["impression"], strict=True)]
        self.labels = label_array(self.rows, labels) if labels else None

    @property
    def spec(self) -> PreprocessingSpec:
        return self.store.spec

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, keys: Sequence[tuple[int, int]]) -> ReadBatch:
        """``keys``: (row, draw) each; the same draw gives the same voxels and views, in any worker on any rank."""
        hu = _memory((len(keys), 1, *self.spec.shape))
        changes: list[Change] = []
        texts: list[str] = []
        for voxels, (row, draw) in zip(hu.numpy()[:, 0], keys, strict=True):
            random = np.random.default_rng([self.seed, row, draw])
            self.store.read_into(self.rows["volume"].iloc[row], voxels)
            if self.training:
                changes.append(draw_change(self.config.augment, random))
            texts += [self.views.draw(self.reports[row], random) for _ in range(self.config.views_per_volume)]
        rows = [row for row, _ in keys]
        return ReadBatch(
            hu=hu,
            changes=changes,
            texts=texts,
            scans=torch.from_numpy(self.scan_numbers[rows]),
            text_identities=torch.tensor([zlib.crc32(text.encode()) for text in texts]),
            labels=None if self.labels is None else torch.from_numpy(self.labels[rows]),
        )

    # DataLoader asks for a whole batch by this name.
    __getitems__ = batch


def as_read(batch: Any) -> ReadBatch:
    """``collate_fn`` of a DataLoader over StoredVolumes, whose batches are whole already."""
    whole: ReadBatch = batch
    return whole


def _memory(shape: tuple[int, ...]) -> Tensor:
    """int16, not yet written; in a worker, shared with the process that will train on it."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.int16)
    storage = torch.UntypedStorage._new_shared(2 * math.prod(shape))
    return torch.empty(0, dtype=torch.int16).set_(storage, 0, shape)  # type: ignore[call-overload]


def stored_rows(store: VolumeStore, split: str | None) -> pd.DataFrame:
    """Rows of the cohort table that are stored, of one split (or of all), in a fixed order."""
    table = store.cohort
    stored = table[table["volume"].isin(set(store.volumes))]
    if split is not None:
        stored = stored[stored["split"] == split]
    if stored.empty:
        known = ", ".join(sorted(table["split"].unique()))
        raise DataError(f"{store.path}: no stored volume of split {split!r} (the cohort has: {known})")
    return stored.sort_values("volume").reset_index(drop=True)


def with_report(rows: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows that say anything in findings or impression; nothing can be learned from the others."""
    said = (rows["findings"].fillna("").str.strip() + rows["impression"].fillna("").str.strip()) != ""
    if not said.any():
        raise DataError(f"{where} has no volume with a report; preprocess the cohort together with its reports table")
    return rows[said].reset_index(drop=True)


def some_scans(rows: pd.DataFrame, volumes: int, seed: int) -> pd.DataFrame:
    """``volumes`` rows of scans drawn at random, whole scans as far as they fit. Fewer are part of more."""
    scans = pd.factorize(rows["scan"])[0]
    place = np.random.default_rng([seed, 11]).permutation(scans.max() + 1)[scans]
    chosen = np.argsort(place, kind="stable")[:volumes]
    return rows.iloc[np.sort(chosen)].reset_index(drop=True)


def rarity_weights(labels: np.ndarray, scans: np.ndarray, power: float) -> np.ndarray:
    """How often to draw each scan: (volumes, L) labels of 0, 1, NaN; scans (volumes,) numbers -> (scans,), mean 1.

    A scan weighs as its rarest abnormality does: prevalence ** -power; one without any as the commonest.
    """
    first = np.unique(scans, return_index=True)[1]
    present = np.nan_to_num(labels[first]) > 0
    rates = np.clip(present.mean(axis=0), 1 / len(present), 1)
    weights = np.where(present, rates**-power, rates.max() ** -power).max(axis=1)
    return weights / weights.mean()


def label_array(rows: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
    """(volumes, labels) float32 of 0, 1 and NaN where unknown."""
    absent = [name for name in labels if name not in rows.columns]
    if absent:
        raise DataError(f"the cohort table has no label column {absent[0]!r}; run without labels, or add the column")
    return rows[list(labels)].to_numpy(dtype="float32", na_value=np.nan)


class ScanSampler(Sampler[list[tuple[int, int]]]):
    """This rank's share of every global batch: deterministic, resumable, and aware of scans.

    An epoch shows each scan once, by one of its reconstructions drawn anew each epoch, so that no batch holds
    two reconstructions of a scan. Batches depend on (seed, step) and not on the number of ranks: rank r takes
    rows r * share to (r + 1) * share of the global batch. ``start`` continues at a step. With ``weights`` (one a scan)
    every batch is drawn anew by them, and an epoch is only so many steps.
    """

    def __init__(
        self,
        scans: np.ndarray,
        batch: int,
        steps: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        start: int = 0,
        weights: np.ndarray | None = None,
    ) -> None:
        if batch % world_size:
            raise DataError(f"training.batch={batch} cannot be shared by {world_size} ranks: make it a multiple")
        order = np.argsort(scans, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(scans[order])) + 1)
        if len(self.members) < batch:
            raise DataError(
                f"{len(self.members)} scans are fewer than one batch: set training.batch={len(self.members)} or less"
            )
        self.batch, self.steps, self.seed, self.start = batch, steps, seed, start
        self.rank, self.world_size = rank, world_size
        self.chances = None if weights is None else weights / weights.sum()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.members) // self.batch

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world_size
        for step in range(self.start, self.steps):
            rows = self._global_batch(step)
            yield [(int(row), step) for row in rows[self.rank * share : (self.rank + 1) * share]]

    def _global_batch(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.chances is None:
            random = np.random.default_rng([self.seed, epoch])
            scans = random.permutation(len(self.members))[position * self.batch : (position + 1) * self.batch]
        else:
            random = np.random.default_rng([self.seed, epoch, 2, position])
            scans = random.choice(len(self.members), self.batch, replace=False, p=self.chances)
        picks = np.random.default_rng([self.seed, epoch, 1]).random(len(self.members))
        return [int(self.members[scan][int(picks[scan] * len(self.members[scan]))]) for scan in scans]
