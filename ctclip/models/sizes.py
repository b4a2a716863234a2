"""The cost of a model, counted without building it: parameters, tokens, floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ctclip.config import ModelConfig
from ctclip.models.dual_encoder import build_volume_encoder
from ctclip.models.encoded import axis_shape
from ctclip.preprocessing.spec import PreprocessingSpec


@dataclass(frozen=True)
class Size:
    """``flops``: multiplications and additions for encoding one volume of ``shape`` voxels, air tokens included."""

    kind: str
    shape: tuple[int, int, int]
    tokens: int
    volume_parameters: int
    text_parameters: int
    flops: float


def measure(config: ModelConfig, spec: PreprocessingSpec) -> Size:
    """Count for volumes of ``spec``."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        encoder = build_volume_encoder(config.volume, spec).eval()
        volume = torch.zeros(1, 1, *axis_shape(spec))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoded = encoder(volume)
    return Size(
        kind=config.volume.kind,
        shape=axis_shape(spec),
        tokens=encoded.tokens.shape[1],
        volume_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        text_parameters=_text_parameters(config),
        flops=float(counter.get_total_flops()),
    )


def _text_parameters(config: ModelConfig) -> int:
    from ctclip.models.huggingface import text_model, text_model_of
    from ctclip.models.text import small_bert_config

    text = config.text
    with torch.device("meta"):
        if text.pretrained is not None:
            model = text_model(text.pretrained, weights=False)
        else:
            model = text_model_of(small_bert_config(text).to_dict(), "model.text")
        return sum(parameter.numel() for parameter in model.parameters())
