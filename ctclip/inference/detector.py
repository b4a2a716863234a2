"""Zero-shot detection: text embedded once for all volumes, a volume encoded once for all abnormalities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctclip.inference.prompts import PromptSet
from ctclip.models.dual_encoder import DualEncoder


class Detector:
    """Scores abnormalities by the softmax over each one's positive and negative prompt."""

    def __init__(self, model: DualEncoder, prompts: PromptSet, abnormalities: Sequence[str] | None = None) -> None:
        self.model = model
        self.abnormalities = tuple(abnormalities or prompts.names())
        self.positive, self.negative = self._embed(prompts, True), self._embed(prompts, False)

    @torch.inference_mode()
    def _embed(self, prompts: PromptSet, positive: bool) -> Tensor:
        """(abnormalities, dim). The mean of unit vectors is kept as long as it is for ``ensemble: logits``, whose
        mean of dot products is the dot product with the mean; for ``embeddings`` it is made a unit vector."""
        texts = [prompts.pair(name).side(positive, prompts.sections) for name in self.abnormalities]
        vectors = self.model.encode_text([text for group in texts for text in group])
        means = torch.stack([group.mean(dim=0) for group in vectors.split([len(group) for group in texts])])
        return torch.nn.functional.normalize(means, dim=-1) if prompts.ensemble == "embeddings" else means

    @torch.inference_mode()
    def margins(self, embeddings: Tensor) -> Tensor:
        """Unit volume embeddings (n, dim) -> (n, abnormalities): positive minus negative logit."""
        return self.model.logits(embeddings, self.positive - self.negative)

    @torch.inference_mode()
    def detect(self, volumes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """volumes (B, 1, D, H, W) in [-1, 1] -> probabilities, margins (B, abnormalities), embeddings (B, dim)."""
        embeddings = self.model.encode_volume(volumes)
        margins = self.margins(embeddings)
        return margins.sigmoid(), margins, embeddings
