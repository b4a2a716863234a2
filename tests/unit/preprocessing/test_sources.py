"""A stored volume is kept only if it comes from the scan that the cohort lists under its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingSpec, prepare
from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.store import VolumeStore
from tests.unit.preprocessing.test_dicom import write_series

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))
WARNING = "(first: a) come from other files, table entries or options"


@pytest.fixture(scope="module")
def scans() -> list[np.ndarray]:
    return [make_scan(seed, 1, scale=8.0).reconstructions[0].hu for seed in (1, 2)]


def cohort(folder: Path, arrays: list[np.ndarray], suffix: str, **columns: list[float]) -> Path:
    """Volumes a, b ... as files of the same size."""
    folder.mkdir()
    names = [chr(ord("a") + number) for number in range(len(arrays))]
    for name, array in zip(names, arrays, strict=True):
        nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0])), folder / f"{name}{suffix}")
    table = pd.DataFrame({"volume": names, "path": [f"{name}{suffix}" for name in names], **columns})
    table.to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_another_cohort_of_the_same_names_is_read(tmp_path: Path, scans, suffix: str, capsys) -> None:
    first = cohort(tmp_path / "one", scans, suffix)
    second = cohort(tmp_path / "two", [scans[1], scans[1]], suffix)
    store = VolumeStore.create(tmp_path / "store", SPEC)
    preprocess_cohort(first, store.path, SPEC, workers=1)
    moved = shutil.copytree(first.parent, tmp_path / "moved")
    before = (store.path / "volumes" / "b.b2nd").stat().st_mtime_ns
    preprocess_cohort(moved / "cohort.csv", store.path, SPEC, workers=1)
    assert "come from other files" not in capsys.readouterr().out
    preprocess_cohort(second, store.path, SPEC, workers=1)
    assert f"1 stored volumes {WARNING}" in capsys.readouterr().out
    for name in "ab":
        assert np.array_equal(store.read(name), prepare(second.parent / f"{name}{suffix}", SPEC).stored)
    assert (store.path / "volumes" / "b.b2nd").stat().st_mtime_ns == before, "what is the same is kept"


def test_a_corrected_table_and_other_options_are_heeded(tmp_path: Path, scans, capsys) -> None:
    (path,) = {cohort(tmp_path / "one", scans[:1], ".nii", rescale_slope=[1.0], rescale_intercept=[0.0])}
    preprocess_cohort(path, tmp_path / "store", SPEC, workers=1)
    table = pd.read_csv(path)
    table.assign(rescale_intercept=[-40.0]).to_csv(path, index=False)
    for expected in (True, False):
        report = preprocess_cohort(path, tmp_path / "store", SPEC, workers=1, reading={"hu": "trust-file"})
        assert (WARNING in capsys.readouterr().out) == expected
        assert [outcome.word for outcome in report.outcomes] == ["done"]


def test_what_was_deleted_after_it_was_stored_is_kept(tmp_path: Path, scans, capsys) -> None:
    folder = tmp_path / "series"
    for name in "ab":
        write_series(folder / name, scans[0][:8])
    preprocess_cohort(folder, tmp_path / "store", SPEC, workers=1)
    outcomes = (tmp_path / "store" / "outcomes.csv").read_bytes()
    capsys.readouterr()
    preprocess_cohort(folder, tmp_path / "store", SPEC, workers=1)
    assert "come from other files" not in capsys.readouterr().out
    assert (tmp_path / "store" / "outcomes.csv").read_bytes() == outcomes
    (min((folder / "a").iterdir())).unlink()
    preprocess_cohort(folder, tmp_path / "store", SPEC, workers=1)
    assert "1 stored volumes" in capsys.readouterr().out
