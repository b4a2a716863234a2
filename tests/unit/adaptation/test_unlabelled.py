"""Options that methods without labels refuse: a one-line error, and no training."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctclip.cli import main
from tests.unit.drafting.conftest import Clinic, clinic, clinic_files  # noqa: F401


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("prior", ("--shots", "3"), "--method prior reads no labels"),
        ("prior", ("--head", "prompts"), "has a head 'prompts' of its own"),
        ("prior", ("kind=spline",), "kind"),
        ("prior", ("--train-split", "calibration"), "calibration"),
        ("locate", ("--shots", "3"), "--method locate reads no labels"),
        ("locate", ("cells=1",), "cells"),
        ("locate", ("--train-split", "calibration"), "calibration"),
        ("decode", ("--shots", "3"), "--method decode reads no labels"),
        ("decode", ("networks.width=[48]",), "multiple of 32"),
    ],
)
def test_bad_options_are_one_line(
    method: str,
    words: tuple[str, ...],
    message: str,
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    given = ["adapt", "--method", method, "--model", str(clinic.model), "--store", str(clinic.store)]
    assert main([*given, "--output", str(tmp_path / "out"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
