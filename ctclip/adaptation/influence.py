"""How much the model's own match of a volume with a sentence depends on each cell.

Integrated gradients (Sundararajan et al. 2017) from smoothed surroundings to the volume, by the midpoint rule, as in
``ctclip.explanation.detail``, but of the match of the whole volume instead of a map: it needs no locator, and knows
what is much smaller than a cell, though it is noisy in a single volume.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.explanation.method import constant_norm
from ctclip.models.dual_encoder import DualEncoder

# Extent of a voxel's surroundings, in voxels.
SURROUNDINGS = 3


def influence(model: DualEncoder, volume: Tensor, sentences: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Volume (1, 1, D, H, W) in [-1, 1] and unit vectors (k, dim) of sentences -> (k, N) from 0 to 1, relative to the cell
    of ``grid`` with the most: what raises the match with each sentence; 0 for all cells if nothing does."""
    half = SURROUNDINGS // 2
    around = F.avg_pool3d(F.pad(volume, [half] * 6, mode="replicate"), SURROUNDINGS, stride=1)
    halfway = ((volume + around) / 2).clone().requires_grad_()
    with torch.enable_grad():
        matches = (constant_norm(model, model.encode(halfway)) @ sentences.T)[0]
        cells = [
            F.adaptive_avg_pool3d((slope[0].float() * (volume[0] - around[0])).clamp(min=0), grid).flatten()
            for slope in (torch.autograd.grad(one, halfway, retain_graph=True)[0] for one in matches)
        ]
    found = torch.stack(cells)
    return found / found.amax(dim=1, keepdim=True).clamp(min=1e-30)
