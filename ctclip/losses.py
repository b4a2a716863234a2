"""Objectives: each a function of unit embeddings, with its paper.

Positives are decided by identity, not by position: pairs in ``same`` off the diagonal (reconstructions of
one scan, identical report texts) are left out of the sums, so that they are never pushed apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def same_identity(scans: Tensor, texts: Tensor) -> Tensor:
    """Pairs that must not be negatives of each other.

    scans (B,) and texts (B,) are integer identities of the scan and of the wording; (B, B) bool.
    """
    return (scans[:, None] == scans[None, :]) | (texts[:, None] == texts[None, :])


def clip(volumes: Tensor, texts: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3; van den Oord et al. 2018, eq. 4).

    volumes, texts (B, d) unit vectors, row i of one belonging to row i of the other; scale (1,) the inverse
    temperature; same (B, B) bool, see ``same_identity``. Scalar, in nats; ln B is chance.
    """
    logits = scale * volumes.float() @ texts.float().T
    if same is not None:
        off_diagonal = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same & off_diagonal, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(volumes: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, same: Tensor | None = None) -> Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, eq. 1): identical pairs are positives wherever they stand.

    volumes, texts (B, d) unit vectors; scale, bias (1,). Scalar: the mean over rows of the sum over columns.
    """
    logits = scale * volumes.float() @ texts.float().T + bias
    positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    if same is not None:
        positive = positive | same
    sign = torch.where(positive, 1.0, -1.0)
    return -F.logsigmoid(sign * logits).sum(dim=1).mean()


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over labels (B, L) of 0, 1 or NaN (unknown: left out). Scalar."""
    known = ~torch.isnan(labels)
    if not known.any():
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits.float()[known], labels[known])
