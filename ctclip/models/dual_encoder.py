"""Volume and text encoders under one roof: unit vectors, their similarity, and the model folder.

``encode_volume``, ``encode_text`` and ``logits`` are all that other code uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.config import CTViTConfig, ModelConfig, ResNet3DConfig, SlicesConfig, ViT3DConfig
from ctclip.models.outputs import exactly
from ctclip.models.text import TextEncoder, build_text_encoder


class DualEncoder(nn.Module):
    """Projects both encoders' pooled vectors to one space of ``dim`` dimensions."""

    def __init__(self, volume_encoder: Any, text_encoder: TextEncoder, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.volume_encoder = volume_encoder
        self.text_encoder = text_encoder
        self.volume_projection = _projection(config.projection, int(volume_encoder.width), config.dim)
        self.text_projection = _projection(config.projection, text_encoder.width, config.dim)
        self.similarity = Similarity(config)
        self.text_locked = False

    def lock_text(self) -> None:
        """From here on the text side is a fixed function of the text (LiT, Zhai et al. 2022): nothing of it learns, and
        its standardisation keeps the statistics it has."""
        self.text_encoder.freeze()
        for module in (self.text_encoder, self.text_projection):
            module.requires_grad_(False)
        self.text_locked = True
        self.train(self.training)

    def train(self, mode: bool = True) -> DualEncoder:
        """Of a locked text side not even the statistics go on."""
        super().train(mode)
        if self.text_locked:
            self.similarity.text_standard.eval()
        return self

    def volume_features(self, volume: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> (B, dim), before standardisation and normalisation."""
        return self.volume_projection(self.volume_encoder(volume, mask).pooled)

    def text_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Token ids as ``TextEncoder.tokenise`` makes them -> (texts, dim)."""
        return self.text_projection(self.text_encoder(**tokens))

    def encode_volume(self, volume: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> (B, dim) unit vectors, float32."""
        return self.similarity.volume(self.volume_features(volume, mask))

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
        device = self.similarity.logit_scale.device
        return self.similarity.text(self.text_features({name: ids.to(device) for name, ids in tokens.items()}))

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Strings -> (n, dim) float32: unit vectors, or of a model that standardises its features, of any length.

        Seen from the mean report all prompts lie to one side, being single sentences. Made unit vectors one by one, the
        two of a pair would keep different shares of that; as they are, it cancels in their difference.
        """
        if not self.config.standardise:
            return self.encode_text(texts)
        device = self.similarity.logit_scale.device
        tokens = {name: ids.to(device) for name, ids in self.text_encoder.tokenise(list(texts)).items()}
        standardised: Tensor = self.similarity.text_standard(self.text_features(tokens).float())
        return standardised

    def logits(self, volumes: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (n, dim), (m, dim) -> (n, m), scaled by the learned temperature."""
        return self.similarity.scale() * volumes @ texts.T


class Similarity(nn.Module):
    """From features to unit vectors, and the temperature.

    ``standardise`` centres and scales each dimension over the global batch before normalising. Encoders
    trained from scratch begin with nearly parallel embeddings, whose differences carry almost no gradient;
    this takes the common part away. Running statistics stand in for the batch at inference.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Shape (1,), not (): ZeRO cannot broadcast a parameter without dimensions over gloo.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([-config.logit_scale]))
        self.largest = math.log(config.logit_scale_max)
        standard: Any = nn.BatchNorm1d if config.standardise else None
        self.volume_standard = standard(config.dim, affine=False) if standard else nn.Identity()
        self.text_standard = standard(config.dim, affine=False) if standard else nn.Identity()

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=self.largest).exp()

    def volume(self, features: Tensor) -> Tensor:
        """(B, dim) features of the global batch -> unit vectors."""
        return F.normalize(self.volume_standard(features.float()), dim=-1)

    def text(self, features: Tensor) -> Tensor:
        """(B, dim) features of the global batch -> unit vectors."""
        return F.normalize(self.text_standard(features.float()), dim=-1)


def build_model(config: ModelConfig, tokenizer: Any | None = None) -> DualEncoder:
    """The dual encoder ``config`` describes, freshly initialised."""
    return DualEncoder(build_volume_encoder(config.volume), build_text_encoder(config.text, tokenizer), config)


def build_volume_encoder(
    config: ViT3DConfig | CTViTConfig | ResNet3DConfig | SlicesConfig, vision: Any | None = None
) -> nn.Module:
    """The volume encoder ``config`` describes; ``vision``: a slice encoder's 2-D model, loaded if not given."""
    if isinstance(config, ViT3DConfig):
        from ctclip.models.vit3d import ViT3D

        return ViT3D(config)
    if isinstance(config, CTViTConfig):
        from ctclip.models.ctvit import CTViT

        return CTViT(config)
    if isinstance(config, SlicesConfig):
        from ctclip.models.slices import SliceEncoder

        return SliceEncoder(config, vision)
    from ctclip.models.resnet3d import ResNet3D

    return ResNet3D(config)


class _Exact(nn.Linear):
    """In its parameters' precision under autocast too: scores rounded to three digits would not keep their order."""

    def forward(self, given: Tensor) -> Tensor:
        with exactly(given):
            return super().forward(given.to(self.weight.dtype))


def _projection(kind: str, inside: int, outside: int) -> nn.Module:
    if kind == "linear":
        return _Exact(inside, outside, bias=False)
    return nn.Sequential(nn.Linear(inside, inside), nn.GELU(), _Exact(inside, outside))
