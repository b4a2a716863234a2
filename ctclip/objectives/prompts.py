"""Cross-entropy on labels, applied to the zero-shot scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ctclip.errors import ConfigError
from ctclip.heads.prompts import pair_vectors
from ctclip.objectives.labels import multi_label
from ctclip.objectives.objective import Context, Features, Objective


class Prompts(Objective):
    """Fits the margins of the run's prompts to the labels (VocabFine; Hamamci et al. 2024)."""

    needs = ("features", "labels")

    def __init__(self, config: object, context: Context) -> None:
        super().__init__(config, context)
        if context.labels is None or context.prompts is None:
            raise ConfigError(
                "objectives.prompts: no label set or no prompts are known; name them in labels= and prompts="
            )
        # Not submodules, because the step already contains the model.
        self.context = (context.model, context.prompts, context.labels.names)
        self.directions: Tensor | None = None

    def forward(self, features: Features, labels: Tensor) -> Tensor:
        """``labels`` (B, L) float32 of 0, 1 and NaN (unknown)."""
        margins = features.scale * features.volumes @ self._directions().T
        return multi_label(margins, labels)

    def _directions(self) -> Tensor:
        """The directions (L, dim) that detection multiplies volumes with, from the negative to the positive prompts of
        each label. They have no gradient: the text encoder learns from the reports alone."""
        model, prompts, names = self.context
        if self.directions is None or not model.text_locked:
            training = model.training
            model.eval()
            with torch.no_grad():
                positive, negative = pair_vectors(model, prompts, names)
            model.train(training)
            self.directions = positive - negative
        return self.directions
