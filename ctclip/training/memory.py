"""Reports of earlier steps as further negatives of a volume.

A 3-D encoder learns by steps, and a contrastive loss by negatives: a batch that is small for the one is too small for
the other. Text changes slowly, so the embeddings that a text had some steps ago still stand for it (cross-batch memory,
Wang et al. 2020; the queue of He et al. 2020, without a second encoder).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextMemory(nn.Module):
    """The last ``size`` texts of all ranks: unit vectors, and the identities of their scan and wording.

    Buffers, so that a checkpoint holds them; every rank has the same. A place not yet filled has the scan -1.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("texts", torch.zeros(size, dim))
        self.register_buffer("scans", torch.full((size,), -1))
        self.register_buffer("identities", torch.full((size,), -1))
        self.register_buffer("following", torch.zeros(1, dtype=torch.long))
        self.texts: Tensor
        self.scans: Tensor
        self.identities: Tensor
        self.following: Tensor

    def left_out(self, scans: Tensor, identities: Tensor) -> Tensor:
        """(B, size) bool: places that are empty, or of the same scan or wording as the pair (scans (B,), identities)."""
        empty = self.scans < 0
        return empty | (self.scans == scans[:, None]) | (self.identities == identities[:, None])

    @torch.no_grad()
    def remember(self, texts: Tensor, scans: Tensor, identities: Tensor) -> None:
        """Put a batch's texts (B, dim) in the oldest places."""
        size, count = len(self.texts), min(len(texts), len(self.texts))
        places = (self.following + torch.arange(count, device=self.following.device)) % size
        self.texts[places] = texts[-count:].float()
        self.scans[places], self.identities[places] = scans[-count:], identities[-count:]
        self.following.copy_((self.following + count) % size)
