"""Maps of shifted cells: each location has the mean of the cells that cover it, at the right position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Maps, Method, Subject, method
from ctclip.explanation.shifts import check_shifts, maps_of
from tests.unit.explanation.known import SPEC, TOKEN, known_model

SHAPE = (24, 36, 40)


class Means(Method):
    """The mean of each cell."""

    name = "means"

    def maps(self, subject: Subject) -> Maps:
        affine = subject.model.volume_encoder.affine(TOKEN, [(extent - 1) / 2 for extent in TOKEN])
        return Maps(F.avg_pool3d(subject.volume, TOKEN)[0].numpy(), affine, ("a note",))


def subject(volume: torch.Tensor) -> Subject:
    model, head = known_model()
    return Subject(model, head, [0], volume)


@pytest.mark.parametrize(("shifts", "parts"), [(2, (2, 2, 1)), (3, (2, 3, 1)), (6, (4, 6, 5))])
def test_each_place_has_the_mean_of_the_cells_that_cover_it(shifts: int, parts: tuple[int, int, int]) -> None:
    volume = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values, affine, notes = maps_of(Means(), subject(volume), shifts)
    assert values.shape == (1, *(extent // cell * n for extent, cell, n in zip(SHAPE, TOKEN, parts, strict=True)))
    assert notes == ("a note",)
    steps = np.array(TOKEN) / np.array(parts)
    random = np.random.default_rng(1)
    for _ in range(40):
        index = np.array(
            [random.integers(n, extent - 2 * n) for n, extent in zip(parts, values.shape[1:], strict=True)]
        )
        centre = (affine @ [*index, 1])[:3] / np.array(SPEC.spacing)
        per_axis = []
        for axis in range(3):
            # Cells [start, start + cell) that begin at a multiple of the step and cover the place.
            starts = np.arange(0, SHAPE[axis] - TOKEN[axis] + 1, steps[axis])
            inside = (starts - 0.5 < centre[axis]) & (centre[axis] < starts + TOKEN[axis] - 0.5)
            assert inside.sum() == parts[axis]
            weights = np.zeros(SHAPE[axis])
            for start in starts[inside].astype(int):
                weights[start : start + TOKEN[axis]] += 1 / TOKEN[axis] / parts[axis]
            per_axis.append(weights)
        expected = np.einsum("zyx,z,y,x", volume[0, 0].numpy(), *per_axis)
        np.testing.assert_allclose(values[0][tuple(index)], expected, atol=1e-5)


def test_the_peak_comes_nearer_to_a_small_lesion() -> None:
    random, away = np.random.default_rng(0), {1: [], 2: []}
    for _ in range(12):
        at = np.array([random.integers(cell, extent - cell) for cell, extent in zip(TOKEN, SHAPE, strict=True)])
        volume = torch.full((1, 1, *SHAPE), -1.0)
        volume[0, 0][tuple(at)] = 1
        for shifts in away:
            values, affine, _ = maps_of(method("similarity"), subject(volume), shifts)
            peak = (affine @ [*np.unravel_index(values[0].argmax(), values[0].shape), 1])[:3] / np.array(SPEC.spacing)
            away[shifts].append(np.abs(peak - at))
    assert (np.array(away[2]) <= np.array(TOKEN) / [2, 2, 1] / 2).all()
    assert (np.array(away[1])[:, :2] > np.array(TOKEN)[:2] / 4).any()


def test_what_is_refused() -> None:
    with pytest.raises(ExplanationError, match="leave out --shifts"):
        maps_of(method("occlusion"), subject(torch.zeros(1, 1, *SHAPE)), 2)
    for bad in (0, 9, 2.0, True, "2"):
        with pytest.raises(ExplanationError, match="whole number from 1 to 8"):
            check_shifts(bad)
    check_shifts(None)
