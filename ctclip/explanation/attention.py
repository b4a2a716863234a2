"""Gradient-weighted attention: what the pooled vector drew on, followed back through the layers.

Chefer, Gur and Wolf 2021 ("Generic Attention-model Explainability", eq. 5 and 6): a layer passes relevance on by the
positive part of its attention times the attention's gradient, averaged over heads, beside the identity of its residual.
Followed from the pooled end to the tokens, one row in place of the matrix of all pairs; the row begins with what each last
token adds to the score (its gradient times itself, where positive). Of an encoder whose layers attend within slabs and
then along them, each kind passes relevance on within its own sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Maps, Method, Subject, gradients
from ctclip.models.attention import Attention as Layer
from ctclip.models.attention import Seen
from ctclip.models.encoded import Evidence

# Probabilities that are held at once, with their gradients: 4 bytes each.
MOST = 2**29


class Attention(Method):
    """One encoding with its graph, and for each finding one pass back through it. For transformers with full attention."""

    name = "attention"

    def maps(self, subject: Subject) -> Maps:
        encoder = subject.model.volume_encoder
        layers = [module for module in encoder.modules() if isinstance(module, Layer)]
        if not layers:
            raise ExplanationError(f"{type(encoder).__name__} shows no attention: use --method similarity or occlusion")
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
        """Refuse before memory runs out."""
        config = subject.model.volume_encoder.config
        if getattr(config, "window", None) is not None:
            raise ExplanationError("attention in windows is not followed: use --method similarity or occlusion")
        encoded = subject.evidence().encoded
        longest = encoded.tokens.shape[1]
        sequences = 1
        if hasattr(config, "spatial_depth"):
            sequences, longest = encoded.grid[0], encoded.grid[1] * encoded.grid[2]
        size = sequences * longest**2 * getattr(config, "heads", 1) * len(layers)
        if size > MOST:
            raise ExplanationError(
                f"{encoded.tokens.shape[1]} tokens attend to each other in {len(layers)} layers, more than fit in memory: "
                f"use --method similarity or occlusion"
            )


def _back(row: Tensor, seen: Seen, slope: Tensor, evidence: Evidence) -> Tensor:
    """row (n,): relevance of a layer's output tokens -> of its input tokens."""
    flow = (seen.probabilities.detach() * slope).clamp(min=0).mean(dim=1)
    sequences, length = flow.shape[:2]
    if sequences == 1 and length >= len(row):
        # Registers stand before the tokens; what goes to them is not followed further.
        registers = length - len(row)
        return row + row @ flow[0, registers:, registers:]
    slabs, plane = evidence.encoded.grid[0], evidence.encoded.grid[1] * evidence.encoded.grid[2]
    table = row.view(slabs, plane)
    if seen.in_plane:
        return (table + torch.einsum("sn,snm->sm", table, flow)).flatten()
    return (table + torch.einsum("np,pnm->mp", table, flow)).flatten()
