"""The network that generates volumes: its latents, their expectation, the flow and its times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.schedulers.rectified_flow import timestep_transform
from sklearn.linear_model import Ridge

from ctclip.adaptation.expectation import fit_expectation
from ctclip.heads import decoder as heads_decoder
from ctclip.heads.decoder import (
    SHIFT,
    TIMES,
    Decoder,
    Networks,
    _scheduler,
    _times,
    fold,
    unfold,
)

TINY = {"fold": 2, "channels": (8,), "latent": 2, "patch": 2, "width": (32,), "depth": 1}


def tiny(shape: tuple[int, int, int] = (8, 8, 8), dim: int = 4) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape, dim, Networks(**TINY))


def test_folding_takes_blocks_as_channels_and_gives_them_back() -> None:
    values = torch.randn(2, 3, 4, 6, 8)
    folded = fold(values, 2)
    assert folded.shape == (2, 24, 2, 3, 4)
    torch.testing.assert_close(folded[:, 8], values[:, 1, ::2, ::2, ::2])
    flat = torch.randn(1, 3, 1, 6, 8)
    torch.testing.assert_close(fold(flat.expand(-1, -1, 2, -1, -1), 2)[:, :, 0].unflatten(1, (3, 2, 4))[:, :, 0].flatten(1, 2), F.pixel_unshuffle(flat[:, :, 0], 2))  # fmt: skip
    torch.testing.assert_close(unfold(folded, 2), values)


def test_a_volume_of_any_shape_is_padded_and_cut() -> None:
    decoder = tiny((7, 9, 5)).eval()
    assert decoder.grid == (4, 6, 4)
    latents, _ = decoder.encode(torch.zeros(1, 1, 7, 9, 5))
    assert latents.shape == (1, 2, 4, 6, 4)
    volumes = decoder.sample(decoder.condition(count=2), [0, 1], steps=2)
    assert volumes.shape == (2, 1, 7, 9, 5)
    assert volumes.abs().max() <= 1


def test_a_flow_draws_what_it_is_told_and_nothing_without_guidance() -> None:
    decoder = tiny((4, 4, 4))
    embeddings = torch.eye(4)[:2]
    optimizer = torch.optim.Adam(decoder.flow.parameters(), 4e-3)
    torch.manual_seed(0)
    for _ in range(50):
        # Latents of 1 for the one text and of -1 for the other.
        side = (torch.rand(16) < 0.5).long()
        latents = (1.0 - 2 * side)[:, None, None, None, None].expand(-1, 2, *decoder.grid)
        given = decoder.condition(embeddings[side])
        told = torch.where(torch.rand(16, 1) < 0.2, decoder.condition(count=16), given)
        loss, _ = decoder.flow_loss(latents, told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder.eval()
    decoder.volume = lambda latents, random: latents  # type: ignore[method-assign, misc]
    conditions = decoder.condition(embeddings)
    one, other = (decoder.sample(conditions[[side]], [3], steps=8).mean() for side in (0, 1))
    assert one > 0.6
    assert other < -0.6
    unheard = [decoder.sample(conditions[[side]], [3], steps=2, guidance=0) for side in (0, 1)]
    torch.testing.assert_close(*unheard)
    both = decoder.sample(conditions, [3, 4], steps=2)
    torch.testing.assert_close(
        both[1:], decoder.sample(conditions[1:], [4], steps=2), msg="a volume is drawn by itself"
    )


def test_a_channel_counts_by_its_effect_on_volumes() -> None:
    decoder = tiny((4, 4, 4))
    # One channel is seen in the volume, the other nearly not.
    decoder.decode = lambda latents: 3 * latents[:, :1] + 0.01 * latents[:, 1:]  # type: ignore[method-assign]
    torch.manual_seed(0)
    places = 10 * torch.randn(1, 2, *decoder.grid)
    latents = places + torch.tensor([0.5, 2.0])[:, None, None, None] * torch.randn(500, 2, *decoder.grid)
    decoder.standardise(latents.half())
    standard = decoder.standard(latents)
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(2, *decoder.grid), atol=0.1, rtol=0)
    variance = standard.square().mean(dim=(0, 2, 3, 4))
    assert variance.mean() == pytest.approx(1, rel=0.05)
    assert variance[0] / variance[1] == pytest.approx(3 * 0.5 / (0.01 * 2), rel=0.05)
    seen = list[torch.Tensor]()

    def decode_zeros(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return torch.zeros(1, 1, 4, 4, 4)

    decoder.decode = decode_zeros  # type: ignore[method-assign]
    decoder.volume(standard[:1], torch.Generator())
    torch.testing.assert_close(seen[0], latents[:1], msg="volumes are decoded from the latents before")


def standardised(latents: torch.Tensor, shape: tuple[int, int, int]) -> Decoder:
    decoder = tiny(shape)
    decoder.decode = lambda latents: latents  # type: ignore[method-assign]
    decoder.standardise(latents)
    return decoder


def test_expected_latents_are_those_of_a_ridge_regression() -> None:
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(600, 4), dim=1)
    patients = (np.arange(600) // 2).astype(str)
    decoder = tiny((4, 4, 4))
    map_ = torch.randn(4, 2 * math.prod(decoder.grid))
    latents = (embeddings @ map_ + torch.randn(600, 1) + 3).unflatten(1, (2, *decoder.grid))
    decoder = standardised(latents, (4, 4, 4))
    fit_expectation(decoder, latents.half(), embeddings, patients, 0)
    wanted = decoder.standard(latents).flatten(1)
    assert decoder.coarse(latents).equal(latents)
    expected = decoder.expected(decoder.condition(embeddings), decoder.grid).flatten(1)
    regression = Ridge(1e-3).fit(embeddings.numpy(), wanted.numpy()).predict(embeddings.numpy())
    assert np.corrcoef(expected.flatten().numpy(), regression.flatten())[0, 1] > 0.999
    assert float((expected - torch.from_numpy(regression)).square().mean()) < 1e-3
    assert not decoder.expected(decoder.condition(count=3), decoder.grid).any()


def test_embeddings_that_say_nothing_explain_nothing() -> None:
    decoder = tiny((4, 4, 4), dim=40)
    embeddings = F.normalize(torch.randn(80, 40), dim=1)
    fit_expectation(decoder, torch.randn(80, 2, *decoder.grid), embeddings, np.arange(80).astype(str), 0)
    # Without a penalty, 41 coefficients would explain half of the variance of 80 random latents.
    assert float(decoder.expected(decoder.condition(embeddings), decoder.grid).square().mean()) < 0.1


def test_expected_latents_of_large_volumes_are_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_decoder, "CELLS", 4)
    decoder = tiny((8, 8, 16))
    assert decoder.grid == (4, 4, 8)
    assert decoder.expectation.shape[2:] == (1, 1, 2)
    assert decoder.coarse(torch.ones(1, 2, 4, 4, 8)).shape == (1, 2, 1, 1, 2)
    assert decoder.expected(decoder.condition(torch.ones(3, 4)), decoder.grid).shape == (3, 2, 4, 4, 8)
    assert decoder.denoise(torch.ones(1, 2, 4, 4, 8), torch.ones(1), decoder.condition()).shape == (1, 2, 4, 4, 8)


def test_the_strongest_components_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_decoder, "COMPONENTS", 2)
    decoder = tiny((4, 4, 4))
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        3, decoder.expectation[0].numel()
    )
    given = torch.randn(200, 5)
    decoder.set_expectation(weights, given.T @ given)
    left, values, right = np.linalg.svd((given @ weights).numpy(), full_matrices=False)
    best = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(decoder.expected(given, decoder.grid).flatten(1).numpy(), best, atol=1e-3)


def test_the_decoder_heeds_its_expectation() -> None:
    decoder = tiny((4, 4, 4)).eval()
    decoder.heard.normal_()
    decoder.expectation.normal_()
    conditions = decoder.condition(F.normalize(torch.randn(1, 4), dim=1))
    # Before training, the network adds nothing.
    noisy = torch.randn(1, 2, *decoder.grid)
    torch.testing.assert_close(
        decoder.denoise(noisy, torch.ones(1), conditions), decoder.expected(conditions, decoder.grid)
    )


def test_volumes_have_the_noise_of_each_intensity() -> None:
    decoder = tiny((16, 16, 16)).eval()
    halves = torch.full((2, 1, 16, 16, 16), -0.55)
    halves[..., 8:] = 0.55
    decoder.decode = lambda latents: halves  # type: ignore[method-assign]
    decoder.noise[4], decoder.noise[15] = 0.01, 0.05
    latents = torch.zeros(2, 2, *decoder.grid)
    torch.manual_seed(0)
    volumes = decoder.volume(latents)
    assert volumes[..., :8].std() == pytest.approx(0.01, rel=0.1)
    assert volumes[..., 8:].std() == pytest.approx(0.05, rel=0.1)
    torch.manual_seed(0)
    assert torch.equal(decoder.volume(latents), volumes)
    one, again = (decoder.volume(latents, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, volumes)


def test_times_are_shifted_towards_noise() -> None:
    for steps in (1, 7, 25):
        even = torch.linspace(TIMES, 0, steps + 1)[:-1]
        expected = timestep_transform(even, SHIFT**3, 1, num_train_timesteps=TIMES)
        assert _times(steps) == expected.round().long().tolist()
    torch.manual_seed(0)
    drawn = _scheduler().sample_timesteps(torch.zeros(4000, 1, 1, 1, 1))
    assert drawn.float().median() == pytest.approx(timestep_transform(500.0, SHIFT**3, 1), rel=0.03)
