"""SigLIP's pairwise sigmoid loss."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctclip.config import ObjectiveConfig
from ctclip.objectives.objective import Features, Objective, same_identity

EVERY = slice(None)


class SigLIPConfig(ObjectiveConfig):
    """Settings of the pairwise sigmoid loss, which contrasts every pair."""

    by_identity: bool = Field(
        True,
        description="also count reconstructions of the same scan and equal reports as positives; false: only a "
        "volume's own report",
    )


class SigLIP(Objective):
    """Classifies each pair of the global batch as match or non-match (Zhai et al. 2023, eq. 1)."""

    Config: ClassVar[type[ObjectiveConfig]] = SigLIPConfig
    needs = ("features",)
    config: SigLIPConfig

    def forward(self, features: Features) -> Tensor:
        total = features.volumes.new_zeros(())
        for number in range(features.views):
            view = features.view(number)
            same = same_identity(view.scans, view.text_identities, view.rows) if self.config.by_identity else None
            total = total + siglip(view.volumes, view.texts, view.scale, view.bias, same, view.rows)
        return total / features.views


def siglip(
    volumes: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, same: Tensor | None = None, rows: slice = EVERY
) -> Tensor:
    """Pairwise sigmoid loss, in which pairs marked as ``same`` are positives.

    volumes, texts (B, d) unit vectors; scale, bias (1,); same (rows, B) bool. Scalar: the mean over rows of the sum
    over columns. Columns are processed in blocks as long as ``rows``, which are recomputed in the backward pass, so
    that memory does not grow with the number of ranks (section 3.1).
    """
    mine, texts = volumes.float()[rows], texts.float()
    own = torch.arange(len(texts), device=texts.device)[rows]
    total = mine.new_zeros(())
    for first in range(0, len(texts), len(mine)):
        block = slice(first, first + len(mine))
        positive = own[:, None] == torch.arange(len(texts), device=texts.device)[None, block]
        if same is not None:
            positive = positive | same[:, block]
        total = total + checkpoint(_pairs, mine, texts[block], scale, bias, positive, use_reentrant=False)
    return total / len(mine)


def _pairs(volumes: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, positive: Tensor) -> Tensor:
    logits = scale * volumes @ texts.T + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()
