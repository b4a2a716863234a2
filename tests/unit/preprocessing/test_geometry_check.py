"""The check of geometry: a doubtful header with a table, with a user option, or without both."""

from __future__ import annotations

import numpy as np
import pytest

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.geometry_check import differ, is_blank, reading, settle, unusable
from ctclip.preprocessing.volume import Volume
from tests.unit.preprocessing.scan_files import AFFINE, HU


def volume(affine: np.ndarray = AFFINE, doubt: str | None = None) -> Volume:
    return Volume(HU, affine, "scan.nii", ["earlier"], doubt)


def stretched(factor: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 0] *= factor
    return affine


def test_a_header_that_is_not_in_doubt_is_kept_as_it_is() -> None:
    given = volume()
    assert settle(given) is given
    assert settle(given, AFFINE) is given
    assert settle(given, stretched(1.005)) is given, "within 1 %"


@pytest.mark.parametrize("table", [stretched(1.02), AFFINE * [-1, 1, 1, 1], AFFINE[:, [1, 0, 2, 3]]])
def test_a_table_that_differs_decides_aloud(table: np.ndarray) -> None:
    settled = settle(volume(), table)
    assert np.array_equal(settled.affine, table)
    assert settled.warnings[0] == "earlier"
    assert "geometry taken from the metadata table" in settled.warnings[1]
    assert reading(AFFINE) in settled.warnings[1]


def test_a_table_decides_where_the_header_is_in_doubt() -> None:
    settled = settle(volume(np.eye(4), "its affine is the identity"), AFFINE)
    assert np.array_equal(settled.affine, AFFINE)
    assert settled.geometry_doubt is None
    assert "its affine is the identity" in settled.warnings[-1]


def test_without_a_table_doubt_is_refused_or_taken_at_the_users_word() -> None:
    doubtful = volume(doubt="its sform and qform codes are both 0")
    with pytest.raises(
        PreprocessingError, match=r"^scan\.nii: its sform .* --geometry sform\|qform\|header if you know"
    ):
        settle(doubtful)
    taken = settle(doubtful, None, "header")
    assert np.array_equal(taken.affine, AFFINE)
    assert taken.geometry_doubt is None
    assert "codes are both 0" in taken.warnings[-1]
    assert settle(doubtful, stretched(2), "header").affine[0, 0] == AFFINE[0, 0], (
        "the user's word stands above the table"
    )
    with pytest.raises(PreprocessingError, match="no metadata table states its geometry"):
        settle(volume(), None, "table")
    assert np.array_equal(settle(volume(), stretched(1.005), "table").affine, stretched(1.005))


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.diag([0.05, 1, 1, 1]), "0.05 x 1 x 1 mm"),
        (np.diag([25.0, 1, 1, 1]), "25 x 1 x 1 mm"),
        (np.diag([0.0, 1, 1, 1]), "0 x 1 x 1 mm"),
        (np.diag([np.nan, 1, 1, 1]), "not finite"),
        (np.diag([np.inf, 1, 1, 1]), "not finite"),
        (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "degenerate"),
        (np.diag([1.0, 1, 1, 1]) + np.outer([1e9, 0, 0, 0], [0, 0, 0, 1]), "far too large"),
    ],
)
def test_what_no_ct_has_is_refused_whoever_states_it(affine: np.ndarray, reason: str) -> None:
    assert reason in str(unusable(affine))
    for choice in ("auto", "header"):
        with pytest.raises(PreprocessingError, match=r"^scan\.nii: its header"):
            settle(volume(affine), None, choice)
    with pytest.raises(PreprocessingError, match=r"^scan\.nii: the metadata table.*correct the table"):
        settle(volume(), affine)


def test_a_tilted_gantry_is_no_contradiction_in_itself() -> None:
    tilted = np.diag([5.0, 0.7, 0.7, 1.0])
    tilted[1, 0] = 5 * np.tan(np.radians(29))
    assert unusable(tilted) is None


def test_differences_are_those_of_steps_not_of_origins() -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += 500
    assert not differ(AFFINE, moved)
    assert not differ(AFFINE, AFFINE + 1e-5)
    assert differ(AFFINE, np.full((4, 4), np.nan))
    angle = np.radians(1)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert differ(AFFINE, turn @ AFFINE)


