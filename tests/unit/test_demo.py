"""The sizes of the demo, and its estimate of the remaining time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ctclip.cli.demo import Chosen
from ctclip.config_files import load_config
from ctclip.demo import SIZES, _seconds, demo, fast_precision, minutes_left
from ctclip.errors import CtclipError


def test_every_size_can_be_chosen_and_its_training_is_valid() -> None:
    assert {size.value for size in Chosen} == set(SIZES)
    for size in SIZES.values():
        load_config("phantom_tiny", size.overrides)


@pytest.mark.parametrize(
    ("flags", "change"),
    [("fma avx512_bf16", True), ("amx_tile amx_bf16 avx2", True), ("avx2 avx512f avx512_bf16x", False), ("", False)],
)
def test_bfloat16_is_used_where_the_processor_has_instructions_for_it(flags: str, change: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: one\nflags\t\t: fpu {flags} sse\n")
    overrides = fast_precision(tmp_path / "cpuinfo")
    assert bool(overrides) == change
    assert load_config("phantom_tiny", overrides).training.precision == ("bf16" if change else "fp32")
    assert fast_precision(tmp_path / "none") == ()


@pytest.mark.parametrize("size", ["smoke", "quick"])
def test_only_the_smallest_demo_goes_on_without_calibration(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has learned nothing may rank every label the wrong way round, and then none can be calibrated."""
    run: list[list[str]] = []

    def stage(arguments: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        run.append(arguments[3:])
        return subprocess.CompletedProcess(arguments, 2 if "calibrate" in arguments else 0)

    monkeypatch.setattr("ctclip.demo.subprocess.run", stage)
    if size == "quick":
        with pytest.raises(CtclipError, match="the stage 'calibrate' failed"):
            demo(tmp_path / "out", size, 0, 1)
        return
    demo(tmp_path / "out", size, 0, 1)
    assert [arguments[0] for arguments in run][-3:] == ["calibrate", "zero-shot", "evaluate"]
    assert "--calibration" not in run[-1]
    assert "--output" in run[-1]


@pytest.mark.parametrize("content", ["", "[]", '{"train": "long"}', '{"train": null}'])
def test_a_damaged_record_of_times_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(CtclipError, match=r"seconds\.json: damaged; delete it"):
        _seconds(tmp_path / "seconds.json")


def test_the_time_left_follows_how_long_stages_took() -> None:
    usual, names = (1.0, 1.0, 8.0), ["a", "b", "c"]
    assert minutes_left(usual, {}, []) == pytest.approx(10)
    on_time = {"a": 60.0, "b": 60.0}
    assert minutes_left(usual, on_time, names[:2]) == pytest.approx(8)
    # Three times as slow over two minutes; one of these minutes is attributed to chance.
    assert minutes_left(usual, {"a": 180.0, "b": 180.0}, names[:2]) == pytest.approx(8 * 7 / 3)
    assert minutes_left(usual, {**on_time, "c": 480.0}, names) == 0
