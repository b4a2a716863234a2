"""The autoencoder of a decoder: its loss, its initialisation, and the noise that it removes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA

from ctclip.adaptation.autoencoder import autoencoder_loss, measured_noise
from ctclip.adaptation.components import begin_with_components
from ctclip.adaptation.decode_config import DecodeConfig
from ctclip.heads.decoder import BINS, Decoder, Networks, fold, unfold
from tests.unit.heads.test_decoder import TINY, tiny


class Scans:
    def __init__(self, volumes: list[np.ndarray]) -> None:
        self.volumes, self.table = volumes, pd.DataFrame({"volume": range(len(volumes))})

    def voxels(self, index: int) -> tuple[np.ndarray, str]:
        return self.volumes[index], ""


def test_noise_is_what_reconstructions_lack_where_they_are_flat() -> None:
    random, side = np.random.default_rng(0), 24
    shape = (side, side, side)
    noise = random.normal(0, 1, (2, *shape)).astype(np.float32)
    # A structure that the autoencoder loses is not noise.
    lost = 0.05 * np.sin(np.linspace(0, 3, side)).astype(np.float32)
    # Nor are edges, here of thin plates, which it blurs.
    levels = np.where(np.arange(side) % 2, 0.05, 0.3) + random.uniform(-0.03, 0.03, side)
    plates = levels.astype(np.float32) * np.ones(shape, np.float32)
    kept = [np.full(shape, -0.55, np.float32), np.full(shape, 0.55, np.float32) + 0.02 * noise[1], 0.8 * plates]
    volumes = [-0.55 + lost + 0.02 * noise[0], 0.55 + 0.03 * noise[1], plates]
    decoder = tiny(shape).eval()
    again = iter(kept[int(index)] for index in np.random.default_rng([0, 61]).permutation(3))
    decoder.encode = lambda volumes: (torch.from_numpy(next(again))[None, None], volumes)  # type: ignore[method-assign]
    decoder.decode = lambda latents: latents  # type: ignore[method-assign]
    measured = measured_noise(decoder, Scans(volumes), 0)  # type: ignore[arg-type]
    assert measured[4] == pytest.approx(0.02, rel=0.1)
    assert measured[15] == pytest.approx((0.03**2 - 0.02**2) ** 0.5, rel=0.1)
    assert (measured > 0).sum() == 2
    assert len(measured) == BINS


def test_noise_of_rare_intensities_is_not_measured() -> None:
    decoder = tiny((8, 8, 8)).eval()
    decoder.encode = lambda volumes: (torch.zeros(1, 1, 8, 8, 8), volumes)  # type: ignore[method-assign]
    decoder.decode = lambda latents: latents  # type: ignore[method-assign]
    volume = np.random.default_rng(0).normal(0, 0.1, (8, 8, 8)).astype(np.float32)
    assert not measured_noise(decoder, Scans([volume]), 0).any()  # type: ignore[arg-type]


def test_the_autoencoders_loss_is_what_it_says() -> None:
    decoder = tiny()
    volumes = torch.full((2, 1, 8, 8, 8), 0.0)
    decoder.encode = lambda volumes: (torch.full((2, 3), 2.0), torch.full((2, 3), 1.0))  # type: ignore[method-assign]
    decoder.decode = lambda latents: torch.full((2, 1, 8, 8, 8), -0.1)  # type: ignore[method-assign]
    config = DecodeConfig(windows=0.5, kl=0.01)
    # 0.1 is 100 HU: all of it in HU, and in the window of soft tissue, of 400 HU, which has 5 times the contrast. The KL
    # divergence of N(2, 1) from N(0, 1) is 2.
    expected = 0.1 + 0.5 * 5 * 0.1 + 0.01 * 3 * 2
    assert float(autoencoder_loss(decoder, volumes, config, (-1000.0, 1000.0))) == pytest.approx(expected, rel=1e-5)


def test_an_autoencoder_begins_as_the_principal_components_of_blocks() -> None:
    torch.manual_seed(0)
    # Blocks of 2 x 2 x 2 voxels that two patterns explain, compared with scikit-learn.
    patterns, shares = torch.randn(2, 8), torch.randn(3, 4, 4, 4, 2) * torch.tensor([1.0, 0.4])
    volumes = unfold((shares @ patterns + 0.3).movedim(-1, 1), 2)
    decoder = Decoder((8, 8, 8), 4, Networks(**{**TINY, "channels": (8,)})).eval()
    begin_with_components(decoder, volumes)
    with torch.no_grad():
        latents, _ = decoder.encode(volumes)
        again = decoder.decode(latents)
    components = PCA(2, whiten=True).fit_transform(fold(volumes, 2).movedim(1, -1).flatten(0, -2).numpy())
    mine = latents.movedim(1, -1).flatten(0, -2).numpy()
    # Each volume is normalised separately, so they agree except for their own mean and spread; signs are arbitrary.
    assert np.abs(np.corrcoef(components.T, mine.T)[:2, 2:]).diagonal().min() > 0.9
    assert (again - volumes).square().mean() < 0.05 * volumes.var()
