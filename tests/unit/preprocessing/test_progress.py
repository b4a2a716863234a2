"""The progress display of a long stage."""

from __future__ import annotations

import sys
import time

import pytest

from ctclip.preprocessing import progress
from ctclip.preprocessing.progress import duration, track


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"), (5.4, "5 s"), (99, "99 s"), (100, "2 min"), (1046, "17 min"), (5940, "99 min"), (6000, "1 h 40 min"),
        (7200, "2 h"), (36 * 3600 + 120, "36 h 2 min"), (3 * 86400, "3 days"),
    ],
)  # fmt: skip
def test_durations_have_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_log_file_gets_a_line_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10000, 600))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(track("abcd", 4, "reading", "scans", lambda: "loss 2.0")) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 1/4 scans, 10 min each, 30 min left; loss 2.0"
    assert lines[-1] == "reading: 4/4 scans, 10 min each, 0 s left; loss 2.0"


def test_a_terminal_shows_the_time_left_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    for number, _ in enumerate(track(range(3), 3, "reading", "scans")):
        time.sleep(0.15 if number else 0)
    shown = capsys.readouterr().err
    assert "0 s left" in shown
    assert "0:00:0" not in shown
