"""Patch-text similarity: the score of each location by itself.

The projection from pooled features to the joint space is applied to the features of every location, as if the volume
consisted of it alone (Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", section 3.2; for a convolutional
encoder with mean pooling, this is the class activation map of Zhou et al. 2016). The projection is linearised around
the volume; for a linear projection and a prompt head the map is exact. If an encoder also pools finer grids, the maps
of all grids are summed on the finest one.
"""

from __future__ import annotations

import numpy as np
import torch

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Maps, Method, Subject, gradients
from ctclip.explanation.space import resample
from ctclip.models.encoded import finest


class Similarity(Method):
    """Encodes once and computes one gradient of the projection for each finding."""

    name = "similarity"

    def maps(self, subject: Subject) -> Maps:
        evidence = subject.evidence()
        with torch.enable_grad():
            pooled = evidence.encoded.pooled.detach().clone().requires_grad_()
            scores = subject.scores(evidence.encoded._replace(pooled=pooled))
            directions = torch.cat([slopes[0] for slopes in gradients(subject, scores, [pooled])])
        if not directions.any():
            raise ExplanationError(
                f"the head of kind {subject.head.kind!r} does not score the pooled vector: use --method gradcam or occlusion"
            )
        with torch.no_grad():
            levels = [level.features for level in evidence.levels]
            similarities = evidence.alone(levels, directions)
        fine = finest(evidence.levels)
        total = np.zeros((len(subject.findings), *fine.grid), np.float32)
        for level, similarity in zip(evidence.levels, similarities, strict=True):
            values = similarity[0].float()
            if level.real is not None:
                # Tokens that were not pooled get the mean of the others.
                real = level.real[0].to(values.device)
                mean = values[:, real].mean(dim=1, keepdim=True)
                values = torch.where(real, values, mean)
            values = (values - values.mean(dim=1, keepdim=True)).unflatten(1, level.grid)
            for finding, one in enumerate(values.cpu().numpy()):
                total[finding] += resample(one, level.affine, fine.grid, fine.affine)
        return Maps(total, fine.affine)
