"""Cross-entropy on labels, predicted by a linear map of both embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.errors import ConfigError
from ctclip.objectives.objective import Context, Features, Objective


class Labels(Objective):
    """Multi-label classification of volumes and texts besides contrastive learning; the result is no longer zero-shot.

    The labels are extracted from the reports, as in MedKLIP (Wu et al. 2023) and GreenRFM.
    """

    needs = ("features", "labels")

    def __init__(self, config: object, context: Context) -> None:
        super().__init__(config, context)
        if context.labels is None:
            raise ConfigError("objectives.labels: no label set is known; name one in labels=")
        self.classifier = nn.Linear(context.model.config.dim, len(context.labels.names))

    def forward(self, features: Features, labels: Tensor) -> Tensor:
        """``labels`` (B, L) float32 of 0, 1 and NaN (unknown)."""
        of_volumes = multi_label(self.classifier(features.volumes * features.scale), labels)
        of_texts = multi_label(
            self.classifier(features.texts * features.scale), labels.repeat_interleave(features.views, dim=0)
        )
        return (of_volumes + of_texts) / 2


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over ``labels`` (B, L) of 0, 1 or NaN (unknown, ignored). Scalar; 0 if all are unknown."""
    known = ~torch.isnan(labels)
    losses = F.binary_cross_entropy_with_logits(logits.float(), torch.nan_to_num(labels), reduction="none")
    # Masking instead of indexing avoids waiting for the device to report which labels are known.
    return (losses * known).sum() / known.sum().clamp(min=1)
