"""Counterfactual explanation: the smallest smooth edit of a scan that changes the model's decision (Wachter et al.
2017, eq. 2).

The size of an edit is its mean absolute change. Each step changes the few neighbouring cells with the largest effect on
the score, which is steepest descent in that norm (Boyd & Vandenberghe 2004, section 9.4.2; Papernot et al. 2016 for
images). Descent along the plain gradient would change the whole scan by a few HU: it would deceive the model without
explaining it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.explanation.edit import SmoothEdit, body, grid_of
from ctclip.explanation.method import Maps, Method, Subject
from ctclip.models.encoded import axis_shape, axis_spacing

CELL_MM = 16.0
# The change of a cell in one step, as a fraction of half the HU window, and the fraction of the body's cells that is
# changed.
STEP, CHANGED = 0.15, 0.01
# Maximum number of steps, and the cost of one step in encodings.
STEPS, COST = 40, 3
BISECTIONS = 7


class Counterfactual(Method):
    """The map is the mean absolute change of each cell, in HU. ``Subject.budget`` bounds the encodings of each finding.

    A score above its turning point (the threshold of a calibrated finding, else a probability of 0.5) is lowered, one
    below is raised. Edits lie in the body and end at the bounds of the HU window. Needs the gradient of head and encoder.
    """

    name = "counterfactual"

    def maps(self, subject: Subject) -> Maps:
        with torch.enable_grad():
            edits = [_turned(subject, finding) for finding in subject.findings]
        shape, spacing = subject.volume.shape[2:], axis_spacing(subject.model.spec)
        cells = grid_of(shape, spacing, CELL_MM)
        low, high = subject.model.spec.hu_window
        values = [F.adaptive_avg_pool3d(edit.change.abs(), cells)[0, 0] * (high - low) / 2 for edit in edits]
        affine = np.eye(4)
        for axis in range(3):
            step = shape[axis] / cells[axis]
            affine[axis, axis] = step * spacing[axis]
            affine[axis, 3] = (step - 1) / 2 * spacing[axis]
        return Maps(torch.stack(values).cpu().numpy(), affine, tuple(edit.words((high - low) / 2) for edit in edits))


@dataclass(frozen=True)
class Edit:
    """The edit for one finding: ``change`` (1, 1, D, H, W) of a volume in [-1, 1], the probabilities before and after,
    and whether the decision changed."""

    finding: str
    change: Tensor
    before: float
    after: float
    turned: bool

    def words(self, hu: float) -> str:
        """Describe the edit in one line. ``hu``: HU per unit of change."""
        size = self.change.abs()
        most = float(size.max()) * hu
        where = self.change[size > 0.1 * size.max()]
        direction = "denser" if len(where) and float(where.mean()) > 0 else "less dense"
        verb = "turns" if self.turned else "does not turn"
        return (
            f"{self.finding}: the score {verb}, probability {self.before:.2f} to {self.after:.2f}, where the edited region "
            f"becomes {direction}, by at most {most:.0f} HU"
        )


def _turned(subject: Subject, finding: int) -> Edit:
    """The smallest edit that moves the score of ``finding`` past its turning point, or the edit that comes closest."""
    volume, spacing = subject.volume, axis_spacing(subject.model.spec)
    assert volume.shape[2:] == axis_shape(subject.model.spec)
    turning = turning_score(subject, finding)
    with torch.no_grad():
        start = _score(subject, volume, finding)
    side = 1.0 if float(start) >= turning else -1.0
    inside = body(volume, grid_of(volume.shape[2:], spacing, CELL_MM))
    edit = SmoothEdit(volume.shape[2:], spacing, (CELL_MM,), inside).to(volume.device)
    (grid,) = edit.grids
    count = max(1, round(CHANGED * int((F.adaptive_max_pool3d(inside, grid.shape[2:]) > 0).sum())))
    closest, nearest, best = np.inf, torch.zeros_like(volume), None
    for _ in range(max(2, min(STEPS, subject.budget // COST))):
        edited = (volume + edit()).clamp(-1, 1)
        score = _score(subject, edited, finding)
        left, changed = side * (float(score.detach()) - turning), (edited - volume).detach()
        if left < 0:
            best = changed
            break
        if left < closest:
            closest, nearest = left, changed
        slope = torch.autograd.grad(side * score, grid, allow_unused=True)[0] if score.requires_grad else None
        if slope is None:
            raise ExplanationError(
                f"the score of {subject.head.names[finding]!r} has no gradient with respect to the voxels: use "
                f"--method occlusion, which needs none"
            )
        # Neighbouring cells change together, so that the edit stays smooth.
        slope = F.avg_pool3d(F.pad(slope, (1,) * 6), 3, stride=1).flatten()
        places = slope.abs().topk(count).indices
        with torch.no_grad():
            grid.view(-1)[places] -= STEP * slope[places].sign()
    change = nearest if best is None else _shrunk(subject, finding, best, turning, side)
    with torch.no_grad():
        both = torch.cat([volume, (volume + change).clamp(-1, 1)])
        scores = subject.head.score(subject.model.encode(both)).float()
        before, after = subject.head.probabilities(scores)[:, finding].tolist()
    return Edit(subject.head.names[finding], change, before, after, best is not None)


def _shrunk(subject: Subject, finding: int, change: Tensor, turning: float, side: float) -> Tensor:
    """The smallest multiple (at most 1) of ``change`` that still passes the turning point, found by bisection."""
    low, high = 0.0, 1.0
    with torch.no_grad():
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            score = float(_score(subject, (subject.volume + middle * change).clamp(-1, 1), finding))
            low, high = (low, middle) if side * (score - turning) < 0 else (middle, high)
    return high * change


def _score(subject: Subject, volume: Tensor, finding: int) -> Tensor:
    return subject.head.score(subject.model.encode(volume))[0, finding].float()


def turning_score(subject: Subject, finding: int) -> float:
    """The score at which the probability of ``finding`` reaches its threshold, 0.5 without a calibration."""
    head = subject.head
    threshold = head.thresholds().get(head.names[finding], 0.5)
    scores = torch.zeros(1, len(head.names), device=subject.volume.device)
    low, high = -1e4, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        scores[0, finding] = middle
        above = float(head.probabilities(scores)[0, finding]) >= threshold
        low, high = (low, middle) if above else (middle, high)
    return (low + high) / 2
