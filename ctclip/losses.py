"""Objectives: each a function of unit embeddings, with its paper.

Positives are decided by identity, not by position: pairs in ``same`` off the diagonal (reconstructions of
one scan, identical report texts) are left out of the sums, so that they are never pushed apart.

``rows`` is a rank's share of the global batch: it sums those rows against all columns, so that no rank computes or
holds the whole matrix; the mean over ranks is the loss of the global batch, and so are its gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EVERY = slice(None)
# Zhang et al. 2022, section 3: how much volume -> text weighs beside text -> volume.
CONVIRT_VOLUME_WEIGHT = 0.75


def same_identity(scans: Tensor, texts: Tensor, rows: slice = EVERY) -> Tensor:
    """Pairs that must not be negatives of each other.

    scans (B,) and texts (B,) are integer identities of the scan and of the wording; (rows, B) bool.
    """
    return (scans[rows, None] == scans[None, :]) | (texts[rows, None] == texts[None, :])


def clip(
    volumes: Tensor,
    texts: Tensor,
    scale: Tensor,
    same: Tensor | None = None,
    rows: slice = EVERY,
    volume_weight: float = 0.5,
    further: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3; van den Oord et al. 2018, eq. 4).

    volumes, texts (B, d) unit vectors, row i of one belonging to row i of the other; scale (1,) the inverse
    temperature; same (rows, B) bool, see ``same_identity``; further: other texts (M, d) that volumes are contrasted with
    too, and which of them each row is not (rows, M) bool. Scalar, in nats; ln B is chance without further texts.
    """
    volumes, texts = volumes.float(), texts.float()
    target = torch.arange(len(volumes), device=volumes.device)[rows]
    masked = None
    if same is not None:
        masked = same.clone()
        masked[torch.arange(len(target)), target] = False
    total = volumes.new_zeros(())
    for weight, one, other in ((volume_weight, volumes, texts), (1 - volume_weight, texts, volumes)):
        logits = scale * one[rows] @ other.T
        if masked is not None:
            logits = logits.masked_fill(masked, float("-inf"))
        if further is not None and one is volumes:
            others, left_out = further
            logits = torch.cat([logits, (scale * one[rows] @ others.T).masked_fill(left_out, float("-inf"))], dim=1)
        total = total + weight * F.cross_entropy(logits, target)
    return total


def convirt(volumes: Tensor, texts: Tensor, scale: Tensor, same: Tensor | None = None, rows: slice = EVERY) -> Tensor:
    """ConVIRT's weighted bidirectional loss (Zhang et al. 2022, eq. 4), its 0.75 on volume -> text; as ``clip``.

    The paper's other two parts are settings: ``model.projection: mlp`` and ``data.views: {sentence: 1}``.
    """
    return clip(volumes, texts, scale, same, rows, CONVIRT_VOLUME_WEIGHT)


def siglip(
    volumes: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, same: Tensor | None = None, rows: slice = EVERY
) -> Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, eq. 1): identical pairs are positives wherever they stand.

    volumes, texts (B, d) unit vectors; scale, bias (1,). Scalar: the mean over rows of the sum over columns. Columns
    are taken in blocks as long as ``rows``, each computed again in the backward pass: memory does not grow with the
    number of ranks (their section 3.1).
    """
    mine, texts = volumes.float()[rows], texts.float()
    own = torch.arange(len(texts), device=texts.device)[rows]
    total = mine.new_zeros(())
    for first in range(0, len(texts), len(mine)):
        block = slice(first, first + len(mine))
        positive = own[:, None] == torch.arange(len(texts), device=texts.device)[None, block]
        if same is not None:
            positive = positive | same[:, block]
        total = total + checkpoint(_pairs, mine, texts[block], scale, bias, positive, use_reentrant=False)
    return total / len(mine)


def _pairs(volumes: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, positive: Tensor) -> Tensor:
    logits = scale * volumes @ texts.T + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over labels (B, L) of 0, 1 or NaN (unknown: left out). Scalar."""
    known = ~torch.isnan(labels)
    if not known.any():
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits.float()[known], labels[known])
