"""Reports of earlier steps as additional negatives of a volume.

A 3-D encoder needs many steps and a contrastive loss many negatives, of which small batches have too few. Text
embeddings change slowly, so those of a few steps ago are still usable (cross-batch memory, Wang et al. 2020; the queue
of He et al. 2020, without a second encoder).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class EarlierTexts(NamedTuple):
    """``texts`` (M, dim) unit vectors of earlier steps; their ``scans`` (M,), -1 for an empty slot, and ``identities``
    (M,)."""

    texts: Tensor
    scans: Tensor
    identities: Tensor

    def excluded(self, scans: Tensor, identities: Tensor) -> Tensor:
        """Slots that are empty, or have the scan or wording of the pair (scans (B,), identities (B,)): (B, M) bool."""
        same = (self.scans == scans[:, None]) | (self.identities == identities[:, None])
        return self.empty | same

    @property
    def empty(self) -> Tensor:
        """Slots not yet filled: (M,) bool."""
        return self.scans < 0


class TextQueue(nn.Module):
    """The last ``size`` texts of all ranks. They are buffers, so that a checkpoint includes them; every rank has the
    same."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("texts", torch.zeros(size, dim))
        self.register_buffer("scans", torch.full((size,), -1))
        self.register_buffer("identities", torch.full((size,), -1))
        self.register_buffer("next_slot", torch.zeros(1, dtype=torch.long))
        self.texts: Tensor
        self.scans: Tensor
        self.identities: Tensor
        self.next_slot: Tensor

    def earlier(self) -> EarlierTexts:
        """A copy of the contents of the queue, because ``append`` changes it before the backward pass."""
        return EarlierTexts(self.texts.clone(), self.scans.clone(), self.identities.clone())

    @torch.no_grad()
    def append(self, texts: Tensor, scans: Tensor, identities: Tensor) -> None:
        """Replace the oldest slots with a batch's texts (B, dim), scans and identities (B,)."""
        size, count = len(self.texts), min(len(texts), len(self.texts))
        places = (self.next_slot + torch.arange(count, device=self.next_slot.device)) % size
        self.texts[places] = texts[-count:].float()
        self.scans[places], self.identities[places] = scans[-count:], identities[-count:]
        self.next_slot.copy_((self.next_slot + count) % size)
