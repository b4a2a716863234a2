"""The commands for maps as a user types them: explain a scan, find a text in it, score maps against masks."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import ctclip
from ctclip.cli import main
from ctclip.errors import ExplanationError
from ctclip.explanation.explain import Explanation


def typed(*arguments: object) -> int:
    """Exit code of a command, run in this process."""
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    return trained / "model"


@pytest.fixture(scope="module")
def scan(cohort: Path) -> Path:
    return min((cohort / "dataset").rglob("*.nii.gz"))


def test_explain(model: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["--abnormality", "Pleural effusion", "--abnormality", "Lung nodule"]
    assert typed("explain", scan, "--model", model, *asked, "--output", out) == 0
    printed = capsys.readouterr().out
    assert "Pleural effusion: " in printed
    assert "research, not for diagnosis" in printed
    facts = json.loads((out / "findings.json").read_text())
    assert [one["finding"] for one in facts["findings"]] == ["Pleural effusion", "Lung nodule"]
    for one in facts["findings"]:
        written = nib.load(out / one["map"])
        np.testing.assert_allclose(written.affine, nib.load(scan).affine, atol=1e-3)
        assert written.shape == nib.load(scan).shape
    page = (out / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    # The same folder may be written again; another folder of the user may not.
    assert typed("explain", scan, "--model", model, *asked[:2], "--output", out) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert typed("explain", scan, "--model", model, *asked[:2], "--output", tmp_path / "mine") == 2
    assert "holds no explanation" in capsys.readouterr().err


def test_find(model: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a bright spot larger than 5 mm"
    assert typed("find", scan, text, "--model", model, "--refine", "--output", tmp_path / "out") == 0
    assert "kept: regions with a longest side of 5 to inf mm" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert facts["text"] == text
    assert all(max(r["size_mm_right_left"], r["size_mm_front_back"], r["size_mm_foot_head"]) >= 5 for r in facts["regions"])  # fmt: skip


def test_locate(model: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "locate.json"
    assert typed("locate", cohort, "--masks", cohort / "masks", "--model", model, "--count", 4, "--output", path) == 0
    assert "mean, mean map" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["scans"] == 4
    for entry in result["findings"].values():
        assert 0 <= entry["map"]["pointing"]["value"] <= 1
        assert set(entry["free_response"]) == {"0.5", "1", "2", "4"}


def test_in_a_notebook(model: Path, scan: Path) -> None:
    loaded = ctclip.load(model)
    found = loaded.explain(scan, "Pleural effusion")
    assert isinstance(found, Explanation)
    assert found["Pleural effusion"].map().shape == nib.load(scan).shape[::-1]
    assert "Pleural effusion" in found._repr_html_()
    with pytest.raises(ExplanationError, match="give one of similarity"):
        loaded.explain(scan, "Pleural effusion", method="guess")
