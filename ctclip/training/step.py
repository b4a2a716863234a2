"""One training step as one module, so that ZeRO's hooks see every parameter it uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctclip import losses
from ctclip.config import ObjectiveConfig
from ctclip.distributed import gather, rank
from ctclip.models.dual_encoder import DualEncoder


class ContrastiveStep(nn.Module):
    """The dual encoder with its objectives. ``stage`` chooses a part of the step:

    ``features``: encode this rank's volumes and texts; ``loss``: contrast the features of all ranks;
    ``step``: both. A rank's loss is that of its rows against the whole global batch; the mean over ranks is the loss.
    """

    def __init__(self, model: DualEncoder, objectives: ObjectiveConfig, labels: int = 0) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        # A parameter that no loss uses has no gradient and no moments; the optimizer must not know it.
        model.similarity.logit_bias.requires_grad_(objectives.siglip > 0)
        self.label_head = nn.Linear(model.config.dim, labels) if objectives.labels else None

    def forward(self, stage: str, **inputs: Any) -> Any:
        if stage == "features":
            return self._features(**inputs)
        if stage == "loss":
            return self._loss(**inputs)
        features = ("volumes", "tokens")
        volume_features, text_features = self._features(**{name: inputs.pop(name) for name in features})
        return self._loss(volume_features, text_features, **inputs)

    def _features(self, volumes: Tensor, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """volumes (b, 1, D, H, W); tokens of b * views texts -> (b, dim), (b * views, dim)."""
        return self.model.volume_features(volumes), self.model.text_features(tokens)

    def _loss(
        self,
        volume_features: Tensor,
        text_features: Tensor,
        scans: Tensor,
        text_identities: Tensor,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features and identities of this rank -> the loss of the global batch, and what to log of it."""
        similarity, objectives = self.model.similarity, self.objectives
        share = len(scans)
        rows = slice(rank() * share, (rank() + 1) * share)
        volume_features, text_features = gather(volume_features.float()), gather(text_features.float())
        scans, text_identities = gather(scans), gather(text_identities)
        volumes, texts = similarity.volume(volume_features), similarity.text(text_features)
        views = len(texts) // len(volumes)
        scale = similarity.scale()
        parts: dict[str, Tensor] = {}
        for view in range(views):
            of_view = texts[view::views]
            same = losses.same_identity(scans, text_identities[view::views], rows)
            if objectives.negatives is not None:
                same = same | _apart(len(volumes), objectives.negatives, rows, same.device)
            found = {
                "clip": lambda texts=of_view, same=same: losses.clip(volumes, texts, scale, same, rows),
                "convirt": lambda texts=of_view, same=same: losses.convirt(volumes, texts, scale, same, rows),
                "siglip": lambda texts=of_view, same=same: losses.siglip(
                    volumes, texts, scale, similarity.logit_bias, same, rows
                ),
            }
            for name, loss in found.items():
                if weight := getattr(objectives, name):
                    parts[name] = parts.get(name, 0.0) + weight / views * loss()
        if self.label_head is not None:
            if labels is None:
                raise ValueError("objectives.labels is set, but the batch has no labels")
            parts["labels"] = self.objectives.labels * losses.multi_label(
                self.label_head(volumes * scale), gather(labels)
            )
        total = torch.stack([part.reshape(()) for part in parts.values()]).sum()
        return total, {name: part.detach() for name, part in parts.items()} | {"logit_scale": scale.detach()}


def _apart(batch: int, group: int, rows: slice, device: torch.device) -> Tensor:
    """(rows, B) bool: pairs of different groups of ``group`` neighbours."""
    number = torch.arange(batch, device=device) // group
    return number[rows, None] != number[None, :]
