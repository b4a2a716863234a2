"""The numerical precision of a model, and of parts of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16"]


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies matrices in bfloat16; False if that is unknown."""
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def autocast_off(like: Tensor) -> torch.autocast:
    """A context in which operations on ``like``'s device keep the precision of their operands, even under autocast."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


@contextlib.contextmanager
def at_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions at ``precision``: ``fp32`` in float32, ``tf32`` with 10 bits of mantissa (NVIDIA
    GPUs since 2020), ``bf16`` in bfloat16 by autocast. Parameters stay float32. The previous settings are restored."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    if device.type != "cuda":
        yield
        return
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


@contextlib.contextmanager
def float32_exactly(like: Tensor) -> Iterator[None]:
    """A context in which float32 operations stay in float32, whatever the surrounding precision."""
    with autocast_off(like), at_precision("fp32", like.device):
        yield


class ExactLinear(nn.Linear):
    """A linear layer in the precision of its parameters even under autocast, because rounding scores to three digits
    would change their order."""

    def forward(self, features: Tensor) -> Tensor:
        with autocast_off(features):
            return super().forward(features.to(self.weight.dtype))
