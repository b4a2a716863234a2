"""The plan of a caption head: which findings to state, and on which side, if certain.

The plan is a logistic regression on features of the encoder, fitted to the statements of the training reports. Sides
are predicted from the two halves of the volume, which are pooled separately. The plan decides what the report states;
the decoder decides how.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctclip.models.encoded import Encoded
from ctclip.report_reading.findings import BOTH

SIDES = ("left", "right", BOTH)
# Targets per finding: whether it is stated, and whether with each side.
PARTS = 1 + len(SIDES)
# A share that no side reaches.
NEVER = 2.0


class Plan(nn.Module):
    """``weight`` (names * PARTS, features) and ``bias`` on standardised features; a finding is stated if its logit
    reaches ``thresholds`` (names,). The most likely side is stated too if its share of the finding's probability
    reaches ``certain`` (names,)."""

    mean: Tensor
    spread: Tensor
    thresholds: Tensor
    certain: Tensor

    def __init__(self, names: Sequence[str], features: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(features, len(names) * PARTS)
        for name, size in (
            ("mean", features),
            ("spread", features),
            ("thresholds", len(names)),
            ("certain", len(names)),
        ):
            self.register_buffer(name, torch.ones(size))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, features) from ``plan_features`` -> logits (B, names, PARTS)."""
        logits: Tensor = self.linear((features - self.mean) / self.spread)
        return logits.unflatten(1, (len(self.names), PARTS))

    @torch.inference_mode()
    def findings(self, logits: Tensor) -> list[list[str]]:
        """Logits (B, names, PARTS) -> the findings to state for each volume."""
        there = (logits[:, :, 0] >= self.thresholds).tolist()
        return [[name for name, one in zip(self.names, row, strict=True) if one] for row in there]

    @torch.inference_mode()
    def sides(self, logits: Tensor) -> list[dict[str, str]]:
        """Logits (B, names, PARTS) -> for each volume, the side of every finding whose side would be certain if it is
        present."""
        shares, best = side_shares(logits)
        known = (shares >= self.certain).tolist()
        return [
            {name: SIDES[side] for name, one, side in zip(self.names, row, sides, strict=True) if one}
            for row, sides in zip(known, best.tolist(), strict=True)
        ]


def plan_features(encoded: Encoded, lateral: int) -> Tensor:
    """Features (B, features): the pooled vector, and the mean and maximum of each channel over the tokens of each half
    of the volume along the axis ``lateral`` of the grid (a middle token belongs to both halves)."""
    every = encoded.tokens if encoded.local is None else torch.cat([encoded.tokens, encoded.local], dim=2)
    grid = every.float().unflatten(1, encoded.grid)
    extent = encoded.grid[lateral]
    half = (extent + 1) // 2
    parts = [encoded.pooled.float()]
    for start in (0, extent - half):
        cells = grid.narrow(1 + lateral, start, half).flatten(1, 3)
        parts += [cells.mean(dim=1), cells.amax(dim=1)]
    return torch.cat(parts, dim=1)


def side_shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, names, PARTS) -> the probability of the most likely side divided by that of the finding (B, names),
    and the index of that side."""
    probabilities = logits.sigmoid()
    likeliest, best = probabilities[:, :, 1:].max(dim=2)
    return (likeliest / probabilities[:, :, 0].clamp(min=1e-6)).clamp(max=1), best
