"""Every command and function that reads scan files takes the same options."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from ctclip.cli.embed import embed
from ctclip.cli.preprocess import preprocess
from ctclip.cli.zero_shot import zero_shot
from ctclip.inference.scans import ScanFiles
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.pipeline import Reading
from ctclip.preprocessing.store import VolumeStore
from tests.unit.preprocessing.scan_files import AFFINE, nifti, patched, written

SPEC = PreprocessingSpec("t", (2.0, 2.0, 2.0), (16, 16, 16))
# Noise around the values of air and of water.
HU = (np.random.default_rng(0).normal(0, 60, (24, 32, 40)) - 900 * (np.arange(40) < 20)).round().astype(np.int16)
SHARED = ("hu", "geometry", "expect", "series", "largest_gb")


@pytest.mark.parametrize("command", [preprocess, zero_shot, embed])
def test_commands_that_read_scans_share_their_options(command) -> None:
    named = signature(command).parameters
    assert [named[name].default for name in SHARED] == [signature(preprocess).parameters[n].default for n in SHARED]


def test_options_are_those_of_prepare() -> None:
    assert set(get_type_hints(Reading)) | {"path", "spec", "table"} == set(signature(prepare).parameters)


def contradicting(folder: Path) -> Path:
    """A NIfTI file whose sform states twice the slice thickness of its qform."""
    affine = AFFINE.copy()
    affine[:, 0] *= 2
    stretched = nifti(HU, affine)
    return written(folder, "scan.nii", patched(nifti(HU), srow=("12f", *np.frombuffer(stretched, "<f4", 12, 280))))


@pytest.mark.parametrize(
    "reading", [{"geometry": "sform"}, {"geometry": "qform"}, {"geometry": "qform", "hu": "trust-file"}]
)
def test_scan_files_and_stores_read_as_they_are_told(tmp_path: Path, reading: Reading) -> None:
    path = contradicting(tmp_path)
    told = prepare(path, SPEC, **reading).voxels
    other = prepare(path, SPEC, geometry="qform" if reading["geometry"] == "sform" else "sform").voxels
    assert np.abs(told - other).max() > 0.1
    assert np.array_equal(ScanFiles([path], SPEC, **reading).voxels(0)[0], told)
    preprocess_cohort(path, tmp_path / "store", SPEC, reading=reading, workers=1)
    store = VolumeStore(tmp_path / "store")
    assert np.abs(store.voxels(store.volumes[0]) - told).max() < 1e-3


def test_a_cohort_is_not_begun_with_an_option_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PreprocessingError, match=r"expect='Chest': give one of auto, chest, any"):
        preprocess_cohort(contradicting(tmp_path), tmp_path / "store", SPEC, reading={"expect": "Chest"})  # type: ignore[typeddict-item]
    assert not (tmp_path / "store").exists()


def test_another_way_of_reading_is_another_run(tmp_path: Path) -> None:
    path = contradicting(tmp_path)
    assert ScanFiles([path], SPEC, geometry="sform").origin() != ScanFiles([path], SPEC, geometry="qform").origin()


def test_the_limit_is_raised_as_the_refusal_says(tmp_path: Path) -> None:
    path = written(tmp_path, "scan.nii", nifti(HU))
    with pytest.raises(PreprocessingError, match=r"more than .* GB; --largest-gb raises the limit"):
        ScanFiles([path], SPEC, largest_gb=HU.nbytes / 2e9).voxels(0)
    assert np.isfinite(ScanFiles([path], SPEC, largest_gb=HU.nbytes / 0.5e9).voxels(0)[0]).all()
