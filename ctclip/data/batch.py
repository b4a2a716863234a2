"""A batch of volumes and texts, as read from the store and as used in a training step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctclip.data.augment import Change, augment_map
from ctclip.data.normalise import to_model_input
from ctclip.preprocessing.spec import PreprocessingSpec

Tokens = dict[str, Tensor]


@dataclass
class Batch:
    """What a training step receives.

    volumes (B, 1, D, H, W) float32 in [-1, 1]; tokens: for each micro-batch the ids of its texts, with the views of a
    volume adjacent (``TextEncoder.tokenise``), on the host; words: likewise ids and mask of whole reports, or None;
    scans (B,) and text_identities (B * views,): equal numbers mean the same scan or the same wording; body (B, N) bool,
    on the host: which tokens contain part of the body, or None; columns: the columns that objectives requested, by
    name, one row per volume.
    """

    volumes: Tensor
    tokens: list[Tokens]
    scans: Tensor
    text_identities: Tensor
    words: list[Tokens] | None = None
    body: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def views(self) -> int:
        """Number of texts per volume."""
        return len(self.text_identities) // len(self.volumes)


@dataclass
class StoredBatch:
    """A batch as stored: ``hu`` (B, 1, D, H, W) int16, and the change of each volume; the other fields are those of
    Batch."""

    hu: Tensor
    changes: list[Change]
    texts: list[str]
    tokens: list[Tokens]
    scans: Tensor
    text_identities: Tensor
    words: list[Tokens] | None = None
    body: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> StoredBatch:
        """Called by DataLoader, so that the copy to a GPU is asynchronous."""
        self.hu = self.hu.pin_memory()
        self.columns = {name: column.pin_memory() for name, column in self.columns.items()}
        return self

    def to(self, device: torch.device, spec: PreprocessingSpec) -> Batch:
        """The batch for a model on ``device``; ``spec``: the store's."""
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        if self.changes:
            columns = {name: self._moved(column, spec) for name, column in columns.items()}
        return Batch(
            volumes=to_model_input(self.hu.to(device, non_blocking=True), spec, self.changes),
            tokens=self.tokens,
            scans=self.scans.to(device, non_blocking=True),
            text_identities=self.text_identities.to(device, non_blocking=True),
            words=self.words,
            body=self.body,
            columns=columns,
        )

    def _moved(self, column: Tensor, spec: PreprocessingSpec) -> Tensor:
        """Apply the changes of the volumes to a column of label maps (B, D, H, W); return other columns unchanged."""
        if column.shape[1:] != self.hu.shape[2:]:
            return column
        return torch.stack([augment_map(one, change, spec) for one, change in zip(column, self.changes, strict=True)])
