"""Random changes of a training volume.

The reading processes draw a change with the volume's own seed; it is applied on the device of the batch, so that a
GPU, not the CPU, resamples volumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctclip.config import AugmentConfig
from ctclip.preprocessing.spec import PreprocessingSpec


class Change(NamedTuple):
    """The change of one volume: rotation about the slice, row and column axes (rad), scale, shift (voxels), contrast,
    noise (HU), shift of the limits of the HU window, and the fraction of each axis cut off at both ends."""

    angles: tuple[float, ...]
    zoom: float
    offset: tuple[int, ...]
    contrast: float
    noise_hu: float
    seed: int
    window_hu: tuple[float, ...] = (0.0, 0.0)
    crop: tuple[tuple[float, float], ...] = ()

    @property
    def turns(self) -> bool:
        """Whether the volume is resampled."""
        return any(self.angles) or self.zoom != 1


def draw_change(config: AugmentConfig, random: np.random.Generator) -> Change:
    """Draw a change within the amplitudes of ``config``; components with amplitude 0 draw no random numbers."""
    angles, zoom, offset, contrast, noise, seed = [0.0] * 3, 1.0, [0] * 3, 1.0, 0.0, 0
    window: tuple[float, ...] = (0.0, 0.0)
    crop: tuple[tuple[float, float], ...] = ()
    if config.rotate_degrees or config.zoom:
        angles = np.radians(random.uniform(-config.rotate_degrees, config.rotate_degrees, size=3)).tolist()
        zoom = 1 + random.uniform(-config.zoom, config.zoom)
    if config.shift_voxels:
        offset = random.integers(-config.shift_voxels, config.shift_voxels + 1, size=3).tolist()
    if config.scale:
        contrast = 1 + random.uniform(-config.scale, config.scale)
    if config.noise_hu:
        noise, seed = random.uniform(0, config.noise_hu), int(random.integers(2**63))
    if config.window_hu:
        window = tuple(random.uniform(-config.window_hu, config.window_hu, size=2).tolist())
    if config.crop:
        crop = tuple(
            (gone * first, gone * (1 - first)) for gone, first in random.uniform((0, 0), (config.crop, 1), (3, 2))
        )
    return Change(tuple(angles), zoom, tuple(offset), contrast, noise, seed, window, crop)


def augment(volume: Tensor, change: Change, spec: PreprocessingSpec) -> None:
    """Apply ``change`` to ``volume`` (D, H, W), float32 in [-1, 1], in place."""
    if change.turns:
        volume.copy_(rotate(volume, change.angles, change.zoom, spec.spacing))
    if any(change.offset):
        volume.copy_(shift(volume, change.offset))
    low, high = spec.hu_window
    if any(change.window_hu):
        # Map the shifted window limits, in the units of the volume, to -1 and 1.
        bottom, top = (end + 2 * moved / (high - low) for end, moved in zip((-1, 1), change.window_hu, strict=True))
        volume.sub_(bottom).mul_(2 / (top - bottom)).sub_(1)
    if change.contrast != 1:
        # Contrast is scaled about air, whose value is the same on every scanner.
        volume.add_(1).mul_(change.contrast).sub_(1)
    if change.noise_hu:
        random = torch.Generator(volume.device).manual_seed(change.seed)
        noise = torch.randn(volume.shape, generator=random, device=volume.device)
        volume.add_(noise, alpha=change.noise_hu * 2 / (high - low))
    if any(change.window_hu) or change.contrast != 1 or change.noise_hu:
        volume.clamp_(-1, 1)
    for axis, ends in enumerate(change.crop):
        # Filled with air without noise, like outside a scanner's field of view.
        length = volume.shape[axis]
        first, last = (int(share * length) for share in ends)
        volume.narrow(axis, 0, first).fill_(-1)
        volume.narrow(axis, length - last, last).fill_(-1)


def augment_map(labels: Tensor, change: Change, spec: PreprocessingSpec) -> Tensor:
    """Apply the geometric part of ``change`` to a label map (D, H, W) of any dtype, with nearest-neighbour
    interpolation and 0 outside."""
    moved = labels
    if change.turns:
        moved = rotate(labels.float(), change.angles, change.zoom, spec.spacing, fill=0.0, mode="nearest").to(
            labels.dtype
        )
    return shift(moved, change.offset, fill=0) if any(change.offset) else moved


def rotate(
    volume: Tensor,
    angles: Sequence[float],
    zoom: float,
    spacing: Sequence[float],
    fill: float = -1.0,
    mode: str = "bilinear",
) -> Tensor:
    """``volume`` (D, H, W) rotated in mm about its centre by ``angles`` (rad, about the slice, row and column axes) and
    magnified by ``zoom``, with MONAI's Affine; trilinear unless ``mode`` is nearest."""
    from monai.transforms import Affine
    from monai.transforms.utils import create_rotate

    millimetres = np.diag([*spacing, 1.0])
    # The source position of each voxel of the result, in voxels from the centre.
    matrix = np.linalg.inv(millimetres) @ create_rotate(3, list(angles)) @ millimetres / zoom
    matrix[3, 3] = 1.0
    turn = Affine(
        affine=matrix, mode=mode, padding_mode="zeros", align_corners=False, image_only=True, device=volume.device
    )
    moved: Tensor = torch.as_tensor(turn(volume[None] - fill))[0]
    return moved + fill


def shift(volume: Tensor, offset: Sequence[int], fill: float = -1) -> Tensor:
    """``volume`` (D, H, W) moved by whole voxels; ``fill`` is used outside the volume."""
    moved = torch.full_like(volume, fill)
    source = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, volume.shape, strict=True))
    target = tuple(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, volume.shape, strict=True))
    moved[target] = volume[source]
    return moved
