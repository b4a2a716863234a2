"""What each place adds to the score: the gradient of the score times the features, on every grid that is pooled.

Gradient times input (Shrikumar et al. 2016; Ancona et al. 2018, section 3.2), taken where the pooled vector is made and not
at the voxels: for mean pooling it is a place's exact share of the score, for the largest of a channel all of the share is
the place's that holds it. Shares of all grids are added up on the finest.
"""

from __future__ import annotations

import numpy as np
import torch

from ctclip.explanation.method import Maps, Method, Subject, differentiable, gradients
from ctclip.explanation.space import resample


class Contribution(Method):
    """One encoding, and for each finding one gradient of the pooling."""

    name = "contribution"

    def maps(self, subject: Subject) -> Maps:
        with torch.enable_grad():
            evidence, features, scores = differentiable(subject)
            slopes = gradients(subject, scores, features)
        finest = max(evidence.levels, key=lambda level: int(np.prod(level.grid)))
        total = np.zeros((len(subject.findings), *finest.grid), np.float32)
        for finding, gradient in enumerate(slopes):
            for level, slope in zip(evidence.levels, gradient, strict=True):
                share = (slope * level.features).sum(dim=2)[0].unflatten(0, level.grid).float().cpu().numpy()
                # A coarse cell's share is that of all the fine ones in it.
                cells = np.prod(finest.grid) / np.prod(level.grid)
                total[finding] += resample(share / cells, level.affine, finest.grid, finest.affine)
        return Maps(total, finest.affine)
