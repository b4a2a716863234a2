"""Find tokens that contain only air outside the body, which an encoder may leave out.

They are found on the CPU, in the reading processes, so that nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ctclip.data.augment import Change, augment, rotate
from ctclip.preprocessing.spec import PreprocessingSpec

# Lung below -950 HU is emphysema (Gevenois et al. 1995); the air around a patient is at -1000 HU with some noise.
AIR_HU = -950.0
# If a volume is rotated, cells are interpolated instead of voxels, which blurs edges; the limit is therefore closer to
# air.
AIR_TURNED_HU = -980.0


@dataclass(frozen=True)
class BodyTokens:
    """Finds the tokens of a volume that contain any part of the body; ``size``: voxels [slice, row, column] of a
    token."""

    size: tuple[int, int, int]
    spec: PreprocessingSpec

    def of_hu(self, hu: np.ndarray, change: Change | None = None) -> np.ndarray:
        """HU (D, H, W) int16 as stored -> (N,) bool, after the same ``change`` as in training."""
        low, high, middle, gain = self.spec.window
        volume = torch.from_numpy(hu).float().clamp_(low, high).sub_(middle).mul_(gain)
        if change is not None and not change.turns:
            # Noise and contrast do not turn tissue into air, and would have to be drawn as on the device.
            augment(volume, change._replace(contrast=1.0, noise_hu=0.0, window_hu=(0.0, 0.0)), self.spec)
        cells = F.avg_pool3d(volume[None, None], self._half)[0, 0]
        if change is not None and change.turns:
            return self._body(self._moved(cells, change)[None, None], AIR_TURNED_HU)[0]
        return self._body(cells[None, None])[0]

    def of_volumes(self, volumes: Tensor) -> np.ndarray:
        """(B, 1, D, H, W) in [-1, 1] on any device -> (B, N) bool."""
        return self._body(F.avg_pool3d(volumes.detach().float(), self._half))

    @property
    def _half(self) -> tuple[int, int, int]:
        depth, height, width = (max(1, extent // 2) for extent in self.size)
        return depth, height, width

    def _body(self, cells: Tensor, air_hu: float = AIR_HU) -> np.ndarray:
        """Mean of each eighth of a token (B, 1, ...) -> (B, N) bool.

        A token is air if each of its eighths is below ``air_hu``, and it is outside if such tokens connect it to the
        edge of its axial slab. Lungs, even emphysematous ones, lie within the body wall and are not connected.
        """
        _, _, middle, gain = self.spec.window
        eighths = tuple(extent // half for extent, half in zip(self.size, self._half, strict=True))
        air = F.max_pool3d(cells, eighths)[:, 0].cpu().numpy() < (air_hu - middle) * gain
        border = np.zeros(air.shape[1:], dtype=bool)
        border[:, [0, -1]] = border[:, :, [0, -1]] = True
        neighbours = np.ones((1, 3, 3), dtype=bool)
        outside = np.stack([ndimage.binary_propagation(one & border, neighbours, mask=one) for one in air])
        return ~outside.reshape(len(outside), -1)

    def _moved(self, cells: Tensor, change: Change) -> Tensor:
        """Rotate, shift and crop cells as ``ctclip.data.augment`` does with voxels, at a hundredth of the cost."""
        spacing = [mm * half for mm, half in zip(self.spec.spacing, self._half, strict=True)]
        cells = rotate(cells, change.angles, change.zoom, spacing)
        if any(change.offset):
            steps = [offset / half for offset, half in zip(change.offset, self._half, strict=True)]
            cells = torch.from_numpy(ndimage.shift(cells.numpy(), steps, order=1, mode="grid-constant", cval=-1.0))
        for axis, ends in enumerate(change.crop):
            first, last = (int(share * cells.shape[axis]) for share in ends)
            cells.narrow(axis, 0, first).fill_(-1)
            cells.narrow(axis, cells.shape[axis] - last, last).fill_(-1)
        return cells
