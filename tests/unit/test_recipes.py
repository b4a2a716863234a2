"""The points of the learning curve, and the law fitted to it."""

from __future__ import annotations

import pytest

from tests.benchmarks.recipes import CURVE, curve_sizes, power_law


def test_a_small_store_ends_the_curve_with_all_it_has() -> None:
    assert curve_sizes(4017) == list(CURVE)
    assert curve_sizes(3802) == [250, 500, 1000, 2000, 3802]
    assert curve_sizes(250) == [250]


def test_the_law_is_found_again() -> None:
    a, b = power_law([250, 1000, 4000], [1 - 4.5 * n**-0.4 for n in (250, 1000, 4000)])
    assert (a, b) == pytest.approx((4.5, 0.4))
