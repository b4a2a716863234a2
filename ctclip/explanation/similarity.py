"""Patch-text similarity: what each place alone would score.

The projection from pooled features to the joint space is applied to the features of every place, as if the volume were
nothing but it (Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", section 3.2; for the mean of a convolution's
cells it is the class activation map of Zhou et al. 2016). The projection is linearised about the volume; for a linear one
and a prompt head the map is exact. Where an encoder pools finer grids beside its tokens, the maps of all of them are added
up on the finest.
"""

from __future__ import annotations

import numpy as np
import torch

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Maps, Method, Subject, gradients
from ctclip.explanation.space import resample


class Similarity(Method):
    """One encoding, and for each finding one gradient of the projection alone."""

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
        finest = max(evidence.levels, key=lambda level: int(np.prod(level.grid)))
        total = np.zeros((len(subject.findings), *finest.grid), np.float32)
        for level, similarity in zip(evidence.levels, similarities, strict=True):
            values = similarity[0].float()
            if level.real is not None:
                # A token that took no part says nothing: it is as the mean of the others.
                real = level.real[0].to(values.device)
                mean = values[:, real].mean(dim=1, keepdim=True)
                values = torch.where(real, values, mean)
            values = (values - values.mean(dim=1, keepdim=True)).unflatten(1, level.grid)
            for finding, one in enumerate(values.cpu().numpy()):
                total[finding] += resample(one, level.affine, finest.grid, finest.affine)
        return Maps(total, finest.affine)
