"""Every command takes only finite numbers, and does not write over its input, or into a model folder or a store that it
reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.core import TyperCommand

from ctclip.cli import app, audit, config, labels, main, prompts
from ctclip.cli.command import Command, refuse_not_finite, refuse_own_input
from ctclip.errors import ConfigError


def test_every_command_is_checked() -> None:
    registered = [one for group in (app, audit, prompts, labels, config) for one in group.registered_commands]
    assert len(registered) > 40
    assert all(issubclass(one.cls or TyperCommand, Command) for one in registered)
    assert {id(group.typer_instance) for group in app.registered_groups} == set(
        map(id, (audit, prompts, labels, config))
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_numbers_that_are_not_finite_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"--largest-gb (nan|inf|-inf): give a finite number"):
        refuse_not_finite({"output": "nan", "largest_gb": value})
    refuse_not_finite({"output": "nan", "count": 3, "level": 0.5, "flag": True, "none": None})


def test_a_command_is_not_run_with_numbers_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--method", "coop", "--model", "m", "--store", "s", "--output", "o", "--percent", "nan"]) == 2
    assert capsys.readouterr().err == "error: --percent nan: give a finite number\n"


def test_a_file_that_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        Path(name).touch()
    Path("link.csv").symlink_to("a.csv")
    for given in ({"reports": Path("a.csv")}, {"terms": "./a.csv"}, {"scans": [Path("b.csv"), tmp_path / "a.csv"]}):
        with pytest.raises(ConfigError, match=r"a\.csv: is read by this command"):
            refuse_own_input({"output": Path("a.csv"), **given})
    with pytest.raises(ConfigError, match="is read by this command"):
        refuse_own_input({"output": Path("link.csv"), "reports": Path("a.csv")})
    refuse_own_input(
        {"output": Path("new.csv"), "reports": Path("a.csv"), "text": "new.csv" * 99, "other": "\0", "n": 3}
    )
    refuse_own_input({"output": None, "reports": Path("a.csv")})


@pytest.mark.parametrize("files", [("model.safetensors", "preprocessing.yaml"), ("cohort.parquet", "spec.yaml")])
def test_nothing_is_written_into_a_model_folder_or_a_store(files: tuple[str, str], tmp_path: Path) -> None:
    whole, run = tmp_path / "run" / "whole", tmp_path / "run"
    whole.mkdir(parents=True)
    for name in files:
        (whole / name).touch()
    with pytest.raises(ConfigError, match=r"lies inside .*whole, which this command reads; give another --output"):
        refuse_own_input({"output": whole / "new" / "x.csv", "model": str(whole)})
    refuse_own_input({"output": run / "x.csv", "model": str(whole), "run": run})
