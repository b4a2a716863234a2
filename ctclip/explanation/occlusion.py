"""Occlusion: how much a score falls when a block of the volume is hidden (Zeiler and Fergus 2014, section 4.2).

A hidden block is not set to air, which could itself look like a finding; it is replaced by a blurred copy of the volume
(Fong and Vedaldi 2017, eq. 1). Blocks overlap by half. Blocks of nothing but air are skipped. Works with every encoder.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.explanation.method import Maps, Method, Subject
from ctclip.models.encoded import axis_spacing

SMALLEST_MM, GROWTH, AT_ONCE = 24.0, 1.15, 8
AIR = -0.95


class Occlusion(Method):
    """One encoding per block. Blocks are as small as ``Subject.budget`` allows, but at least 24 mm."""

    name = "occlusion"

    def maps(self, subject: Subject) -> Maps:
        volume, spacing = subject.volume, axis_spacing(subject.model.spec)
        steps, corners = _blocks(volume, spacing, subject.budget)
        blurred = _blurred(volume, [2 * step for step in steps])
        grid = tuple(-(-extent // step) for extent, step in zip(volume.shape[2:], steps, strict=True))
        fall = np.zeros((len(subject.findings), *grid), np.float32)
        tried = np.zeros(grid, np.float32)
        with torch.inference_mode():
            whole = subject.scores(subject.model.encode(volume))
            for start in range(0, len(corners), AT_ONCE):
                part = corners[start : start + AT_ONCE]
                hidden = volume.repeat(len(part), 1, 1, 1, 1)
                for number, corner in enumerate(part):
                    z, y, x = (slice(c * step, (c + 2) * step) for c, step in zip(corner, steps, strict=True))
                    hidden[number, 0, z, y, x] = blurred[0, 0, z, y, x]
                falls = (whole - subject.scores(subject.model.encode(hidden))).float().cpu().numpy()
                for corner, change in zip(part, falls, strict=True):
                    cells = tuple(slice(c, c + 2) for c in corner)
                    fall[(slice(None), *cells)] += change[:, None, None, None]
                    tried[cells] += 1
        affine = np.eye(4)
        for axis in range(3):
            affine[axis, axis] = steps[axis] * spacing[axis]
            affine[axis, 3] = (steps[axis] - 1) / 2 * spacing[axis]
        return Maps(fall / np.maximum(tried, 1), affine)


def _blocks(volume: Tensor, spacing: tuple[float, ...], budget: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The step along each axis in voxels, half a block, and the corners, in steps, of the blocks that hold tissue."""
    size = SMALLEST_MM
    while True:
        steps = [
            min(max(1, round(size / 2 / mm)), extent) for mm, extent in zip(spacing, volume.shape[2:], strict=True)
        ]
        tissue = F.max_pool3d(volume[:1].float(), steps, ceil_mode=True)[0, 0] > AIR
        # A block is two steps along each axis; along an axis of one step it is the whole axis.
        window = [min(2, extent) for extent in tissue.shape]
        held = F.max_pool3d(tissue[None, None].float(), window, stride=1)[0, 0] > 0
        corners = [(int(z), int(y), int(x)) for z, y, x in torch.nonzero(held).tolist()]
        if len(corners) <= budget or all(step == extent for step, extent in zip(steps, volume.shape[2:], strict=True)):
            return steps, corners
        size *= max(GROWTH, (len(corners) / budget) ** (1 / 3) * 0.98)


def _blurred(volume: Tensor, widths: list[int]) -> Tensor:
    """The volume blurred by a Gaussian with a standard deviation of half of ``widths`` voxels along each axis."""
    result = volume.float()
    for axis, width in enumerate(widths):
        deviation = width / 2
        reach = min(math.ceil(2.5 * deviation), volume.shape[2 + axis] - 1)
        if reach < 1:
            continue
        place = torch.arange(-reach, reach + 1, device=volume.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (place / deviation) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(place)
        padding = [0, 0, 0, 0, 0, 0]
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = reach
        result = F.conv3d(F.pad(result, padding, mode="replicate"), (weights / weights.sum()).view(shape))
    return result
