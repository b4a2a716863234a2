"""The commands as a user types them, in this process."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ctclip.cli import main
from ctclip.heads.folder import list_heads
from tests.unit.adaptation.conftest import Clinic


def command(*words: object) -> int:
    return main([str(word) for word in words])


def test_probe_and_coop_as_commands(clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ("--model", clinic.model, "--store", clinic.store)
    assert command("probe", *given, "--percent", "50,100", "--shots", "2", "--draws", "2", "-o", tmp_path / "p") == 0
    printed = capsys.readouterr().out
    assert "none (prompts)" in printed
    assert "2 shots" in printed
    assert "50 %" in printed
    table = pd.read_csv(tmp_path / "p" / "probe.csv")
    assert table["setting"].tolist() == ["2 shots", "50 %", "100 %"]
    assert table["draws"].tolist() == [2, 2, 1]
    assert table["patients"].tolist()[1:] == [14, 28]
    assert (table["lower"] <= table["mean_auroc"]).tolist() == [True, True, False]
    assert command("adapt", "--method", "coop", *given, "--shots", 2, "-o", tmp_path / "c", "steps=2") == 0
    assert "words nearest to the learned vectors" in capsys.readouterr().out
    assert [one.name for one in list_heads(clinic.model)] == ["coop", "probe", "prompts"]
    assert command("zero-shot", *given, "--head", "coop", "--split", "valid", "-o", tmp_path / "z") == 0
    assert (
        command(
            "evaluate",
            tmp_path / "z" / "predictions.csv",
            "--store",
            clinic.store,
            "--bootstrap",
            20,
            "-o",
            tmp_path / "e",
        )
        == 0
    )
    assert "label-supervised" in (tmp_path / "e" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("probe", "--percent", ""), "give --percent or --shots"),
        (("probe", "--percent", "0"), "above 0 and up to 100"),
        (("adapt", "--method", "coop", "step=3"), "step"),
        (("adapt", "--method", "coop", "contexts=unified"), "starts from one prompt for all labels"),
        (("adapt", "--method", "full", "--shots", "3"), "reads no labels"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(
    words: tuple[str, ...], message: str, clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ("--model", clinic.model, "--store", clinic.store, "-o", tmp_path / "out")
    assert command(*words, *given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
