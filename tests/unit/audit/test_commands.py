"""The commands of the audit, on a clinic of small volumes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ctclip
from ctclip.cli import main
from ctclip.data.pair_scores import FILE
from ctclip.inference.drift import usable_summary
from ctclip.models.folder import is_model_folder, load_model
from tests.unit.adaptation.conftest import Clinic, clinic, clinic_files

__all__ = ["clinic", "clinic_files"]


def test_a_summary_is_kept_and_scans_are_judged(
    clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summarise", "--model", str(clinic.model), "--store", str(clinic.store)]) == 0
    assert "28 patients, limit by cross-validation; 3.4%" in capsys.readouterr().out
    assert is_model_folder(clinic.model)
    loaded = load_model(clinic.model)
    assert usable_summary(loaded) is not None
    output = tmp_path / "predictions"
    command = ["zero-shot", "--model", str(clinic.model), "--store", str(clinic.store), "--split", "valid"]
    assert main([*command, "--output", str(output)]) == 0
    warned = pd.read_csv(output / "predictions.csv", keep_default_na=False)["warnings"].str.contains(
        "far from the scans"
    )
    assert warned.mean() < 0.5
    far = np.full((8, 8, 8), -1000, np.int16)
    far[2:6, 2:6, 2:6] = np.random.default_rng(0).normal(200, 300, (4, 4, 4))
    import nibabel as nib

    nib.save(
        nib.Nifti1Image(far, np.array([[-1, 0, 0, 9], [0, -1, 0, 9], [0, 0, 1, 9], [0, 0, 0, 1]])),
        tmp_path / "far.nii.gz",
    )
    detection = ctclip.load(clinic.model).detect(tmp_path / "far.nii.gz", hu="trust-file")
    assert any("far from the scans the model was trained on" in warning for warning in detection.warnings)
    loaded.hash = "other"
    assert usable_summary(loaded) is None
    assert "belongs to other weights" in capsys.readouterr().err


@pytest.mark.parametrize("splits", ["train", "train,test", "train,valid,calibration"])
def test_splits_that_the_cohort_lacks_are_refused(
    splits: str, clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", "data", "--model", str(clinic.model), "--store", str(clinic.store), "--splits", splits]
    assert main([*command, "--output", str(tmp_path / "audit")]) == 2
    assert f"--splits {splits}: give two splits of the cohort, which has: " in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()


def test_analysis_of_a_model(clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", "--model", str(clinic.model), "--store", str(clinic.store), "--split", "valid"]
    assert main([*command, "--output", str(tmp_path / "analysis")]) == 0
    facts = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["models"][0]
    assert facts["scans"] == 24
    assert facts["neighbours"]["Nodule"]["chance"] == pytest.approx(11 / 22, abs=0.06)
    assert len(facts["shift"]) == 11
    assert next(point["gap"] for point in facts["shift"] if point["share"] == 0) == pytest.approx(facts["modality_gap"])
    assert "page and numbers" in capsys.readouterr().out
    assert "Gap and accuracy" in (tmp_path / "analysis" / "analysis.html").read_text()


def test_pairs_are_scored_and_kept(clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["filter-pairs", "--model", str(clinic.model), "--store", str(clinic.store), "--keep"]
    try:
        assert main([*command, "--output", str(tmp_path / "pairs")]) == 0
        kept = pd.read_parquet(clinic.store / FILE)
        assert len(kept) == 56
    finally:
        (clinic.store / FILE).unlink(missing_ok=True)
    # The weights are random.
    assert "56 pairs, 0 of them" in (printed := capsys.readouterr().out)
    assert "does not distinguish their reports" in printed
    assert json.loads((tmp_path / "pairs" / "pairs.json").read_text())["informative"] is False
    assert main([*command[:-1], "--split", "valid", "--output", str(tmp_path / "few")]) == 2
    assert "50 are needed" in capsys.readouterr().err


def test_audits_of_the_clinic(clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(clinic.model), "--store", str(clinic.store)]
    assert main(["audit", "data", *common, "--output", str(tmp_path / "data")]) == 0
    assert "comparisons" in capsys.readouterr().out
    lines = pd.read_csv(tmp_path / "data" / "data_audit.csv")
    assert all(p.is_monotonic_increasing for _, p in lines.groupby("family")["p"])
    assert lines["family"].is_monotonic_decreasing
    assert main(["audit", "model", *common, "--output", str(tmp_path / "errors")]) == 0
    for name in ("errors.csv", "fairness.csv", "shortcuts.csv", "model_audit.html"):
        assert (tmp_path / "errors" / name).is_file()
    assert main(["audit", "doubles", *common, "--output", str(tmp_path / "doubles")]) == 0
    assert "among 80 volumes" in capsys.readouterr().out
    assert main(["audit", "data", *common, "--concepts", "nowhere", "--output", str(tmp_path / "other")]) == 2


def _as_given(arguments: list[str]) -> tuple[int, str]:
    return 0, " ".join(arguments)


def test_the_audits_get_the_options_that_they_have(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["ctclip.cli.audit_all"], "_outcome", _as_given)
    common = ["--model", str(clinic.model), "--store", str(clinic.store), "--batch", "3"]
    assert main(["audit", "all", *common, "--output", str(tmp_path / "all")]) == 0
    given = [line for line in capsys.readouterr().out.splitlines() if "--store" in line]
    assert len(given) == 5
    for line in given:
        alone = line.startswith("audit doubles")
        assert ("--batch 3" in line) is not alone
        assert (f"--model {clinic.model}" in line) is not alone


def test_all_audits_at_once_write_what_each_writes(
    clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a store without labels, where the errors of the model cannot be audited."""
    store = Path(shutil.copytree(clinic.store, tmp_path / "store"))
    table = pd.read_parquet(store / "cohort.parquet").drop(columns=["Nodule", "Effusion"])
    table.to_parquet(store / "cohort.parquet")
    (store / "labels.yaml").unlink()
    common = ["--model", str(clinic.model), "--store", str(store)]
    assert main(["audit", "all", *common, "--output", str(tmp_path / "all")]) == 3
    printed = capsys.readouterr().out
    assert "refused: audit model" in printed
    assert "has none of the labels" in printed
    assert "80 volumes" in printed
    assert main(["audit", "data", *common, "--output", str(tmp_path / "data")]) == 0
    assert main(["filter-pairs", *common, "--output", str(tmp_path / "pairs")]) == 0
    for name in ("data/data_audit.csv", "data/concepts.csv", "pairs/pairs.csv"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert (tmp_path / "all" / "analysis" / "analysis.html").is_file()
    assert (tmp_path / "all" / "doubles" / "doubles.html").is_file()
    assert not (tmp_path / "all" / "model" / "errors.csv").exists()
    assert main(["audit", "all", *common, "--output", str(tmp_path)]) == 2
    assert "is not empty and holds no output of `ctclip audit all`" in capsys.readouterr().err
