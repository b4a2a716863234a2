"""The choice of scans for each training step: deterministic, resumable, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ctclip.errors import DataError


def rarity_weights(labels: np.ndarray, scans: np.ndarray, power: float) -> np.ndarray:
    """The relative sampling rate of each scan: labels (volumes, L) of 0, 1, NaN; scans (volumes,) indices -> (scans,),
    with mean 1.

    The weight of a scan is that of its rarest abnormality, prevalence ** -power; without any abnormality, that of the
    most common one.
    """
    first = np.unique(scans, return_index=True)[1]
    present = np.nan_to_num(labels[first]) > 0
    rates = np.clip(present.mean(axis=0), 1 / len(present), 1)
    weights = np.where(present, rates**-power, rates.max() ** -power).max(axis=1)
    return weights / weights.mean()


class ScanSampler(Sampler[list[tuple[int, int]]]):
    """This rank's share of every global batch: deterministic, resumable, and aware of scans.

    An epoch shows each scan once, with one of its reconstructions, drawn again each epoch, so that no batch holds two
    reconstructions of a scan. Batches depend on (seed, step) and not on the number of ranks: rank r takes rows r *
    share to (r + 1) * share of the global batch. ``start`` resumes at a step. With ``weights`` (one per scan) every
    batch is drawn with these weights, and an epoch is only a number of steps.
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
            raise DataError(f"training.batch={batch} is not a multiple of the {world_size} ranks")
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
