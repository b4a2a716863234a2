"""A counterfactual changes the decision with a small edit, within the body and the HU window, at the cause of the
score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.evaluation.calibration import Calibration, Line
from ctclip.explanation.counterfactual import CELL_MM, Counterfactual, _turned, turning_score
from ctclip.explanation.edit import SmoothEdit, body, total_variation
from ctclip.explanation.method import Subject
from ctclip.heads.head import Head
from ctclip.models.encoded import Encoded
from tests.unit.explanation.known import SPEC, Brightness, known_model

# One token of the known encoder, counted along (slice, row, column).
PLACE = (slice(8, 12), slice(12, 18), slice(25, 30))


class Blob(Head):
    """Score "Blob" by the brightness of the brightest token."""

    kind = "blob"
    names = ("Blob",)

    def score(self, encoded: Encoded) -> Tensor:
        return 10 * torch.logsumexp(20 * encoded.tokens[..., 0], dim=1, keepdim=True) / 20 - 12

    save, load = Brightness.save, Brightness.load  # type: ignore[assignment]


def subject(bright: float = 0.7, budget: int = 180) -> Subject:
    model, _ = known_model()
    volume = torch.full((1, 1, *SPEC.shape), -0.2)
    volume[..., :6] = -1  # air next to the body
    volume[0, 0][PLACE] = bright
    return Subject(model, Blob(model), [0], volume, budget)


def test_a_finding_is_taken_away_where_it_lies() -> None:
    asked = subject()
    maps = Counterfactual().maps(asked)
    assert float(asked.head.score(asked.model.encode(asked.volume))) > 0
    index = np.unravel_index(int(maps.values[0].argmax()), maps.values.shape[1:])
    mm = (maps.affine @ [*index, 1])[:3]
    centre = [(side.start + side.stop - 1) / 2 * step for side, step in zip(PLACE, SPEC.spacing, strict=True)]
    assert np.abs(mm - centre).max() <= CELL_MM
    assert "turns, probability 0.9" in maps.notes[0]
    assert "less dense" in maps.notes[0]
    edit = _turned(asked, 0)
    assert edit.turned
    assert edit.after == pytest.approx(0.5, abs=0.03), "no further than the turning point"
    edited = asked.volume + edit.change
    assert float(edited.min()) >= -1
    assert float(edited.max()) <= 1
    assert float(edit.change[..., :5].abs().max()) == 0, "air is left alone"


def test_an_absent_finding_is_put_in() -> None:
    edit = _turned(subject(bright=-0.2), 0)
    assert (edit.turned, edit.before < 0.4) == (True, True)
    assert edit.after == pytest.approx(0.5, abs=0.03)
    assert "becomes denser" in edit.words(1000)


def test_a_score_out_of_reach_is_said_not_to_turn() -> None:
    asked = subject(bright=-0.2)
    edit = _turned(replace(asked, budget=6), 0)
    assert not edit.turned
    assert "does not turn" in edit.words(1000)


def test_the_turning_point_is_the_calibrated_threshold() -> None:
    asked = subject()
    assert turning_score(asked, 0) == pytest.approx(0, abs=1e-3)
    asked.head.calibration = Calibration("platt", "", "model", {"Blob": Line(0.5, 1.0, 0.7, 9, 20)})
    turning = turning_score(asked, 0)
    assert turning == pytest.approx((np.log(0.7 / 0.3) - 1) / 0.5, abs=1e-3)


def test_a_head_without_a_gradient_is_refused_in_one_line() -> None:
    asked = subject()
    weight = torch.ones(1, requires_grad=True)
    for factor in (torch.ones(1), weight):  # without any gradient; with one that does not lead to the voxels
        asked.head.score = lambda encoded, by=factor: by * encoded.tokens.detach().amax(dim=(1, 2))[:, None]  # type: ignore[method-assign, misc]
        with pytest.raises(ExplanationError, match="the score of 'Blob' has no gradient"):
            Counterfactual().maps(asked)


def test_an_edit_is_smooth_and_nothing_at_first() -> None:
    volume = torch.full((1, 1, 16, 16, 16), -1.0)
    volume[..., 8:] = 0
    edit = SmoothEdit((16, 16, 16), (2, 2, 2), (16, 8), body(volume, (2, 2, 2)))
    assert [tuple(grid.shape[2:]) for grid in edit.grids] == [(2, 2, 2), (4, 4, 4)]
    assert float(edit().detach().abs().max()) == 0
    edit.grids[0].data.fill_(1)
    assert edit()[0, 0, 0, 0].tolist() == [0] * 8 + [1] * 8
    ramp = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(1, 1, 3, 2, 4)
    assert float(total_variation(ramp)) == 1
