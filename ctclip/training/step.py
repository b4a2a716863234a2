"""One training step as one module, so that ZeRO's hooks see every parameter it uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctclip import losses
from ctclip.config import ObjectiveConfig
from ctclip.distributed import gather
from ctclip.models.dual_encoder import DualEncoder


class ContrastiveStep(nn.Module):
    """The dual encoder with its objectives. ``stage`` chooses a part of the step:

    ``features``: encode this rank's volumes and texts; ``loss``: contrast the features of all ranks;
    ``step``: both. Every rank computes the loss of the whole global batch (see ``distributed.gather``).
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
        similarity = self.model.similarity
        volume_features, text_features = gather(volume_features.float()), gather(text_features.float())
        scans, text_identities = gather(scans), gather(text_identities)
        volumes, texts = similarity.volume(volume_features), similarity.text(text_features)
        views = len(texts) // len(volumes)
        scale = similarity.scale()
        parts: dict[str, Tensor] = {}
        for view in range(views):
            same = losses.same_identity(scans, text_identities[view::views])
            if self.objectives.clip:
                value = losses.clip(volumes, texts[view::views], scale, same)
                parts["clip"] = parts.get("clip", 0.0) + self.objectives.clip * value / views
            if self.objectives.siglip:
                value = losses.siglip(volumes, texts[view::views], scale, similarity.logit_bias, same)
                parts["siglip"] = parts.get("siglip", 0.0) + self.objectives.siglip * value / views
        if self.label_head is not None:
            if labels is None:
                raise ValueError("objectives.labels is set, but the batch has no labels")
            parts["labels"] = self.objectives.labels * losses.multi_label(
                self.label_head(volumes * scale), gather(labels)
            )
        total = torch.stack([part.reshape(()) for part in parts.values()]).sum()
        return total, {name: part.detach() for name, part in parts.items()} | {"logit_scale": scale.detach()}
