"""Texts with sizes, regions of maps, and growing them to edges."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctclip.errors import ExplanationError
from ctclip.explanation.explain import Explanation, explain
from ctclip.explanation.find import Found, SizeLimit, find, proposals, refine, size_limit
from ctclip.explanation.place import Place, regions_of
from ctclip.explanation.space import centres, in_scan
from ctclip.preprocessing import prepare
from ctclip.report_reading.absence import states_absence
from tests.unit.explanation.known import SPEC, known_model, write_scan

AFFINE = np.array([[-2.0, 0, 0, 60], [0, -2, 0, 50], [0, 0, 3, -40], [0, 0, 0, 1]])
SHAPE = (60, 50, 28)


@pytest.mark.parametrize(
    ("text", "rest", "limit"),
    [
        ("a nodule larger than 10 mm", "a nodule", SizeLimit(10.0)),
        ("nodule greater than 1.5 cm", "nodule", SizeLimit(15.0)),
        ("a node over 8 mm, smaller than 2 cm", "a node", SizeLimit(8.0, 20.0)),
        ("an effusion", "an effusion", SizeLimit()),
        ("a nodule in segment 10", "a nodule in segment 10", SizeLimit()),
        ("larger than 5 mm", "larger than 5 mm", SizeLimit(5.0)),
        ("nodule between 5 and 10 mm", "nodule", SizeLimit(5.0, 10.0)),
        ("a nodule of 0,5 to 1.2 cm", "a nodule of", SizeLimit(5.0, 12.0)),
        ("a nodule, 5 mm-1 cm", "a nodule", SizeLimit(5.0, 10.0)),
        ("nodules from 5-10mm on the left", "nodules on the left", SizeLimit(5.0, 10.0)),
        ("a nodule of at least 1 cm", "a nodule", SizeLimit(10.0)),
        ("a nodule > 10 mm", "a nodule", SizeLimit(10.0)),
        ("a nodule ≥10mm", "a nodule", SizeLimit(10.0)),
        ("a nodule <= 3 centimeters", "a nodule", SizeLimit(0.0, 30.0)),
        ("nodule under 6 millimetres", "nodule", SizeLimit(0.0, 6.0)),
        ("a nodule no larger than 6 mm", "a nodule", SizeLimit(0.0, 6.0)),
        ("a mass of 3 cm or more", "a mass of", SizeLimit(30.0)),
        ("a mass up to 3 cm", "a mass", SizeLimit(0.0, 30.0)),
    ],
)
def test_a_size_is_taken_from_the_text(text: str, rest: str, limit: SizeLimit) -> None:
    assert size_limit(text) == (rest, limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 7 mm nodule", "'7 mm' is not a limit; write for example 'larger than 5 mm'"),
        ("a nodule of 1 cm", "'1 cm' is not a limit"),
        ("a nodule of 3 x 4 mm", "'4 mm' is not a limit"),
        ("a nodule larger than -10 mm", "'10 mm' is not a limit"),
        ("larger than 10 mm and smaller than 5 mm", "no size is at least 10 mm and at most 5 mm"),
        ("a nodule between 10 and 5 mm", "no size is at least 10 mm and at most 5 mm"),
    ],
)
def test_a_size_that_is_no_limit_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExplanationError, match=re.escape(message)):
        size_limit(text)


@pytest.mark.parametrize(
    "text", ["no nodule", "Without effusion", "absence of emphysema", "no nodule larger than 5 mm"]
)
def test_a_text_that_states_an_absence_is_refused(text: str) -> None:
    assert states_absence(text)
    with pytest.raises(ExplanationError, match="states an absence, which has no place"):
        find(None, None, text, [], scan="s", model_hash="m")  # type: ignore[arg-type]


def test_a_text_that_states_a_presence_is_not_an_absence() -> None:
    assert not any(map(states_absence, ["a nodule", "Nodule that is not calcified", "effusion without atelectasis"]))


def place_of(folder: Path) -> Place:
    write_scan(folder / "scan.nii.gz", AFFINE, np.array([12.0, -14.0, 8.0]), SHAPE)
    model, head = known_model()
    return explain(model, head, prepare(folder / "scan.nii.gz", SPEC), ["Lesion"], scan="s", model_hash="m")["Lesion"]


def test_regions_have_the_sizes_that_were_drawn(tmp_path: Path) -> None:
    """Two blocks of cells, one higher and larger: in that order, as long as their cells are, within a cell's edge."""
    place = place_of(tmp_path)
    values = np.zeros((6, 6, 8), np.float32)
    values[1:3, 2:4, 2:5] = 3.0
    values[4, 4, 6] = 2.0
    found = regions_of(values, place.affine, place.prepared, 0.5)
    assert [region.height for region in found] == [3.0, 2.0]
    # A cell of SPEC and TOKEN measures 16 x 15 x 15 mm along slice, row, column.
    np.testing.assert_allclose(found[0].size_mm, (45, 30, 32), atol=8)
    np.testing.assert_allclose(found[0].volume_ml, 45 * 30 * 32 / 1000, rtol=0.25)
    assert found[1].peak == (4, 4, 6)
    assert [r.height for r in proposals(values, place.affine, place.prepared, 0.5, SizeLimit(25), 5)] == [3.0]
    assert [r.height for r in proposals(values, place.affine, place.prepared, 0.5, SizeLimit(0, 25), 5)] == [2.0]
    assert not regions_of(-values - 1, place.affine, place.prepared, 0.5)
    sloping = np.zeros((6, 6, 8), np.float32)
    sloping[2, 3, 3:5] = 3.0, 1.0
    (interpolated,) = regions_of(sloping, place.affine, place.prepared, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctclip.explanation.place.FINE", sloping.size)
        (whole,) = regions_of(sloping, place.affine, place.prepared, 0.5)
    assert interpolated.size_mm[0] > 15, "towards the neighbour"
    assert whole.size_mm == pytest.approx((15, 15, 16)), "a map with many cells is not interpolated"


def test_a_region_grows_to_the_edge_of_what_it_lies_on(tmp_path: Path) -> None:
    """A ball of 14 mm under a wide map of cells of 16 x 15 x 15 mm: grown to edges of HU its Dice with the ball doubles."""
    place = place_of(tmp_path)
    cells = centres(place.values.shape, place.prepared.token_affine(place.affine))
    ball = cells[3, 3, 4]
    write_scan(tmp_path / "ball.nii.gz", AFFINE, ball * [-1, -1, 1], SHAPE, radius=14)
    prepared = prepare(tmp_path / "ball.nii.gz", SPEC)
    values = np.exp(-(np.linalg.norm(cells - ball, axis=-1) ** 2) / (2 * 20**2)).astype(np.float32)
    place = dataclasses.replace(place, values=values, prepared=prepared)
    truth = np.linalg.norm(centres(prepared.spec.shape, prepared.affine) - ball, axis=-1) < 14
    grown = refine(values, place.affine, prepared)
    wide = in_scan(values, place.affine, prepared, truth.shape, prepared.affine) >= 0.5

    def dice(called: np.ndarray) -> float:
        return float(2 * (called & truth).sum() / (called.sum() + truth.sum()))

    assert dice(grown) > 0.6
    assert dice(grown) > dice(wide) + 0.2
    explained = Explanation("scan", "m", "similarity", 0.0, {"Lesion": place})
    found = Found("lesion", SizeLimit(), regions_of(values, place.affine, prepared, 0.5)[:1], explained)
    assert 0 < (found.mask(refined=True) > 0).sum() < 0.5 * (found.mask() > 0).sum()
    page = found.save(tmp_path / "out", refined=True)
    written = nib.load(page.parent / "findings.seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), found.mask(refined=True).transpose(2, 1, 0))
    assert "region 1" in written.header.extensions[0].get_content().decode()
