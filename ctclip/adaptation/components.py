"""Initialise the autoencoder of a decoder with the principal components of blocks of voxels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctclip.heads.decoder import Decoder, fold


@torch.no_grad()
def begin_with_components(decoder: Decoder, volumes: Tensor) -> None:
    """Initialise an autoencoder with one level so that its latents are the principal components of the blocks of
    ``volumes`` (B, 1, D, H, W), which saves thousands of training steps. An autoencoder with several levels is not
    changed."""
    network: Any = decoder.autoencoder
    networks = decoder.networks
    width = networks.channels[0]
    if len(networks.channels) > 1 or width > networks.fold**3 or networks.latent > width:
        return
    blocks = fold(decoder.padded(volumes), networks.fold).movedim(1, -1).flatten(0, -2).double()
    mean = blocks.mean(dim=0)
    values, axes = torch.linalg.eigh(torch.cov(blocks.T))
    axes = axes.flip(1)[:, :width]
    # With zero mean and unit variance, the group norms before the latents and before the volume have almost no effect.
    spread = values.flip(0)[:width].clamp(min=1e-6).sqrt()
    inward, outward = axes.T / spread[:, None], axes * spread
    for part, weight, bias in (
        (network.encoder.blocks[0], inward, -(inward @ mean)),
        (network.encoder.blocks[-1], torch.eye(networks.latent, width), None),
        (network.quant_conv_mu, torch.eye(networks.latent), None),
        (network.post_quant_conv, torch.eye(networks.latent), None),
        (network.decoder.blocks[0], torch.eye(width, networks.latent), None),
        (network.decoder.blocks[-1], outward, mean),
    ):
        _set_middle(part.conv, weight, bias)
    for block in (*network.encoder.blocks[1:-2], *network.decoder.blocks[1:-2]):
        nn.init.zeros_(block.conv2.conv.weight)
        nn.init.zeros_(block.conv2.conv.bias)


def _set_middle(convolution: nn.Conv3d, weight: Tensor, bias: Tensor | None) -> None:
    """Set a convolution to a linear map (out, in) of each cell by itself."""
    kernel, constant = convolution.weight, convolution.bias
    assert constant is not None
    nn.init.zeros_(kernel)
    nn.init.zeros_(constant)
    middle = kernel.shape[-1] // 2
    kernel[:, :, middle, middle, middle] = weight.to(kernel)
    if bias is not None:
        constant.copy_(bias)
