"""Train a flow to generate volumes with the embeddings that it is conditioned on: a perceptual loss (Johnson et al. 2016)
of the frozen volume encoder, in the shared space.

Most of a volume's variance has nothing to do with its findings, so a flow that is trained only on squared errors of
latents neglects them for a long time."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ctclip.errors import ConfigError
from ctclip.heads.decoder import Decoder
from ctclip.models.dual_encoder import DualEncoder
from ctclip.schema import Section


class ConsistencyConfig(Section):
    """How generated volumes are compared with the embeddings they were generated from."""

    weight: float = Field(
        0.5,
        ge=0,
        le=100,
        description="weight, in the loss of the flow network, of 1 minus the cosine between the embeddings of predicted "
        "and of real volumes; 0: do not compare them",
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


def inconsistency(model: DualEncoder, decoder: Decoder, latents: Tensor, embeddings: Tensor) -> Tensor:
    """The mean of 1 minus the cosine between the embeddings of the volumes with these standardised ``latents`` (B, latent,
    d, h, w) and ``embeddings`` (B, dim), unit vectors. Uses torch's random generator for the volumes' noise. Raises
    ConfigError if ``latents`` cannot learn from it."""
    volumes, encoder = decoder.volume(latents), model.volume_encoder
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
    return 1 - (found * embeddings.to(found)).sum(dim=1).mean()
