"""The smallest smooth edit of a scan that turns a score: what would have to change for the model to say otherwise
(Wachter et al. 2017, eq. 2, with an edit that is smooth, and within the HU window, as in Fong & Vedaldi 2017, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.explanation.edit import SmoothEdit, body, grid_of, total_variation
from ctclip.explanation.method import Maps, Method, Subject
from ctclip.models.encoded import axis_shape, axis_spacing

CELL_MM = 16.0
# Adam's step, as a share of half the HU window; steps at most; the cost of a step in encodings.
RATE, STEPS, COST = 0.02, 60, 3
# The weight of the edit's size against the score at first, and its change after each step that turns the score, or does not.
WEIGHT, HEAVIER, LIGHTER = 1.0, 1.3, 0.9
BISECTIONS = 8


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
    """What was changed for one finding: change (1, 1, D, H, W) of a volume in [-1, 1], probabilities before and after, and
    whether the score turned."""

    finding: str
    change: Tensor
    before: float
    after: float
    turned: bool

    def words(self, hu: float) -> str:
        """In one line; hu: of a change by 1."""
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
    """The smallest edit that turns the score of ``finding``, or the one that comes closest."""
    volume, spacing = subject.volume, axis_spacing(subject.model.spec)
    assert volume.shape[2:] == axis_shape(subject.model.spec)
    turning = turning_score(subject, finding)
    with torch.no_grad():
        start = _score(subject, volume, finding)
    side = 1.0 if float(start) >= turning else -1.0
    reach = max(abs(float(start) - turning), 1e-3)
    cells = grid_of(volume.shape[2:], spacing, CELL_MM)
    edit = SmoothEdit(volume.shape[2:], spacing, (CELL_MM,), body(volume, cells)).to(volume.device)
    optimizer = torch.optim.Adam(edit.parameters(), RATE)
    smallest, closest, weight = np.inf, np.inf, WEIGHT
    best: Tensor | None = None
    nearest = torch.zeros_like(volume)
    for _ in range(max(2, min(STEPS, subject.budget // COST))):
        change = edit()
        edited = (volume + change).clamp(-1, 1)
        score = _score(subject, edited, finding)
        if not score.requires_grad:
            raise ExplanationError(
                f"no gradient from the score of {subject.head.names[finding]!r} to the voxels: use --method occlusion, which "
                "needs none"
            )
        left = side * (score - turning) / reach
        size = change.abs().mean() + total_variation(edit.grids[0])
        distance, extent, now = float(left.detach()), float(size.detach()), (edited - volume).detach()
        passed = distance < 0
        if passed and extent < smallest:
            smallest, best = extent, now
        if not passed and distance < closest:
            closest, nearest = distance, now
        weight *= HEAVIER if passed else LIGHTER
        optimizer.zero_grad()
        # A little beyond the turning point, so that the search crosses it again and again.
        (F.relu(left + 0.1) + weight * size).backward()
        optimizer.step()
    change = nearest if best is None else _shrunk(subject, finding, best, turning, side)
    with torch.no_grad():
        both = torch.cat([volume, (volume + change).clamp(-1, 1)])
        scores = subject.head.score(subject.model.encode(both)).float()
        before, after = subject.head.probabilities(scores)[:, finding].tolist()
    return Edit(subject.head.names[finding], change, before, after, best is not None)


def _shrunk(subject: Subject, finding: int, change: Tensor, turning: float, side: float) -> Tensor:
    """The smallest share of ``change`` that still turns the score, by bisection."""
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
