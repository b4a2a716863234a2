"""What each location adds to the score: gradient of the score times features, on every grid that is pooled.

Gradient times input (Shrikumar et al. 2016; Ancona et al. 2018, section 3.2), applied to the features that are pooled
rather than to the voxels. With mean pooling this is the exact share of a location in the score; with max pooling the
location of the maximum receives the whole share of that channel. The shares of all grids are summed on the finest grid.
"""

from __future__ import annotations

import numpy as np
import torch

from ctclip.explanation.method import Maps, Method, Subject, differentiable, gradients
from ctclip.explanation.space import resample
from ctclip.models.encoded import finest


class Contribution(Method):
    """Encodes once and computes one gradient of the pooling for each finding."""

    name = "contribution"

    def maps(self, subject: Subject) -> Maps:
        with torch.enable_grad():
            evidence, features, scores = differentiable(subject)
            slopes = gradients(subject, scores, features)
        fine = finest(evidence.levels)
        total = np.zeros((len(subject.findings), *fine.grid), np.float32)
        for finding, gradient in enumerate(slopes):
            for level, slope in zip(evidence.levels, gradient, strict=True):
                share = (slope * level.features).sum(dim=2)[0].unflatten(0, level.grid).float().cpu().numpy()
                # The share of a coarse cell is divided among the fine cells in it.
                cells = np.prod(fine.grid) / np.prod(level.grid)
                total[finding] += resample(share / cells, level.affine, fine.grid, fine.affine)
        return Maps(total, fine.affine)