def test_blank_is_one_millimetre_straight_axes_and_no_origin() -> None:
    for axes in ([0, 1, 2, 3], [2, 1, 0, 3], [1, 2, 0, 3]):
        for signs in ([1, 1, 1, 1], [-1, -1, 1, 1], [-1, 1, 1, 1]):
            assert is_blank(np.eye(4)[axes] * signs)
    assert not is_blank(np.diag([1.0, 1, 1.0001, 1]))
    assert not is_blank(np.eye(4) + np.outer([0, 0, 1, 0], [0, 0, 0, 1]))
    assert not is_blank(np.array([[0.6, 0.4, 0, 0], [0.4, 0.6, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


def skewed(degrees: float, spacing: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    """Two axes this many degrees apart, the third perpendicular to both."""
    affine = np.eye(4)
    affine[:2, 1] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine[:3, :3] *= spacing
    return affine


@pytest.mark.parametrize(
    ("affine", "usable"),
    [
        (np.diag([0.1, 0.1, 20.0, 1.0]), True),
        (np.diag([0.0999, 1, 1, 1]), False),
        (np.diag([1, 1, 20.01, 1]), False),
        (skewed(30.5), True),
        (skewed(29.5), False),
        (skewed(149.5), True),
        (skewed(30.5, (0.2, 0.2, 0.2)), True),
        (skewed(29.5, (5, 5, 5)), False),
        (skewed(-90), True),
        (np.diag([1.0, 1, 1, 1]) + np.outer([1e6, 0, 0, 0], [0, 0, 0, 1]), True),
        (np.diag([1.0, 1, 1, 1]) + np.outer([1e6 + 0.5, 0, 0, 0], [0, 0, 0, 1]), False),
        (np.diag([1.0, 1, 1, 1]) - np.outer([1.001e6, 0, 0, 0], [0, 0, 0, 1]), False),
    ],
)
def test_the_bounds_of_what_a_ct_can_have(affine: np.ndarray, usable: bool) -> None:
    """0.1 to 20 mm along each axis, axes that span at least half the volume of perpendicular ones, within a
    kilometre."""
    assert (unusable(affine) is None) is usable


@pytest.mark.parametrize(("change", "differs"), [(1.0099, False), (1.0102, True), (0.9902, False), (0.9898, True)])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [0.5, 5.0])
def test_steps_differ_from_one_per_cent_on(change: float, differs: bool, axis: int, spacing: float) -> None:
    one = np.diag([spacing, spacing, spacing, 1.0])
    other = one.copy()
    other[axis, axis] *= change
    assert differ(one, other) is differs
    assert differ(other, one) is differs


def test_each_axis_is_measured_by_its_own_step() -> None:
    """Thick slices along the first axis, which points up: a difference of 2 % of a thin column's step is still
    detected."""
    one = np.zeros((4, 4))
    one[2, 0], one[1, 1], one[0, 2], one[3, 3] = 5.0, 0.7, 0.7, 1.0
    for axis, world in ((0, 2), (1, 1), (2, 0)):
        for change, differs in ((1.009, False), (1.02, True)):
            other = one.copy()
            other[world, axis] *= change
            assert differ(one, other) is differs
            assert differ(other, one) is differs


def test_differences_of_direction_are_of_the_length_of_a_step() -> None:
    for degrees, differs in ((0.5, False), (0.6, True)):
        angle = np.radians(degrees)
        turn = np.eye(4)
        turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        assert differ(AFFINE, turn @ AFFINE) is differs


def test_a_reading_names_spacing_and_directions() -> None:
    assert reading(np.diag([0.75, 0.75, 5, 1])) == "0.75 x 0.75 x 5 mm, axes towards L, P, S"
    turned = np.array([[0, 0, -0.7123456, 9], [0, -0.7, 0, 9], [5, 0, 0.1, 9], [0, 0, 0, 1]])
    assert reading(turned) == "5 x 0.7 x 0.7193 mm, axes towards S, A, R"
    assert reading(np.diag([1, -1, -1, 1])) == "1 x 1 x 1 mm, axes towards L, A, I"
    flat = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    for wrong in (np.diag([np.nan, 1, 1, 1]), np.diag([0.0, 1, 1, 1]), np.diag([1, 1, 0, 1.0]), flat):
        assert reading(wrong) == "no usable geometry"


def test_what_is_nearly_blank_is_not() -> None:
    assert is_blank(np.eye(4) + np.diag([4e-8, -4e-8, 0, 0]))
    assert not is_blank(np.diag([1.0, 1, 1 + 1e-6, 1]))
    assert not is_blank(np.diag([1.0, 1, 2, 1]))
    for column in range(3):
        twice = np.eye(4)
        twice[:3, column] = [1, 1, 0] if column == 2 else [0, 0, 1]
        assert not is_blank(twice)
    assert not is_blank(np.diag([1.0, 0, 1, 1]))


@pytest.mark.parametrize("choice", ["header", "sform", "qform"])
def test_the_users_word_takes_the_header_as_it_is(choice) -> None:
    sure = volume()
    assert settle(sure, stretched(2), choice) is sure
    assert settle(sure, None, choice) is sure
    doubtful = volume(doubt="it states no orientation")
    taken = settle(doubtful, None, choice)
    assert taken.warnings == [
        "earlier",
        f"geometry taken from the header at --geometry {choice}, though it states no orientation",
    ]
    assert doubtful.warnings == ["earlier"]
    with pytest.raises(PreprocessingError, match=r"it states no orientation; .* --geometry header if you know"):
        settle(doubtful)


def test_a_table_taken_at_the_users_word() -> None:
    sure, table = volume(), stretched(2)
    taken = settle(sure, table, "table")
    assert taken.warnings == ["earlier"], "nothing was in doubt"
    assert np.array_equal(taken.affine, table)
    assert taken.affine is not table
    assert taken.affine.dtype == np.float64
    assert np.array_equal(taken.array, sure.array)
    doubtful = settle(volume(doubt="it is the identity"), table, "table")
    assert doubtful.warnings == [
        "earlier",
        f"geometry taken from the metadata table ({reading(table)}): it is the identity",
    ]
    with pytest.raises(PreprocessingError, match="no metadata table states its geometry"):
        settle(volume(doubt="it is the identity"), None, "table")
