"""The numerical precision of parts of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def autocast_off(like: Tensor) -> torch.autocast:
    """A context in which operations keep the precision of their operands on ``like``'s device, under autocast too."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


class ExactLinear(nn.Linear):
    """In its parameters' precision under autocast too: scores rounded to three digits would not keep their order."""

    def forward(self, features: Tensor) -> Tensor:
        with autocast_off(features):
            return super().forward(features.to(self.weight.dtype))
