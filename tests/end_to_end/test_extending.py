"""Every example of docs/extending.md, written to files and run unchanged."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ..robustness.processes import Done
from .conftest import TINY, run

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(kind, title, text) for kind, title, text in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def workplace(store: Path, trained: Path, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, a store, a model, and everything else that its commands name."""
    folder = tmp_path_factory.mktemp("extending")
    for _, title, text in BLOCKS:
        if title:
            (folder / title).write_text(text, encoding="utf-8")
    shutil.copytree(store, folder / "store")
    shutil.copytree(trained / "model", folder / "model")
    (folder / "my_scans").mkdir()
    for number, path in enumerate(sorted(cohort.rglob("dataset/**/*.nii.gz"))[:4]):
        shutil.copy(path, folder / "my_scans" / f"p{number}_scan{number}.nii.gz")
        (folder / "my_scans" / f"p{number}_scan{number}.txt").write_text("There is a nodule.")
    findings = {"volume": ["a", "b"], "Nodule": [0, 1], "Effusion": [1, ""], "age": [40, 51]}
    pd.DataFrame(findings).to_csv(folder / "findings.csv", index=False)
    return folder


def commands() -> list[str]:
    lines = []
    for kind, _, text in BLOCKS:
        if kind == "bash":
            lines += [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return lines


def test_the_page_runs(workplace: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done: Done | subprocess.CompletedProcess[str]
    for line in commands():
        program, *arguments = shlex.split(line)
        if arguments[:1] == ["train"]:
            # The page shows the command that a user types; a test has two cores.
            arguments += [given for given in TINY if not given.startswith("model.volume.") or "my_encoder" not in line]
        if program == "ctclip":
            done = run(*arguments, folder=workplace)
        else:
            assert program == "python"
            done = subprocess.run(
                [sys.executable, *arguments], cwd=workplace, env=environment, capture_output=True, text=True, timeout=300, check=False
            )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    head = pd.read_csv(workplace / "head_predictions" / "predictions.csv")
    assert set(head["supervision"]) == {"label-supervised"}
    assert set(head["prompts"]) == {"prototypes"}
    assert np.isfinite(head.filter(like="margin:").to_numpy()).all()
    assert len(pd.read_csv(workplace / "tiny_predictions" / "predictions.csv")) == len(head)
    assert "my_objective:MaskShare" in (workplace / "runs" / "masks" / "metrics.jsonl").read_text()
    assert len(pd.read_parquet(workplace / "my_store" / "cohort.parquet")) == 4


def test_a_model_does_not_bring_its_code(workplace: Path) -> None:
    """After the page has run: without --plugin its encoder is refused with a one-line error."""
    model = workplace / "runs" / "tiny" / "model"
    if not model.is_dir():
        pytest.skip("the page has not run")
    done = run("zero-shot", "--model", model, "--store", "store", "--output", "refused", folder=workplace)
    assert done.returncode == 2
    assert "--plugin my_encoder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_examples_are_short() -> None:
    assert all(len(text.splitlines()) < 60 for _, _, text in BLOCKS)
