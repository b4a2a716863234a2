"""Gradient-weighted attention: the contribution of each token to the pooled vector, traced back through the layers.

Chefer, Gur and Wolf 2021 ("Generic Attention-model Explainability", eq. 5 and 6): relevance flows through a layer in
proportion to the positive part of attention times its gradient, averaged over heads, plus the identity for the residual
connection. It is traced from the last layer to the first as one row, which avoids the matrix of all pairs of tokens.
The row starts as the contribution of each last token to the score (gradient times value, where positive). In an encoder
whose layers attend within slabs and then across them, relevance stays within the sequences of each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Maps, Method, Subject, gradients
from ctclip.models.attention import Attention as Layer
from ctclip.models.attention import Seen
from ctclip.models.encoded import Evidence

# Maximum number of attention probabilities in memory, with their gradients; 4 bytes each.
MOST = 2**29


class Attention(Method):
    """Encodes once and makes one backward pass for each finding. For transformers with full attention."""

    name = "attention"

    def maps(self, subject: Subject) -> Maps:
        encoder = subject.model.volume_encoder
        layers = [module for module in encoder.modules() if isinstance(module, Layer)]
        if not layers:
            raise ExplanationError(
                f"{type(encoder).__name__} has no attention layers: use --method similarity or occlusion"
            )
        self._check_size(subject, layers)
        seen: list[Seen] = []
        try:
            for layer in layers:
                layer.seen = seen
            with torch.enable_grad():
                evidence = encoder.evidence(subject.volume.detach().clone().requires_grad_())
                tokens = evidence.levels[0].features
                pooled = evidence.pool([level.features for level in evidence.levels])
                scores = subject.scores(evidence.encoded._replace(pooled=pooled))
                slopes = gradients(subject, scores, [tokens, *(one.probabilities for one in seen)])
        finally:
            for layer in layers:
                layer.seen = None
        kept = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        if evidence.encoded.real is not None:
            kept = evidence.encoded.real[0]
        rows = []
        for token_slope, *attention_slopes in slopes:
            row = (token_slope * tokens.detach()).sum(dim=2).clamp(min=0)[0][kept]
            for one, slope in zip(reversed(seen), reversed(attention_slopes), strict=True):
                row = _back(row, one, slope, evidence)
            full = row.new_zeros(len(kept))
            full[kept] = row
            rows.append(full)
        values = torch.stack(rows).unflatten(1, evidence.encoded.grid)
        return Maps(values.float().cpu().numpy(), evidence.encoded.affine)

    def _check_size(self, subject: Subject, layers: list[Layer]) -> None:
        """Raise ExplanationError if the attention of all layers does not fit in memory."""
        config = subject.model.volume_encoder.config
        if getattr(config, "window", None) is not None:
            raise ExplanationError("attention in windows is not supported: use --method similarity or occlusion")
        encoded = subject.evidence().encoded
        longest = encoded.tokens.shape[1]
        sequences = 1
        if hasattr(config, "spatial_depth"):
            sequences, longest = encoded.grid[0], encoded.grid[1] * encoded.grid[2]
        size = sequences * longest**2 * getattr(config, "heads", 1) * len(layers)
        if size > MOST:
            raise ExplanationError(
                f"{encoded.tokens.shape[1]} tokens in {len(layers)} layers of attention do not fit in memory: "
                f"use --method similarity or occlusion"
            )


def _back(row: Tensor, seen: Seen, slope: Tensor, evidence: Evidence) -> Tensor:
    """The relevance (n,) of a layer's output tokens -> the relevance (n,) of its input tokens."""
    flow = (seen.probabilities.detach() * slope).clamp(min=0).mean(dim=1)
    sequences, length = flow.shape[:2]
    if sequences == 1 and length >= len(row):
        # Registers precede the tokens; relevance that flows to them is dropped.
        registers = length - len(row)
        return row + row @ flow[0, registers:, registers:]
    slabs, plane = evidence.encoded.grid[0], evidence.encoded.grid[1] * evidence.encoded.grid[2]
    table = row.view(slabs, plane)
    if seen.in_plane:
        return (table + torch.einsum("sn,snm->sm", table, flow)).flatten()
    return (table + torch.einsum("np,pnm->mp", table, flow)).flatten()
