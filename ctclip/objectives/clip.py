"""CLIP's symmetric contrastive loss, over the global batch and texts of earlier steps."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ctclip.config import ObjectiveConfig
from ctclip.objectives.objective import Features, Objective, different_group, same_identity
from ctclip.objectives.text_queue import EarlierTexts

EVERY = slice(None)


class ContrastiveConfig(ObjectiveConfig):
    """Settings of the pairs that are contrasted."""

    negatives: int | None = Field(
        None,
        ge=2,
        le=10**6,
        description="contrast only within groups of this many volumes, as the published training did; null: within "
        "the whole batch",
    )
    by_identity: bool = Field(
        True,
        description="do not count reconstructions of the same scan and equal reports as negatives; false: every report "
        "except the volume's own is a negative, as in the published training",
    )


class ClipConfig(ContrastiveConfig):
    """Symmetric InfoNCE."""

    queue: int = Field(
        0,
        ge=0,
        le=10**7,
        description="number of texts of earlier steps used as additional negatives; 0: use only the batch",
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> ClipConfig:
        if self.queue and self.negatives is not None:
            raise ValueError("queue adds negatives and negatives limits them: set only one of the two")
        return self


class Clip(Objective):
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, figure 3; van den Oord et al. 2018, eq. 4)."""

    Config: ClassVar[type[ObjectiveConfig]] = ClipConfig
    needs = ("features", "earlier_texts")
    config: ClipConfig

    @property
    def queue_size(self) -> int:
        return self.config.queue

    def forward(self, features: Features, earlier_texts: EarlierTexts | None) -> Tensor:
        total = features.volumes.new_zeros(())
        for number in range(features.views):
            view = features.view(number)
            further = None
            if self.config.queue and earlier_texts is not None:
                further = earlier_texts.texts, self._excluded(view, earlier_texts)
            same = pairs_apart(view, self.config)
            total = total + clip(view.volumes, view.texts, view.scale, same, view.rows, further=further)
        return total / features.views

    def _excluded(self, view: Features, earlier: EarlierTexts) -> Tensor:
        """Which earlier texts each of this rank's volumes is not contrasted with: (rows, M) bool."""
        if not self.config.by_identity:
            return earlier.empty.expand(len(view.scans[view.rows]), -1)
        return earlier.excluded(view.scans[view.rows], view.text_identities[view.rows])


def pairs_apart(view: Features, config: ContrastiveConfig) -> Tensor:
    """Pairs that are not negatives of each other, by identity and by group: (rows, B) bool."""
    apart = same_identity(view.scans, view.text_identities, view.rows)
    if not config.by_identity:
        apart = torch.zeros_like(apart)
    if config.negatives is not None:
        apart = apart | different_group(len(view.volumes), config.negatives, view.rows, apart.device)
    return apart


def clip(
    volumes: Tensor,
    texts: Tensor,
    scale: Tensor,
    same: Tensor | None = None,
    rows: slice = EVERY,
    volume_weight: float = 0.5,
    further: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Symmetric InfoNCE of a batch of pairs.

    volumes, texts (B, d) unit vectors, row i of one belonging to row i of the other; scale (1,) the inverse
    temperature; same (rows, B) bool: pairs left out of the sums, so that they are never pushed apart (the diagonal is
    always in). rows: a rank's share, whose volumes and texts are summed against all columns: no rank holds the whole
    matrix, and the mean over ranks is the loss of the global batch. further: other texts (M, d) that volumes are
    contrasted with too, and which of them each row is not (rows, M) bool. Scalar, in nats; ln B is chance without further
    texts.
    """
    volumes, texts = volumes.float(), texts.float()
    target = torch.arange(len(volumes), device=volumes.device)[rows]
    masked = None
    if same is not None:
        masked = same.clone()
        masked[torch.arange(len(target), device=target.device), target] = False
    total = volumes.new_zeros(())
    for weight, one, other in ((volume_weight, volumes, texts), (1 - volume_weight, texts, volumes)):
        logits = scale * one[rows] @ other.T
        if masked is not None:
            logits = logits.masked_fill(masked, float("-inf"))
        if further is not None and one is volumes:
            others, excluded = further
            logits = torch.cat([logits, (scale * one[rows] @ others.T).masked_fill(excluded, float("-inf"))], dim=1)
        total = total + weight * F.cross_entropy(logits, target)
    return total
