"""Cohorts on disk, shards and their merge, the calibration split, whole runs, the quality page."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pydicom.fileset
import pytest
from PIL import Image

from ctclip.cli import main
from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.anatomy import find_lungs, no_chest
from ctclip.preprocessing.cohort_run import merge_shards, preprocess_cohort
from ctclip.preprocessing.cohorts import hold_out, identity, read_cohort
from ctclip.preprocessing.quality import GAP, LARGEST, WINDOWS, _picture, _slices, quality_page
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import Volume
from tests.unit.preprocessing.test_dicom import write_series

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return make_scan(1, 1, scale=8.0).reconstructions[0].hu


def test_rad_chestct_as_it_lies_on_disk(tmp_path: Path, hu: np.ndarray) -> None:
    root = tmp_path / "rad"
    (root / "npz").mkdir(parents=True)
    for name in ("trn00001", "val00001", "tst00009"):
        # Slices from head to feet; 0.8 mm isotropic.
        np.savez_compressed(root / "npz" / f"{name}.npz", ct=np.ascontiguousarray(hu[::-1]))
    labels = pd.DataFrame({"NoteAcc_DEID": ["trn00001", "val00001", "trn07777"], "nodule*right_upper": [0, 1, 0],
                           "nodule*lung": [0, 0, 1], "cardiomegaly*heart": [1, 0, 0]})  # fmt: skip
    labels.to_csv(root / "imgall_Abnormality_and_Location_Labels.csv", index=False)
    read = read_cohort(root)
    table, warnings = read.table, read.warnings
    assert "trn07777" in warnings[0]
    table = table.set_index("volume")
    assert table["split"].to_dict() == {"trn00001": "train", "val00001": "valid", "tst00009": "test"}
    assert table.loc["val00001", "nodule"] == 1
    assert table.loc["trn00001", "nodule"] == 0
    assert pd.isna(table.loc["tst00009", "nodule"])
    fine = PreprocessingSpec("fine", (0.8, 0.8, 0.8), hu.shape)
    assert np.abs(prepare(root / "npz" / "trn00001.npz", fine).hu - np.clip(hu, -1024, 3071)).max() < 0.01
    np.savez(root / "npz" / "other.npz", other=hu)
    with pytest.raises(PreprocessingError, match="no array 'ct'"):
        prepare(root / "npz" / "other.npz", fine)
    outcomes = preprocess_cohort(root, tmp_path / "store", SPEC, workers=1).outcomes
    assert sorted(bool(o.refused) for o in outcomes) == [False, False, False, True]


def test_shards_are_merged_without_reading_a_volume(cohort: Path, tmp_path: Path, monkeypatch) -> None:
    spec = PreprocessingSpec.load("phantom")
    store = tmp_path / "store"
    for shard in (1, 3):
        preprocess_cohort(cohort, store, spec, workers=1, shard=(shard, 3))
    with pytest.raises(PreprocessingError, match="shard 2/3 has not finished"):
        merge_shards(store)
    preprocess_cohort(cohort, store, spec, workers=1, shard=(2, 3))
    monkeypatch.setattr(VolumeStore, "read", lambda *_: pytest.fail("a volume was read"))
    monkeypatch.setattr("ctclip.preprocessing.cohort_run.prepare", lambda *_: pytest.fail("a scan was read"))
    merged = merge_shards(store)
    assert len(merged) == 24
    assert not list(store.glob("outcomes-*"))
    table = pd.read_csv(store / "outcomes.csv")
    assert set(table["outcome"]) == {"done"}
    assert table["source_spacing"].str.count(" x ").eq(2).all()
    again = preprocess_cohort(cohort, store, spec, workers=1).outcomes
    assert {o.volume: o.source_spacing for o in again} == {o.volume: o.source_spacing for o in merged}


def test_a_calibration_split_is_of_patients_and_of_training_alone(cohort: Path) -> None:
    table = read_cohort(cohort).table
    held = hold_out(table, 0.4)
    assert (held["split"] == "calibration").any()
    assert (held.groupby("patient")["split"].nunique() == 1).all()
    assert held.loc[table["split"] == "valid", "split"].eq("valid").all()
    assert held.equals(hold_out(table.iloc[::-1], 0.4).iloc[::-1])


def test_a_run_with_bad_scans_ends_with_the_rest_done(cohort: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "cohort"
    shutil.copytree(cohort, mine)
    paths = sorted(mine.rglob("*.nii.gz"))
    paths[2].write_bytes(paths[2].read_bytes()[:3000])
    paths[9].write_bytes(b"nothing of the sort")
    mask = nib.load(paths[17])
    nib.save(nib.Nifti1Image((mask.get_fdata() > 0).astype(np.int16), mask.affine), paths[17])
    command = ["preprocess", str(mine), "--output", str(tmp_path / "s"), "--spec", "phantom", "--workers", "2"]
    for _ in range(2):
        assert main(command) == 3
        said = capsys.readouterr().out
        assert "21 done, 3 refused" in said
        assert "a mask?" in said
        table = pd.read_csv(tmp_path / "s" / "outcomes.csv").set_index("volume")
        assert len(table) == 24
        refused = table[table["outcome"] == "refused"]
        assert set(refused.index) == {identity(paths[i]) for i in (2, 9, 17)}
        assert all(name in reason for name, reason in refused["reason"].items())
    assert len(VolumeStore(tmp_path / "s").volumes) == 21


def test_a_scan_that_kills_its_process_is_refused_alone(cohort: Path, tmp_path: Path, monkeypatch) -> None:
    from ctclip.preprocessing import cohort_run

    honest = cohort_run.prepare

    def deadly(path, *rest, **more):  # type: ignore[no-untyped-def]
        if Path(path).name.startswith("valid_1_"):
            os.kill(os.getpid(), signal.SIGKILL)
        if Path(path).name.startswith("valid_2_"):
            raise ZeroDivisionError("what a library says of PID-778899")
        return honest(path, *rest, **more)

    monkeypatch.setattr(cohort_run, "prepare", deadly)
    outcomes = {
        o.volume: o
        for o in preprocess_cohort(cohort, tmp_path / "s", PreprocessingSpec.load("phantom"), workers=2).outcomes
    }
    assert len(outcomes) == 24
    killed = {name for name, o in outcomes.items() if "killed the process" in (o.refused or "")}
    failed = {name for name, o in outcomes.items() if "ZeroDivisionError" in (o.refused or "")}
    assert killed == {name for name in outcomes if name.startswith("valid_1_")} != set()
    assert failed == {name for name in outcomes if name.startswith("valid_2_")} != set()
    assert not any("778899" in (o.refused or "") for o in outcomes.values())
    assert set(VolumeStore(tmp_path / "s").volumes) == set(outcomes) - killed - failed


def test_a_csv_of_paths(tmp_path: Path, hu: np.ndarray) -> None:
    _nifti(tmp_path, hu)
    table = tmp_path / "mine.csv"
    table.write_text(
        "volume,path,patient,split,rescale_slope,Lung nodule\n1,scan.nii.gz,07,train,,1\n2,scan.nii.gz,07,train,1,\n"
        "3,gone.nii.gz,,valid,1,0\n"
    )
    outcomes = preprocess_cohort(table, tmp_path / "s", SPEC, workers=1, calibration=0.5).outcomes
    assert {o.volume: bool(o.refused) for o in outcomes} == {"1": False, "2": False, "3": True}
    kept = VolumeStore(tmp_path / "s").cohort.set_index("volume")
    assert kept["patient"].to_dict() == {"1": "07", "2": "07", "3": "3"}
    assert kept["Lung nodule"].tolist() == [1, pd.NA, 0] or kept["Lung nodule"].isna().tolist() == [False, True, False]
    for wrong, said in (
        ("file\nscan.nii.gz\n", "column 'path' is missing"),
        ("path,rescale_slope\nscan.nii.gz,x\n", "not a number"),
        ("path\nscan.nii.gz\nscan.nii.gz\n", "listed twice"),
        ("path\n", "no rows"),
        ("", "cannot be read as CSV"),
    ):
        table.write_text(wrong)
        with pytest.raises(PreprocessingError, match=said):
            read_cohort(table)
    assert read_cohort(tmp_path / "scan.nii.gz").table["volume"].tolist() == ["scan"]
    with pytest.raises(
        PreprocessingError, match="no cohort layout 'mimic'; there are auto, ct_rate, folder, rad_chestct"
    ):
        read_cohort(tmp_path, "mimic")


def test_ct_rate_with_segmentations_and_a_second_version(cohort: Path, tmp_path: Path) -> None:
    """Volumes with the same names: TotalSegmentator's masks are in deeper folders, the second version in
    ``*_fixed``."""
    mine = tmp_path / "cohort"
    shutil.copytree(cohort, mine)
    first = sorted((mine / "dataset" / "train").rglob("*.nii.gz"))[0]
    inside = first.relative_to(mine / "dataset" / "train")
    for place in ("train_fixed", "ts_seg/ts_total/train_fixed"):
        (mine / "dataset" / place / inside).parent.mkdir(parents=True)
        (mine / "dataset" / place / inside).write_bytes(b"other")
    read = read_cohort(mine)
    assert read.files[identity(first)] == mine / "dataset" / "train_fixed" / inside
    assert len(read.table) == 24
    assert "2 files share their name" in read.warnings[0]


def test_a_cd_of_dicom_series_is_its_series(tmp_path: Path, hu: np.ndarray) -> None:
    """The directory record and other files at the top of a medium are not separate volumes."""
    write_series(tmp_path / "cd" / "DICOM" / "S1", hu[:8])
    write_series(tmp_path / "cd" / "DICOM" / "S2", hu[:9])
    files = pydicom.fileset.FileSet()
    for path in sorted((tmp_path / "cd" / "DICOM").rglob("IM*")):
        files.add(path)
    files.write(tmp_path / "medium")
    shutil.copy(tmp_path / "medium" / "DICOMDIR", tmp_path / "cd" / "DICOMDIR")
    for name in ("AUTORUN.INF", "README", "VIEWER.EXE", "DICOM/S1/A_README"):
        (tmp_path / "cd" / name).write_text("not a slice")
    assert sorted(read_cohort(tmp_path / "cd").table["path"]) == ["DICOM/S1", "DICOM/S2"]
    _nifti(tmp_path / "cd" / "DICOM" / "S1", hu)
    assert sorted(read_cohort(tmp_path / "cd").table["path"]) == ["DICOM/S1", "DICOM/S1/scan.nii.gz", "DICOM/S2"]


@pytest.mark.parametrize("most", [12_000, 60_000])
def test_slices_are_as_large_as_the_page_allows(most: int) -> None:
    """For a noisy volume, which compresses badly."""
    noise = np.random.default_rng(0).normal(-400, 300, (40, 64, 64)).astype(np.int16)
    data = base64.b64decode(_picture(noise, (5.0, 3.0, 3.0), WINDOWS, most, None))
    assert len(data) <= most
    assert len(data) > 0.5 * most


def test_the_quality_page_shows_every_volume_and_every_refusal(tmp_path: Path, hu: np.ndarray) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    _nifti(scans, hu)
    (scans / "broken.nii").write_bytes(b"nothing")
    preprocess_cohort(scans, tmp_path / "store", PreprocessingSpec.load("phantom"), workers=1)
    quality_page(VolumeStore(tmp_path / "store"), tmp_path / "q.html")
    page = (tmp_path / "q.html").read_text()
    pictures = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    assert len(pictures) == 1
    # Two windows, three planes each; the letters are white on black strokes.
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("L"))
    assert picture.shape == (2 * LARGEST + GAP, 3 * LARGEST + 2 * GAP)
    for row in range(2):
        for left in (0, 1, 2):
            middle, edge = row * (LARGEST + GAP) + LARGEST // 2, left * (LARGEST + GAP)
            letter = picture[middle - 18 : middle + 18, edge : edge + 35]
            assert letter.max() > 220
            assert letter.min() < 40
    assert "lung window (-1350 to 150 HU)" in page
    assert "broken" in page
    assert "cut short" in page
    assert "5.00 x 4.00 x 4.00" in page


def test_slices_go_through_a_place_and_its_ticks_point_there() -> None:
    """One bright voxel is between the ticks of all three planes; slices through the middle do not show it."""
    hu = np.full((20, 24, 28), -1000, np.int16)
    hu[4, 6, 5] = 100
    at = np.asarray(_slices(hu, (3.0, 1.0, 1.0), {"lung": (-1000.0, 100.0)}, 280, (4, 6, 5)))
    # Pixels per voxel: in a slice of 28 x 24 columns and rows 10 per voxel; in 20 slices of 3 mm, 280 / 60 per mm.
    mm = 280 / 60
    axial = (20 + 6.5 * 10, 5.5 * 10)
    coronal = (15.5 * 3 * mm, 280 + GAP + (280 - 28 * mm) / 2 + 5.5 * mm)
    sagittal = (15.5 * 3 * mm, 2 * (280 + GAP) + (280 - 24 * mm) / 2 + 6.5 * mm)
    for row, column in (axial, coronal, sagittal):
        assert at[round(row), round(column)] > 150
        for step in (-1, 1):
            # White in the middle of a tick, against black strokes or air.
            assert at[round(row) + step * 27, round(column) - 1 : round(column) + 2].max() == 255
            assert at[round(row) - 1 : round(row) + 2, round(column) + step * 27].max() == 255
    middle = np.asarray(_slices(hu, (3.0, 1.0, 1.0), {"lung": (-1000.0, 100.0)}, 280))
    assert middle[round(axial[0]), round(axial[1])] == 0


def test_the_quality_page_names_what_its_slices_go_through(tmp_path: Path, hu: np.ndarray) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    _nifti(scans, hu)
    preprocess_cohort(scans, tmp_path / "store", PreprocessingSpec.load("phantom"), workers=1)
    store = VolumeStore(tmp_path / "store")
    quality_page(store, tmp_path / "q.html")
    assert "Each axial and coronal slice through the middle" in (tmp_path / "q.html").read_text()
    quality_page(store, tmp_path / "q.html", place_of=lambda volume: ("Lung nodule", (4, 6, 5)))
    page = (tmp_path / "q.html").read_text()
    assert "Slices through: Lung nodule" in page
    assert "axial, coronal and sagittal slice through lung nodule" in page


def test_what_is_no_chest_is_told(shared: Path) -> None:
    phantom = make_scan(1, 1, scale=8.0).reconstructions[0]
    volume = Volume(phantom.hu, np.diag([*phantom.acquisition.grid.spacing, 1.0]), "phantom")
    assert no_chest(find_lungs(volume)) is None
    folder, spec = shared / "ct" / "dicom", PreprocessingSpec.load("ct_224")
    for name in ("dcm_qa_ct/gantry_tilt_ge", "dcm_qa_ct/philips_28x5mm", "ts_abd_contrast_siemens_20"):
        with pytest.raises(PreprocessingError, match="not a chest"):
            prepare(folder / name, spec, expect="chest")
    for path in (folder / "lungdx_A0002_siemens_B40f_8mm_30", *(shared / "ct" / "nifti").glob("ts_chestCTA*.nii.gz")):
        prepare(path, spec, expect="chest")


def _nifti(folder: Path, hu: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0])), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"
