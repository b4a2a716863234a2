"""Train a flow to generate volumes with the findings of the right ones: a perceptual loss (Johnson et al. 2016) of the
frozen volume encoder, in the shared space.

Most of a volume's variance has nothing to do with its findings, so a flow that is trained only on squared errors of
latents neglects them for a long time. Predictions are compared with reconstructions of scans, not with the scans: what
the autoencoder loses would otherwise be replaced by patterns that the encoder takes for it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ctclip.errors import ConfigError
from ctclip.heads.decoder import Decoder
from ctclip.models.dual_encoder import DualEncoder
from ctclip.schema import Section


class ConsistencyConfig(Section):
    """How the embeddings of generated volumes are compared with the right ones."""

    weight: float = Field(
        1.0,
        ge=0,
        le=100,
        description="weight, in the loss of the flow network, of 1 minus the cosine between the embeddings of predicted "
        "and of reconstructed volumes; 0: do not compare them",
    )
    begin: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="fraction of the steps before the first comparison: a flow that cannot yet denoise learns little from it, "
        "and forgets to denoise",
    )
    volumes: int = Field(
        2,
        ge=1,
        le=10**5,
        description="number of volumes of a batch that are compared; each takes the memory of a training step of the "
        "autoencoder and of the volume encoder",
    )


def inconsistency(model: DualEncoder, decoder: Decoder, predicted: Tensor, latents: Tensor) -> Tensor:
    """The mean of 1 minus the cosine between the embeddings of volumes with the ``predicted`` and with the right
    ``latents`` (B, latent, d, h, w), standardised. Both volumes have the same noise, from torch's random generator.
    Raises ConfigError if ``predicted`` cannot learn from it."""
    devices = [latents.device] if latents.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        target = model.encode_volume(decoder.volume(latents)).float()
    volumes, encoder = decoder.volume(predicted), model.volume_encoder
    try:
        # Unlike ``encode``, gradients pass through a codebook.
        pooled = encoder.evidence(volumes).encoded.pooled
    except ValueError:  # an encoder without ``evidence``
        pooled = encoder(volumes).pooled
    found = model.similarity.volume(model.volume_projection(pooled)).float()
    if volumes.requires_grad and not found.requires_grad:
        raise ConfigError(
            "the encoder of this model has no gradient with respect to its voxels, so predicted volumes cannot be compared: "
            "set consistency.weight=0"
        )
    return 1 - (found * target).sum(dim=1).mean()
