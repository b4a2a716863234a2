"""Attention in one fused call, or computed step by step if its probabilities are needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.models import by_hand


class Seen(NamedTuple):
    """``probabilities`` (S, heads, n, n) of S sequences, part of the autograd graph; ``in_plane``: whether the
    attention had a positional bias, as within a slab of slices but not along slabs."""

    probabilities: Tensor
    in_plane: bool


class Attention(nn.Module):
    """Softmax attention of query, key and value (S, heads, n, c); it has no parameters. Its probabilities are appended
    to the list ``seen`` if one is set, for explanations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """``mask``: bool, broadcast to (S, heads, n, n), true where attended to; ``bias`` (heads, n, n), used with
        ``scale``."""
        if self.seen is not None:
            return self._written_out(query, key, value, mask, bias, scale)
        if bias is not None:
            assert scale is not None
            return by_hand.attention(query, key, value, bias.to(query.dtype), scale)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def _written_out(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float | None
    ) -> Tensor:
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        assert self.seen is not None
        self.seen.append(Seen(probabilities, bias is not None))
        return probabilities @ value
