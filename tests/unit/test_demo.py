"""The sizes of the demo, and its estimate of the remaining time."""

from __future__ import annotations

import pytest

from ctclip.cli.demo import Chosen
from ctclip.config_files import load_config
from ctclip.demo import SIZES, minutes_left


def test_every_size_can_be_chosen_and_its_training_is_valid() -> None:
    assert {size.value for size in Chosen} == set(SIZES)
    for size in SIZES.values():
        load_config("phantom_tiny", size.overrides)


def test_the_time_left_follows_how_long_stages_took() -> None:
    usual, names = (1.0, 1.0, 8.0), ["a", "b", "c"]
    assert minutes_left(usual, {}, []) == pytest.approx(10)
    on_time = {"a": 60.0, "b": 60.0}
    assert minutes_left(usual, on_time, names[:2]) == pytest.approx(8)
    # Three times as slow over two minutes; one of these minutes is attributed to chance.
    assert minutes_left(usual, {"a": 180.0, "b": 180.0}, names[:2]) == pytest.approx(8 * 7 / 3)
    assert minutes_left(usual, {**on_time, "c": 480.0}, names) == 0
