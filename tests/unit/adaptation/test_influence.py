"""The influence of each cell on the match with a sentence."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ctclip.adaptation.influence import influence
from ctclip.explanation.method import constant_norm
from ctclip.models.vit3d import ViT3DConfig
from tests.unit.explanation.test_detail import STEMMED
from tests.unit.small import dual_encoder, spec_of

GRID = (4, 4, 4)


def test_influence_is_the_change_of_the_match_by_cell() -> None:
    """By finite differences on the way from the surroundings to the volume."""
    model = dual_encoder(ViT3DConfig(**STEMMED), spec_of((16, 16, 16))).eval()
    random = torch.Generator().manual_seed(0)
    volume = torch.rand(1, 1, 16, 16, 16, generator=random) * 1.6 - 0.8
    texts = F.normalize(torch.randn(2, model.config.dim, generator=random), dim=-1)
    found = influence(model, volume, texts, GRID)
    assert found.shape == (2, 64)
    assert found.amax(dim=1).tolist() == [1, 1]
    assert found.min() >= 0
    around = torch.from_numpy(ndimage.uniform_filter(volume[0, 0].numpy(), 3, mode="nearest"))[None, None]
    halfway, step = (volume + around) / 2, 1e-2
    with torch.no_grad():
        norm = (model.similarity.volume_standard(model.volume_projection(model.encode(halfway).pooled).float())).norm()

    def match(at: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            encoded = model.encode(at)
            own = model.similarity.volume_standard(model.volume_projection(encoded.pooled).float()).norm()
            return (constant_norm(model, encoded)[0] @ texts.T * own / norm).double().numpy()

    change = np.zeros((2, 4, 4, 4))
    # Every voxel of a few cells.
    cells = [(0, 0, 0), (2, 1, 3), (3, 3, 1)]
    for cell in cells:
        for offset in np.ndindex(4, 4, 4):
            place = tuple(4 * a + b for a, b in zip(cell, offset, strict=True))
            moved = [halfway.clone(), halfway.clone()]
            moved[0][0, 0][place] -= step
            moved[1][0, 0][place] += step
            slope = (match(moved[1]) - match(moved[0])) / (2 * step)
            change[(slice(None), *cell)] += (slope * float((volume - around)[0, 0][place])).clip(min=0)
    ours = found.unflatten(1, GRID).numpy()
    for number in range(2):
        ratios = [ours[(number, *cell)] / change[(number, *cell)] for cell in cells]
        np.testing.assert_allclose(ratios, ratios[0], rtol=0.05)


def test_a_uniform_volume_has_no_influence() -> None:
    model = dual_encoder(ViT3DConfig(**STEMMED), spec_of((16, 16, 16))).eval()
    texts = F.normalize(torch.ones(1, model.config.dim), dim=-1)
    assert not influence(model, torch.full((1, 1, 16, 16, 16), -0.5), texts, GRID).any()
