"""The interface of every volume encoder: its input and its output."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctclip.config import EncoderConfig
from ctclip.data.air import BodyTokens
from ctclip.errors import ConfigError
from ctclip.models.pooling import mean_token
from ctclip.preprocessing.spec import PreprocessingSpec


class Encoded(NamedTuple):
    """The output of a volume encoder.

    tokens (B, N, C) in slice, row, column order of ``grid`` (d, h, w), d * h * w = N; pooled (B, P). affine (4, 4)
    float64, on the host: from token index (d, h, w, 1) to millimetres in the prepared volume, along its axes from the
    centre of its first voxel; ``Prepared.token_affine`` converts it to the scan's own space. For convolutions it is the
    centre of a token's receptive field. real (B, N) bool: which tokens are real, None for all; other tokens are zeros.
    embedding (B, dim): unit vectors in the shared space if this is the output of a dual encoder, else None. local (B,
    N, C2): features of finer grids at the position of each token (mean and maximum of each channel), before tokens
    attend to each other; None for an encoder that pools no finer grid, and in training.
    """

    tokens: Tensor
    grid: tuple[int, int, int]
    pooled: Tensor
    affine: np.ndarray
    real: Tensor | None = None
    embedding: Tensor | None = None
    local: Tensor | None = None

    def one(self, number: int) -> Encoded:
        """The ``number``-th volume as a batch of one."""
        chosen = slice(number, number + 1)
        real, embedding, local = (
            None if part is None else part[chosen] for part in (self.real, self.embedding, self.local)
        )
        return Encoded(self.tokens[chosen], self.grid, self.pooled[chosen], self.affine, real, embedding, local)


class Level(NamedTuple):
    """One grid of located features: features (B, N, C) in slice, row, column order of ``grid``; ``affine`` as in
    ``Encoded``; real (B, N) bool, None for all."""

    features: Tensor
    grid: tuple[int, int, int]
    affine: np.ndarray
    real: Tensor | None = None

    def one(self, number: int) -> Level:
        """The ``number``-th volume as a batch of one."""
        chosen = slice(number, number + 1)
        return self._replace(features=self.features[chosen], real=None if self.real is None else self.real[chosen])


def finest(levels: Sequence[Level]) -> Level:
    """The grid with the most cells."""
    return max(levels, key=lambda level: math.prod(level.grid))


class Evidence(NamedTuple):
    """The features from which a pooled vector was computed, for explanations.

    levels: the tokens first, then any finer grids whose features are pooled too. pool: features of every level, (B, N,
    C) each -> (B, width), differentiable, equal to ``Encoded.pooled``. alone: features as for ``pool`` and directions
    (F, width) -> for every level (B, F, N), the dot product of each direction with the vector that would be pooled if
    the level contained only that token and the other levels were left out.
    """

    encoded: Encoded
    levels: tuple[Level, ...]
    pool: Callable[[Sequence[Tensor]], Tensor]
    alone: Callable[[Sequence[Tensor], Tensor], list[Tensor]]


class VolumeEncoder(nn.Module, ABC):
    """A volume encoder: (B, 1, D, H, W) in [-1, 1] to ``Encoded``.

    A subclass names its section of the configuration (``Config``) and sets ``width`` (of ``Encoded.pooled``) and
    ``token_width`` (of ``Encoded.tokens``), and ``pools_finer_grids`` if ``evidence`` has grids finer than the tokens. Spacing, shape and HU window are those of ``spec``.
    """

    Config: ClassVar[type[EncoderConfig]]
    # Names of the linear maps (and convolutions) that get low-rank adapters.
    lora_targets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, spec: PreprocessingSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.width = 0
        self.token_width = 0
        self.pools_finer_grids = False

    @abstractmethod
    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        """volume (B, 1, D, H, W) in [-1, 1]; mask (B, 1, D, H, W) bool, true where voxels are real (None: all); body
        (B, N) bool on the host: tokens that contain part of the body, for an encoder with ``body_tokens``."""

    def evidence(self, volume: Tensor, mask: Tensor | None = None) -> Evidence:
        """Like ``forward``, but also returns the pooled features and the pooling. The default suits an encoder whose
        pooled vector is the mean of its tokens; other encoders override it. Raises ValueError for an encoder that pools
        in another way and does not override it."""
        encoded = self(volume, mask)
        level = Level(encoded.tokens, encoded.grid, encoded.affine, encoded.real)

        def pool(features: Sequence[Tensor]) -> Tensor:
            return mean_token(features[0], encoded.real)

        if encoded.pooled.shape[1] != encoded.tokens.shape[2] or not torch.allclose(
            pool([encoded.tokens]), encoded.pooled, rtol=1e-3, atol=1e-4
        ):
            raise ValueError(
                f"{type(self).__name__} does not pool by the mean of its tokens, and has no method `evidence` that describes how "
                f"it pools: use --method occlusion, which works with every encoder"
            )
        return Evidence(encoded, (level,), pool, lambda features, directions: [beside(features[0], directions)])

    def lift(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, C) -> (B, N, width): the vector that would be pooled from that token alone. The default suits
        one or more poolings of the tokens, concatenated."""
        return tokens.repeat(1, 1, self.width // self.token_width)

    def check_lift(self) -> None:
        """Raise ConfigError if this encoder cannot support ``lift``."""
        if self.width % self.token_width:
            raise ConfigError(
                f"objectives.alignment: {type(self).__name__} pools {self.width} numbers of tokens of {self.token_width}; "
                f"your own encoder needs a method `lift` that gives the vector of a single token"
            )

    def layers(self) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
        """Parts of the encoder from input to output, for freezing and layer-wise learning rates; the first holds the
        embedding. Other parts (a last norm, the pooling) count as after the last layer."""
        return []

    def body_tokens(self) -> BodyTokens | None:
        """The object that finds tokens with part of the body, for the reading processes; None: all tokens are used."""
        return None

    def end_step(self) -> None:
        """Called after each optimisation step, for example to update a codebook. A collective operation."""

    def affine(self, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
        """``Encoded.affine`` of tokens whose centre along each axis is at voxel ``index * scale + offset``."""
        affine = np.eye(4)
        spacing = axis_spacing(self.spec)
        for axis in range(3):
            affine[axis, axis] = scale[axis] * spacing[axis]
            affine[axis, 3] = offset[axis] * spacing[axis]
        return affine


def beside(features: Tensor, directions: Tensor) -> Tensor:
    """``Evidence.alone`` for features (B, N, C) that are pooled in k ways, concatenated to (B, k * C): a single token
    is its own mean and maximum. directions (F, k * C) -> (B, F, N)."""
    summed = directions.unflatten(1, (-1, features.shape[2])).sum(dim=1)
    return torch.einsum("bnc,fc->bfn", features, summed)


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
    """Raise ValueError unless voxels lie in [-1, 1]. This waits for the device, so it is not used in training
    steps."""
    if type(volume) is not Tensor or volume.is_meta:
        return
    low, high = (float(v) for v in torch.aminmax(volume.detach()))
    # The comparison also refuses NaN.
    if not (low >= -1.5 and high <= 1.5):
        raise ValueError(
            f"voxels range over [{low:.4g}, {high:.4g}], expected [-1, 1]: these look like unscaled Hounsfield units; "
            f"prepare the scan with ctclip.preprocessing.prepare"
        )
