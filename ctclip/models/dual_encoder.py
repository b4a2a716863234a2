"""The dual encoder: volumes and texts as unit vectors in one space, and their similarity.

Other code uses only ``encode``, ``encode_volume``, ``encode_text`` and ``logits``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip import plugins
from ctclip.config import EncoderConfig, ModelConfig
from ctclip.models.encoded import Encoded, VolumeEncoder, check_range
from ctclip.models.lora import add_lora, lora_layer
from ctclip.models.precision import ExactLinear, Precision, at_precision
from ctclip.models.text import TextEncoder, build_text_encoder
from ctclip.preprocessing.spec import PreprocessingSpec


class DualEncoder(nn.Module):
    """Projects both encoders' pooled vectors to one space of ``dim`` dimensions."""

    def __init__(self, volume_encoder: VolumeEncoder, text_encoder: TextEncoder, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.volume_encoder = volume_encoder
        self.text_encoder = text_encoder
        self.volume_projection = _projection(config.projection, int(volume_encoder.width), config.dim)
        if config.volume.lora_projection:
            self.volume_projection = lora_layer(self.volume_projection, config.volume.lora_rank)
        self.text_projection = _projection(config.projection, text_encoder.width, config.dim)
        self.similarity = Similarity(config)
        self.text_locked = False
        # Precision of ``encode``; see ``ctclip.inference.precision``.
        self.precision: Precision = "fp32"
        # Frozen modules, whose buffers (codebook, batch norm statistics) are frozen too.
        self.frozen: list[nn.Module] = []

    @property
    def spec(self) -> PreprocessingSpec:
        """The preprocessing spec of the volumes that the model takes."""
        return self.volume_encoder.spec

    @property
    def device(self) -> torch.device:
        return self.similarity.logit_scale.device

    def lock_text(self) -> None:
        """Freeze the text encoder from now on (LiT, Zhai et al. 2022), including the statistics of its
        standardisation."""
        self.text_encoder.freeze()
        for module in (self.text_encoder, self.text_projection):
            module.requires_grad_(False)
        self.text_locked = True
        self.train(self.training)

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the training mode, but keep the statistics of a frozen text encoder and of frozen layers unchanged."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        if self.text_locked:
            self.similarity.text_standard.eval()
        return self

    def text_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Token ids from ``TextEncoder.tokenise`` -> (texts, dim)."""
        return self.text_projection(self.text_encoder(**tokens))

    def volume_features(self, volume: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> (B, dim), before standardisation and normalisation."""
        return self.volume_projection(self.volume_encoder(volume, mask).pooled)

    def encode(self, volume: Tensor, mask: Tensor | None = None) -> Encoded:
        """(B, 1, D, H, W) in [-1, 1] -> tokens with their locations, pooled vectors, and embeddings in the shared
        space.

        Raises ValueError for another shape, or for voxels that are not in [-1, 1].
        """
        if volume.ndim == 5:
            check_range(volume)
        with at_precision(self.precision, volume.device):
            encoded: Encoded = self.volume_encoder(volume, mask)
        return encoded._replace(embedding=self.similarity.volume(self.volume_projection(encoded.pooled)))

    def encode_volume(self, volume: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> (B, dim) unit vectors, float32."""
        embedding = self.encode(volume, mask).embedding
        assert embedding is not None
        return embedding

    def encode_text(
        self,
        texts: Sequence[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Strings, or input_ids with attention_mask (n, L) -> (n, dim) unit vectors, float32."""
        if (texts is None) == (input_ids is None):
            raise ValueError("give either texts, or input_ids with attention_mask")
        if texts is not None:
            tokens = self.text_encoder.tokenise([texts] if isinstance(texts, str) else list(texts))
        else:
            assert input_ids is not None
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            tokens = {"input_ids": input_ids, "attention_mask": mask}
        return self.similarity.text(self.text_features({name: ids.to(self.device) for name, ids in tokens.items()}))

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Strings -> (n, dim) float32: unit vectors; for a model that standardises its features, vectors of any norm.

        Prompts are single sentences and therefore share an offset from the mean report. Normalising each prompt would
        leave different fractions of the offset in the two prompts of a pair; without normalisation it cancels in their
        difference.
        """
        if not self.config.standardise:
            return self.encode_text(texts)
        tokens = {name: ids.to(self.device) for name, ids in self.text_encoder.tokenise(list(texts)).items()}
        standardised: Tensor = self.similarity.text_standard(self.text_features(tokens).float())
        return standardised

    def logits(self, volumes: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (n, dim), (m, dim) -> (n, m), scaled by the learned temperature."""
        return self.similarity.scale() * volumes @ texts.T


class Similarity(nn.Module):
    """Maps features to unit vectors, and holds the temperature.

    ``standardise`` centres and scales each dimension over the global batch before normalising. Encoders trained from
    scratch begin with nearly parallel embeddings, whose differences carry almost no gradient; this removes the common
    part. At inference, running statistics are used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Shape (1,), because ZeRO cannot broadcast a parameter of shape () over gloo.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([-config.logit_scale]))
        self.largest = math.log(config.logit_scale_max)
        standard: Any = nn.BatchNorm1d if config.standardise else None
        self.volume_standard = standard(config.dim, affine=False) if standard else nn.Identity()
        self.text_standard = standard(config.dim, affine=False) if standard else nn.Identity()

    def scale(self) -> Tensor:
        """(1,) the inverse temperature."""
        return self.logit_scale.clamp(max=self.largest).exp()

    def volume(self, features: Tensor) -> Tensor:
        """(B, dim) features of the global batch -> unit vectors."""
        return F.normalize(self.volume_standard(features.float()), dim=-1)

    def text(self, features: Tensor) -> Tensor:
        """(B, dim) features of the global batch -> unit vectors."""
        return F.normalize(self.text_standard(features.float()), dim=-1)


def build_model(config: ModelConfig, spec: PreprocessingSpec, tokenizer: Any | None = None) -> DualEncoder:
    """The dual encoder that ``config`` describes for volumes of ``spec``, freshly initialised."""
    return DualEncoder(build_volume_encoder(config.volume, spec), build_text_encoder(config.text, tokenizer), config)


def build_volume_encoder(config: EncoderConfig, spec: PreprocessingSpec, **parts: Any) -> VolumeEncoder:
    """The volume encoder that ``config`` describes for volumes of ``spec``; ``parts`` go to its constructor (a slice
    encoder's 2-D model, ``vision``, if it should not be loaded)."""
    encoder: VolumeEncoder = plugins.find("encoder", config.kind)(config, spec, **parts)
    if config.tuning == "lora":
        add_lora(encoder, encoder.lora_targets, config.lora_rank)
    return encoder


def _projection(kind: str, inside: int, outside: int) -> nn.Module:
    if kind == "linear":
        return ExactLinear(inside, outside, bias=False)
    return nn.Sequential(nn.Linear(inside, inside), nn.GELU(), ExactLinear(inside, outside))
