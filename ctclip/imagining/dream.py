"""Dream: optimise a volume until its embedding matches a text (Dream Fields, Jain et al. 2022, with voxels instead of a
radiance field).

The change is smooth: a sum of coarse and finer grids, with penalties on total variation and size. At every step the
volume is slightly shifted and noise is added, so that the result does not depend on single voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.explanation.edit import SmoothEdit, body, grid_of, total_variation
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import axis_shape, axis_spacing
from ctclip.preprocessing.progress import track

CELLS_MM = (48.0, 24.0, 12.0)
# Adam's learning rate, as a fraction of half the HU window; the largest random shift in mm and the standard deviation
# of the noise in each step.
RATE, SHIFT_MM, NOISE = 0.02, 8.0, 0.02
# Weights of total variation and of the mean absolute change, relative to the cosine.
SMOOTH, SMALL = 0.3, 0.3
# Initial noise: its standard deviation around soft tissue and lung, as a fraction of half the HU window.
BEGIN_MM, BEGIN = 32.0, 0.3


@dataclass(frozen=True)
class Dream:
    """A volume (D, H, W) in [-1, 1], and the cosine between its embedding and the target, before and after."""

    voxels: np.ndarray
    before: float
    after: float


def dream(
    model: DualEncoder, wanted: Tensor, begin: Tensor, *, steps: int, seed: int = 0, everywhere: bool = False
) -> Dream:
    """Change ``begin`` (1, 1, D, H, W) in [-1, 1] until its embedding points along ``wanted`` (dim,), a unit vector.

    ``everywhere``: also change air. Raises ExplanationError if the encoder has no gradient.
    """
    random = torch.Generator().manual_seed(seed)
    spacing, shape = axis_spacing(model.spec), axis_shape(model.spec)
    finest = grid_of(shape, spacing, CELLS_MM[-1])
    where = torch.ones_like(begin) if everywhere else body(begin, finest)
    edit = SmoothEdit(shape, spacing, CELLS_MM, where).to(begin.device)
    optimizer = torch.optim.Adam(edit.parameters(), RATE)
    with torch.no_grad():
        before = float(model.encode_volume(begin) @ wanted)
    with torch.enable_grad():
        for _ in track(range(steps), steps, "dreaming", "steps"):
            change, moved = edit(), edit()
            seen = _looked_at((begin + moved).clamp(-1, 1), spacing, random)
            cosine = (model.encode_volume(seen) @ wanted)[0]
            # Separate, because the penalties have a gradient even if the encoder has none.
            grids = list(edit.grids)
            slopes = torch.autograd.grad(-cosine, grids, allow_unused=True) if cosine.requires_grad else (None,)
            if slopes[0] is None:
                raise ExplanationError("the encoder of this model has no gradient with respect to its voxels")
            optimizer.zero_grad()
            (SMOOTH * total_variation(change) + SMALL * change.abs().mean()).backward()
            for grid, slope in zip(grids, slopes, strict=True):
                assert grid.grad is not None
                grid.grad += slope
            optimizer.step()
    with torch.no_grad():
        volume = (begin + edit()).clamp(-1, 1)
        after = float(model.encode_volume(volume) @ wanted)
    return Dream(volume[0, 0].float().cpu().numpy(), before, after)


def noise_volume(model: DualEncoder, seed: int) -> Tensor:
    """Smooth initial noise (1, 1, D, H, W) in [-1, 1]."""
    random = torch.Generator().manual_seed(seed)
    shape, spacing = axis_shape(model.spec), axis_spacing(model.spec)
    where = torch.ones(1, 1, *shape)
    edit = SmoothEdit(shape, spacing, (BEGIN_MM,), where)
    edit.grids[0].data = torch.randn(edit.grids[0].shape, generator=random) * BEGIN
    with torch.no_grad():
        return edit().clamp(-1, 1).to(model.device)


def _looked_at(volume: Tensor, spacing: tuple[float, float, float], random: torch.Generator) -> Tensor:
    """The volume shifted by a few voxels, with added noise."""
    shifts = []
    for mm in spacing:
        most = int(SHIFT_MM / mm)
        shifts.append(int(torch.randint(-most, most + 1, (1,), generator=random)))
    noise = torch.randn(volume.shape, generator=random).to(volume) * NOISE
    return (volume.roll(shifts, (2, 3, 4)) + noise).clamp(-1, 1)
