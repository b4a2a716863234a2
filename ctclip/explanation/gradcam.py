"""GradCAM on the tokens: channels weighted by the mean gradient of the score (Selvaraju et al. 2017, eq. 1 and 2)."""

from __future__ import annotations

import torch

from ctclip.explanation.method import Maps, Method, Subject, differentiable, gradients


class GradCAM(Method):
    """Uses the tokens only, as published; finer grids that an encoder also pools are left out."""

    name = "gradcam"

    def maps(self, subject: Subject) -> Maps:
        with torch.enable_grad():
            evidence, features, scores = differentiable(subject)
            slopes = [one[0] for one in gradients(subject, scores, features[:1])]
        weights = torch.cat(slopes).mean(dim=1)
        maps = torch.einsum("bnc,fc->fn", evidence.levels[0].features, weights).relu()
        return Maps(maps.unflatten(1, evidence.encoded.grid).float().cpu().numpy(), evidence.encoded.affine)
