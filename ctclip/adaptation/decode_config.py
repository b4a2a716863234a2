"""Settings of the training of a decoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ctclip.adaptation.consistency import ConsistencyConfig
from ctclip.adaptation.prior import PriorConfig
from ctclip.heads.decoder import Networks
from ctclip.schema import Section


class Stage(Section):
    """How one of the two networks is trained."""

    steps: int = Field(20_000, ge=1, le=10**8, description="number of steps of AdamW")
    batch: int = Field(8, ge=1, le=10**5, description="number of volumes, or latents, in a batch")
    learning_rate: float = Field(2e-4, gt=0, le=10, description="peak learning rate of AdamW")
    average: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the weights that is saved; 0: save the last weights",
    )


class DecodeConfig(Section):
    """How a decoder is trained."""

    networks: Networks = Field(Networks(), description="sizes of the networks")  # type: ignore[call-arg]
    autoencoder: Stage = Field(Stage(), description="training of the autoencoder")  # type: ignore[call-arg]
    flow: Stage = Field(Stage(steps=50_000, batch=32), description="training of the flow network")  # type: ignore[call-arg]
    consistency: ConsistencyConfig = Field(
        ConsistencyConfig(),  # type: ignore[call-arg]
        description="comparison of predicted volumes with the embeddings that the flow is conditioned on",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision in which the flow network is trained; auto: bf16 if the device multiplies in it, else fp32",
    )
    volumes: int | None = Field(None, ge=1, description="number of training volumes to use; null: all")
    crop: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="side in voxels of the cubes on which the autoencoder is trained; null: whole volumes",
    )
    windows: float = Field(
        0.2,
        ge=0,
        le=100,
        description="weight of differences in the lung and soft tissue windows relative to differences in the full HU "
        "window",
    )
    kl: float = Field(
        1e-7, ge=0, le=1, description="weight of the autoencoder's KL divergence, summed over the latents of a volume"
    )
    untold: float = Field(
        0.1, ge=0, lt=1, description="fraction of the examples without a condition, for classifier-free guidance"
    )
    prior: PriorConfig = Field(
        PriorConfig(kind="diffusion", excerpts=5, epochs=20.0),  # type: ignore[call-arg]
        description="training of the prior, which draws an embedding of a volume for a text",
    )
