"""Consistency: predicted volumes are embedded by the frozen encoder, and the flow network learns from the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.adaptation.consistency import inconsistency
from ctclip.adaptation.decode import _fit_flow, estimate
from ctclip.adaptation.decode_config import DecodeConfig
from ctclip.errors import ConfigError
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded, VolumeEncoder
from ctclip.models.vit3d import ViT3D
from tests.unit.heads.test_decoder import TINY, tiny
from tests.unit.small import VIT, dual_encoder

CTVIT = CTViTConfig(
    patch=(4, 4, 4), width=16, spatial_depth=1, temporal_depth=1, heads=2, head_width=8, codebook_size=16
)


def frozen(volume: Any = VIT) -> DualEncoder:
    return dual_encoder(volume).eval().requires_grad_(False)


def test_it_is_the_cosine_between_embeddings() -> None:
    model, decoder = frozen(), tiny(dim=12).eval()
    decoder.noise.zero_()
    latents, predicted = torch.randn(2, 2, 2, *decoder.grid)
    with torch.no_grad():
        found, target = (model.encode_volume(decoder.volume(each)) for each in (predicted, latents))
        wrong = inconsistency(model, decoder, predicted, latents)
    expected = 1 - F.cosine_similarity(found, target).mean()
    assert expected > 1e-4
    torch.testing.assert_close(wrong, expected)


def test_the_right_latents_are_consistent_whatever_the_noise() -> None:
    model, decoder = frozen(), tiny(dim=12).eval()
    decoder.noise.fill_(0.2)
    latents = torch.randn(2, 2, *decoder.grid)
    with torch.no_grad():
        wrong = inconsistency(model, decoder, latents, latents)
        first, second = (model.encode_volume(decoder.volume(latents)) for _ in range(2))
    torch.testing.assert_close(wrong, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert (1 - F.cosine_similarity(first, second)).mean() > 1e-4


@pytest.mark.parametrize("volume", [VIT, CTVIT])
def test_latents_learn_from_it_through_any_encoder(volume: Any) -> None:
    model, decoder = frozen(volume), tiny(dim=12).eval().requires_grad_(False)
    predicted, latents = torch.randn(1, 2, *decoder.grid).requires_grad_(), torch.randn(1, 2, *decoder.grid)
    wrong = inconsistency(model, decoder, predicted, latents)
    (slope,) = torch.autograd.grad(wrong, predicted)
    assert slope.abs().max() > 0
    if volume is VIT:  # a codebook passes an approximate gradient
        moved = predicted - 1e-2 * slope / slope.norm()
        assert inconsistency(model, decoder, moved, latents) < wrong


class Largest(ViT3D):
    """An encoder of one's own, without ``evidence``: it pools the largest value of each channel."""

    evidence = VolumeEncoder.evidence

    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        encoded = super().forward(volume, mask, body)
        return encoded._replace(pooled=encoded.tokens.amax(dim=1).repeat(1, self.width // self.token_width))


class Blind(Largest):
    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        return super().forward(volume.detach(), mask, body)


def test_any_encoder_is_compared_unless_it_has_no_gradient() -> None:
    model, decoder = frozen(), tiny(dim=12).eval().requires_grad_(False)
    decoder.noise.zero_()
    predicted, latents = torch.randn(1, 2, *decoder.grid).requires_grad_(), torch.randn(1, 2, *decoder.grid)
    model.volume_encoder.__class__ = Largest
    wrong = inconsistency(model, decoder, predicted, latents)
    found, target = (model.encode_volume(decoder.volume(each)) for each in (predicted, latents))
    torch.testing.assert_close(wrong, 1 - F.cosine_similarity(found, target).mean())
    assert torch.autograd.grad(wrong, predicted)[0].abs().max() > 0
    model.volume_encoder.__class__ = Blind
    with pytest.raises(ConfigError, match=r"no gradient .* set consistency\.weight=0"):
        inconsistency(model, decoder, predicted, latents)
    with torch.no_grad():
        assert inconsistency(model, decoder, predicted, latents) > 0


def test_a_flow_is_trained_with_the_weight_and_the_number_of_volumes(tmp_path: Path) -> None:
    model = frozen()
    embeddings, losses = F.normalize(torch.randn(4, 12), dim=1), {}
    for weight, volumes in ((0.0, 4), (0.5, 4), (1.0, 4), (1.0, 2)):
        words = {"networks": TINY, "flow": {"steps": 1, "batch": 4}, "precision": "fp32"}
        config = DecodeConfig.model_validate(
            {**words, "consistency": {"weight": weight, "begin": 0, "volumes": volumes}}
        )
        decoder = tiny(dim=12)
        latents = torch.randn(4, 2, *decoder.grid, generator=torch.Generator().manual_seed(1)).half()
        state = tmp_path / f"{weight} {volumes}"
        state.mkdir()
        assert estimate(model, decoder, config) > 0
        losses[weight, volumes] = _fit_flow(model, decoder, latents, embeddings, config, state, "key", 0)[0]
    assert losses[0.5, 4] > losses[0.0, 4]
    assert losses[1.0, 4] - losses[0.0, 4] == pytest.approx(2 * (losses[0.5, 4] - losses[0.0, 4]), rel=1e-4)
    assert losses[1.0, 2] != losses[1.0, 4]
    assert not any(value.grad is not None for value in model.parameters())


def test_a_flow_learns_to_denoise_before_it_is_compared(tmp_path: Path) -> None:
    model, losses = frozen(), {}
    embeddings = F.normalize(torch.randn(4, 12), dim=1)
    for weight in (0.0, 1.0):
        words = {"networks": TINY, "flow": {"steps": 4, "batch": 4}, "precision": "fp32"}
        config = DecodeConfig.model_validate({**words, "consistency": {"weight": weight, "begin": 0.5}})
        decoder = tiny(dim=12)
        latents = torch.randn(4, 2, *decoder.grid, generator=torch.Generator().manual_seed(1)).half()
        state = tmp_path / str(weight)
        state.mkdir()
        losses[weight] = _fit_flow(model, decoder, latents, embeddings, config, state, "key", 0)
    assert losses[1.0][:2] == losses[0.0][:2]
    assert losses[1.0][2] > losses[0.0][2]
