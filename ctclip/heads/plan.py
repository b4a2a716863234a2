"""What a caption head reads off a volume before it writes: which findings to state, and the side of those whose side it knows.

A logistic regression on what the encoder shows, fitted to the statements of the training reports. Sides are read from
the two halves of the volume, each pooled by itself. It decides what is written; the decoder decides how.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctclip.models.encoded import Encoded
from ctclip.report_reading.findings import BOTH

SIDES = ("left", "right", BOTH)
# Of each finding: whether it is stated, and whether with each side.
PARTS = 1 + len(SIDES)
# No side is certain enough.
NEVER = 2.0


class Plan(nn.Module):
    """``weight`` (names * PARTS, features) and ``bias`` on standardised features; a finding is stated if its logit reaches
    ``thresholds`` (names,), with its likeliest side if that side's share of the finding's probability reaches ``certain``
    (names,)."""

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
        """(B, features) of ``plan_features`` -> (B, names, PARTS) logits."""
        logits: Tensor = self.linear((features - self.mean) / self.spread)
        return logits.unflatten(1, (len(self.names), PARTS))

    @torch.inference_mode()
    def findings(self, logits: Tensor) -> list[list[str]]:
        """(B, names, PARTS) -> the findings of each volume that it states."""
        there = (logits[:, :, 0] >= self.thresholds).tolist()
        return [[name for name, one in zip(self.names, row, strict=True) if one] for row in there]

    @torch.inference_mode()
    def sides(self, logits: Tensor) -> list[dict[str, str]]:
        """(B, names, PARTS) -> of each volume the side of every finding whose side is certain, if it is there."""
        shares, best = side_shares(logits)
        known = (shares >= self.certain).tolist()
        return [
            {name: SIDES[side] for name, one, side in zip(self.names, row, sides, strict=True) if one}
            for row, sides in zip(known, best.tolist(), strict=True)
        ]


def plan_features(encoded: Encoded, lateral: int) -> Tensor:
    """(B, features): the pooled vector, and the mean and the largest of each channel over the tokens of either half of the
    volume along the axis ``lateral`` of the grid (a middle token belongs to both)."""
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
    """(B, names, PARTS) -> the probability of the likeliest side over that of the finding (B, names), and which side."""
    probabilities = logits.sigmoid()
    likeliest, best = probabilities[:, :, 1:].max(dim=2)
    return (likeliest / probabilities[:, :, 0].clamp(min=1e-6)).clamp(max=1), best
