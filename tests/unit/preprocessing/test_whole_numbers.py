"""Whole numbers in untrusted text."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctclip.cli import main
from ctclip.preprocessing.whole_numbers import whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("007", 7), ("9" * 18, 10**18 - 1), *((odd, None) for odd in ("", "²", "１", "-1", "+1", " 1", "1_0", "1\n", "1.0", "9" * 5000))],
)  # fmt: skip
def test_only_plain_digits_are_a_number(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("shard", ["²/3", "1/²", "0/3", "4/3", "1", "/", "9/" + "9" * 5000])
def test_a_shard_is_two_numbers(shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preprocess", str(tmp_path), "--output", str(tmp_path / "store"), "--spec", "phantom", "--shard", shard]
    assert main(words) == 2
    assert "for example 3/16" in " ".join(capsys.readouterr().err.replace("│", " ").split())
