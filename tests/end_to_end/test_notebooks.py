"""The notebooks of docs/ are executed on the small cohort, and their outputs checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[Any]:
    """Outputs of each code cell of a notebook, executed in ``folder``."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbformat = pytest.importorskip("nbformat")
    for key, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(NOTEBOOKS.parents[1]), **variables}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": os.fspath(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs: list[Any]) -> str:
    return "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in outputs)


def test_one_scan(trained: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = next(cohort.rglob("dataset/valid/**/*.nii.gz"))
    cells = run("one_scan", tmp_path, monkeypatch, CTCLIP_MODEL=str(trained / "model"), CTCLIP_SCAN=str(scan))
    assert "ctclip model" in texts(cells[0])
    assert "(64, 80, 112)" in texts(cells[1])
    assert any("image/png" in one.get("data", {}) for one in cells[2])
    assert "Pleural effusion" in texts(cells[3])
    assert "only on synthetic scans" in texts(cells[3])
    assert "grid of tokens" in texts(cells[6])


@pytest.mark.slow
def test_train_evaluate_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run("train_evaluate_compare", tmp_path, monkeypatch)
    assert "reports only" in texts(cells[4])
    assert "predictions/no_queue" in texts(cells[5])
    assert (tmp_path / "evaluation" / "report.html").is_file()


@pytest.mark.slow
def test_adapt_and_explain(
    trained: Path, store: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = next(cohort.rglob("dataset/valid/**/*.nii.gz"))
    given = {"CTCLIP_MODEL": trained / "model", "CTCLIP_STORE": store, "CTCLIP_SCAN": scan}
    cells = run("adapt_and_explain", tmp_path, monkeypatch, **{key: str(path) for key, path in given.items()})
    assert "mean_auroc" in texts(cells[1])
    assert "words nearest to the learned vectors" in texts(cells[2])
    assert "'probe': 'label-supervised'" in texts(cells[3])
    assert "coop" in texts(cells[4])
    assert "findings.seg.nii.gz" in texts(cells[5])
    assert any("image/png" in one.get("data", {}) for one in cells[6])
    assert "longest side" in texts(cells[7])
    assert not (trained / "model" / "heads" / "probe").exists()


def test_notebooks_are_kept_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert not [cell for cell in nbformat.read(path, as_version=4).cells if cell.get("outputs")], path.name
