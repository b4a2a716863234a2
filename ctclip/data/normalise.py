"""Convert stored HU to the input of a model, on the device of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctclip.data.augment import Change, augment
from ctclip.preprocessing.spec import PreprocessingSpec


def to_model_input(hu: Tensor, spec: PreprocessingSpec, changes: Sequence[Change] = ()) -> Tensor:
    """HU (B, 1, D, H, W) int16 -> float32 in [-1, 1] on the same device.

    The limits of ``spec.hu_window`` become -1 and 1, and values beyond are clipped; then the change of each volume is
    applied, if ``changes`` are given. Voxels outside the volume are air (-1).
    """
    low, high, middle, gain = spec.window
    volumes = hu.to(torch.float32).clamp_(low, high).sub_(middle).mul_(gain)
    for volume, change in zip(volumes[:, 0], changes, strict=bool(changes)):
        augment(volume, change, spec)
    return volumes
