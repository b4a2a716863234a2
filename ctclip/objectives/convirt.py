"""ConVIRT's weighted bidirectional loss."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ctclip.config import ObjectiveConfig
from ctclip.objectives.clip import ContrastiveConfig, clip, pairs_apart
from ctclip.objectives.objective import Features, Objective

# Weight of volume -> text relative to text -> volume (Zhang et al. 2022, section 3).
VOLUME_WEIGHT = 0.75


class ConVIRT(Objective):
    """InfoNCE with a weight of 0.75 on volume -> text (Zhang et al. 2022, eq. 4).

    The paper's other two parts are settings: ``model.projection: mlp`` and ``data.views: {sentence: 1}``.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ContrastiveConfig
    needs = ("features",)
    config: ContrastiveConfig

    def forward(self, features: Features) -> Tensor:
        total = features.volumes.new_zeros(())
        for number in range(features.views):
            view = features.view(number)
            same = pairs_apart(view, self.config)
            total = total + clip(view.volumes, view.texts, view.scale, same, view.rows, VOLUME_WEIGHT)
        return total / features.views
