"""The interface of every volume encoder: its input and its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctclip.config import EncoderConfig
from ctclip.data.air import BodyTokens
from ctclip.preprocessing.spec import PreprocessingSpec


class Encoded(NamedTuple):
    """Volumes as an encoder sees them.

    tokens (B, N, C) in slice, row, column order of ``grid`` (d, h, w), d * h * w = N; pooled (B, P).
    affine (4, 4) float64, on the host: token index (d, h, w, 1) to millimetres of the prepared volume, along its own axes
    from the centre of its first voxel; ``Prepared.token_affine`` leads on to the scan's own space. For convolutions it is
    the centre of a token's receptive field. real (B, N) bool: which tokens are real, None for all; the others are zeros.
    embedding (B, dim): unit vectors of the joint space, where a dual encoder made this; else None.
    """

    tokens: Tensor
    grid: tuple[int, int, int]
    pooled: Tensor
    affine: np.ndarray
    real: Tensor | None = None
    embedding: Tensor | None = None


class VolumeEncoder(nn.Module, ABC):
    """A volume encoder: (B, 1, D, H, W) in [-1, 1] to ``Encoded``.

    A subclass names its section of the configuration (``Config``) and sets ``width`` (of ``Encoded.pooled``) and
    ``token_width`` (of ``Encoded.tokens``). Spacing, shape and HU window are those of ``spec`` and are stated
    nowhere else.
    """

    Config: ClassVar[type[EncoderConfig]]
    # Names of the linear maps (and convolutions) that low-rank adapters stand beside.
    lora_targets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, spec: PreprocessingSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.width = 0
        self.token_width = 0

    @abstractmethod
    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        """volume (B, 1, D, H, W) in [-1, 1]; mask (B, 1, D, H, W) bool, true where voxels are real (None: all);
        body (B, N) bool on the host: tokens that hold anything of the body, for an encoder with ``body_tokens``."""

    def layers(self) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
        """Parts of the encoder from input to output, for freezing and layer-wise learning rates; the first holds the
        embedding. What is in none of them (a last norm, the pooling) counts as after the last."""
        return []

    def body_tokens(self) -> BodyTokens | None:
        """How the reading processes find the tokens that hold anything of the body; None: all tokens take part."""
        return None

    def end_step(self) -> None:
        """Called after each optimisation step: a codebook moves here. A collective."""

    def affine(self, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
        """``Encoded.affine`` of tokens whose centre along each axis is at voxel ``index * scale + offset``."""
        affine = np.eye(4)
        spacing = axis_spacing(self.spec)
        for axis in range(3):
            affine[axis, axis] = scale[axis] * spacing[axis]
            affine[axis, 3] = offset[axis] * spacing[axis]
        return affine


def axis_spacing(spec: PreprocessingSpec) -> tuple[float, float, float]:
    """mm along each index of a prepared volume: [slice, row, column], or [slice, column, row] of the published geometry."""
    depth, row, column = spec.spacing
    return (depth, column, row) if spec.published_geometry else (depth, row, column)


def axis_shape(spec: PreprocessingSpec) -> tuple[int, int, int]:
    """Voxels along each index of a prepared volume."""
    depth, row, column = spec.shape
    return (depth, column, row) if spec.published_geometry else (depth, row, column)


def check_shape(volume: Tensor) -> None:
    """Raise ValueError unless ``volume`` is (B, 1, D, H, W)."""
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise ValueError(f"expected a volume (B, 1, D, H, W), found shape {tuple(volume.shape)}")


def check_range(volume: Tensor) -> None:
    """Raise ValueError unless voxels lie in [-1, 1]. It waits for the device: for callers, not for training steps."""
    if type(volume) is not Tensor or volume.is_meta:
        return
    low, high = (float(v) for v in torch.aminmax(volume.detach()))
    # Written so that NaN is refused too.
    if not (low >= -1.5 and high <= 1.5):
        raise ValueError(
            f"voxels range over [{low:.4g}, {high:.4g}], expected [-1, 1]: these look like unscaled Hounsfield units; "
            f"prepare the scan with ctclip.preprocessing.prepare"
        )
