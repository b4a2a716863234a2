"""Small models and specs for many tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ctclip.config import ModelConfig, TextConfig
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.text import train_tokenizer
from ctclip.models.vit3d import ViT3DConfig
from ctclip.preprocessing.spec import PreprocessingSpec

REPORTS = ["The heart is enlarged. No nodule is seen.", "A nodule lies in the upper lobe.", "There is no effusion."]
VIT = ViT3DConfig(stages=(), width=24, heads=2, depth=1, patch=(4, 4, 4), registers=1)
TEXT = TextConfig(width=16, depth=1, heads=2, max_tokens=24)


def spec_of(
    shape: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0), *, published: bool = False
) -> PreprocessingSpec:
    """A spec for volumes of ``shape`` [slice, row, column]."""
    return PreprocessingSpec("test", tuple(spacing), tuple(shape), published_geometry=published)  # type: ignore[arg-type]


def dual_encoder(
    volume: Any = VIT, spec: PreprocessingSpec | None = None, text: TextConfig = TEXT, seed: int = 0, **settings: Any
) -> DualEncoder:
    """A dual encoder with random weights, for volumes of 8 x 8 x 8 voxels if no ``spec`` is given."""
    torch.manual_seed(seed)
    config = ModelConfig(volume=volume, text=text, dim=12, **settings)
    return build_model(config, spec or spec_of((8, 8, 8)), train_tokenizer(REPORTS * 20, 200))
