"""RAD-ChestCT, shards and their merge, the calibration split, DICOM with identifiers, the quality page."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pydicom.fileset
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ctclip.cli import main
from ctclip.phantom.scan import make_scan
from preprocessing import PreprocessingError, PreprocessingSpec, prepare
from preprocessing.cohorts import hold_out, read_cohort
from preprocessing.hounsfield import check_chest
from preprocessing.pipeline import merge_shards, preprocess_cohort
from preprocessing.quality import quality_page
from preprocessing.store import VolumeStore
from preprocessing.volume import Volume

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))
IDENTIFIERS = ("Zebrowski^Ottilie", "PID-778899", "19410217", "St Elsewhere Hospital", "ACC-424242", "Dr^Frankenstein")


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return make_scan(1, 1, scale=8.0).reconstructions[0].hu


def write_series(folder: Path, hu: np.ndarray, *, spacing: float = 5.0, skip: tuple[int, ...] = ()) -> Path:
    """HU [slice, row, column] as DICOM slices of a patient with a name, shuffled file names without an extension."""
    folder.mkdir(parents=True, exist_ok=True)
    series, study = generate_uid(), generate_uid()
    for index, plane in enumerate(hu):
        if index in skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        name = folder / f"IM{(index * 7919) % 1000:04d}_{index}"
        data = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = series, study, "CT"
        data.PatientName, data.PatientID, data.PatientBirthDate = IDENTIFIERS[:3]
        data.InstitutionName, data.AccessionNumber, data.ReferringPhysicianName = IDENTIFIERS[3:]
        data.StudyDate, data.StudyTime, data.StudyID = "20200101", "120000", "1"
        data.SeriesNumber, data.InstanceNumber = 1, index + 1
        data.SeriesDescription = f"chest of {IDENTIFIERS[0]}"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns = plane.shape
        data.PixelSpacing, data.SliceThickness = [4.0, 4.0], spacing
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, index * spacing]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = (plane.astype(np.int16) + 1024).astype(np.int16).tobytes()
        data.save_as(name, enforce_file_format=True)
    return folder


def test_a_dicom_series_is_the_volume_it_was_made_of_by_folder_dicomdir_and_zip(tmp_path: Path, hu: np.ndarray) -> None:
    folder = write_series(tmp_path / "series", hu)
    expected = prepare(_nifti(tmp_path, hu), SPEC).voxels
    assert np.allclose(prepare(folder, SPEC).voxels, expected, atol=1e-5)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    assert np.allclose(prepare(tmp_path / "zipped.zip", SPEC).voxels, expected, atol=1e-5)
    files = pydicom.fileset.FileSet()
    for path in sorted(folder.iterdir()):
        files.add(path)
    files.write(tmp_path / "medium")
    assert np.allclose(prepare(tmp_path / "medium" / "DICOMDIR", SPEC).voxels, expected, atol=1e-5)
    assert np.allclose(prepare(next(folder.iterdir()), SPEC).voxels, expected, atol=1e-5)


def test_missing_slices_and_the_choice_of_a_series(tmp_path: Path, hu: np.ndarray) -> None:
    with pytest.raises(PreprocessingError, match="slices are missing"):
        prepare(write_series(tmp_path / "gap", hu, skip=(5, 6, 7)), SPEC)
    both = write_series(tmp_path / "both", hu)
    write_series(tmp_path / "both" / "short", hu[:6])
    assert any("2 series" in warning for warning in prepare(both, SPEC).warnings)
    uids = {
        str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID) for path in (both / "short").iterdir()
    }
    chosen = prepare(both, SPEC, series=uids.pop())
    assert chosen.source_shape[0] == 6


def test_no_identifier_of_a_dicom_header_reaches_any_output(tmp_path: Path, hu: np.ndarray, capsys) -> None:
    scans = tmp_path / "scans"
    write_series(scans / "a", hu)
    write_series(scans / "b", hu, skip=(5, 6, 7))
    write_series(scans / "c", np.full((6, 20, 20), 40))
    table = tmp_path / "cohort.csv"
    pd.DataFrame({"volume": ["a", "b", "c"], "path": ["scans/a", "scans/b", "scans/c"]}).to_csv(table, index=False)
    with pytest.raises(SystemExit) as ended:
        main(["preprocess", str(table), "--output", str(tmp_path / "store"), "--spec", "phantom", "--workers", "1"])
    assert ended.value.code == 3
    with pytest.raises(SystemExit):
        main(["quality", str(tmp_path / "store")])
    for name in ("b", "c"):
        with pytest.raises(SystemExit):
            main(["--debug", "preprocess", str(scans / name), "--output", str(tmp_path / "none")])
    said = capsys.readouterr()
    written = [said.out.encode(), said.err.encode()]
    written += [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(written) > 5
    for content in written:
        for identifier in IDENTIFIERS:
            assert identifier.encode() not in content


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
    outcomes = preprocess_cohort(root, tmp_path / "store", SPEC, workers=1)
    assert sorted(bool(o.refused) for o in outcomes) == [False, False, False, True]


def test_shards_are_merged_without_reading_a_volume(cohort: Path, tmp_path: Path, monkeypatch) -> None:
    spec = PreprocessingSpec.load("phantom")
    store = tmp_path / "store"
    for shard in (1, 3):
        preprocess_cohort(cohort, store, spec, workers=1, shard=(shard, 3))
    with pytest.raises(PreprocessingError, match="shard 2/3 has not ended"):
        merge_shards(store)
    preprocess_cohort(cohort, store, spec, workers=1, shard=(2, 3))
    monkeypatch.setattr(VolumeStore, "read", lambda *_: pytest.fail("a volume was read"))
    monkeypatch.setattr("preprocessing.pipeline.prepare", lambda *_: pytest.fail("a scan was read"))
    merged = merge_shards(store)
    assert len(merged) == 24
    table = pd.read_csv(store / "outcomes.csv")
    assert set(table["outcome"]) == {"done"}
    assert table["source_spacing"].str.count(" x ").eq(2).all()
    again = preprocess_cohort(cohort, store, spec, workers=1)
    assert {o.volume: o.source_spacing for o in again} == {o.volume: o.source_spacing for o in merged}


def test_a_calibration_split_is_of_patients_and_of_training_alone(cohort: Path) -> None:
    table = read_cohort(cohort).table
    held = hold_out(table, 0.4)
    assert (held["split"] == "calibration").any()
    assert (held.groupby("patient")["split"].nunique() == 1).all()
    assert held.loc[table["split"] == "valid", "split"].eq("valid").all()
    assert held.equals(hold_out(table.iloc[::-1], 0.4).iloc[::-1])


def test_the_quality_page_shows_every_volume_and_every_refusal(tmp_path: Path, hu: np.ndarray) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    _nifti(scans, hu)
    (scans / "broken.nii").write_bytes(b"nothing")
    preprocess_cohort(scans, tmp_path / "store", PreprocessingSpec.load("phantom"), workers=1)
    quality_page(VolumeStore(tmp_path / "store"), tmp_path / "q.html")
    page = (tmp_path / "q.html").read_text()
    assert page.count("data:image/jpeg") == 1
    assert "broken" in page
    assert "not a NIfTI file" in page
    assert "5.00 x 4.00 x 4.00" in page


def test_what_is_no_chest_is_told(shared: Path) -> None:
    phantom = make_scan(1, 1, scale=8.0).reconstructions[0]
    assert check_chest(Volume(phantom.hu, np.diag([*phantom.acquisition.grid.spacing, 1.0]), "phantom")) is None
    folder = shared / "ct" / "dicom"
    for name in ("dcm_qa_ct/gantry_tilt_ge", "dcm_qa_ct/philips_28x5mm", "ts_abd_contrast_siemens_20"):
        with pytest.raises(PreprocessingError, match="not a chest"):
            prepare(folder / name, SPEC, expect="chest")
    for path in (folder / "lungdx_A0002_siemens_B40f_8mm_30", *(shared / "ct" / "nifti").glob("ts_chestCTA*.nii.gz")):
        prepare(path, SPEC, expect="chest")


def _nifti(folder: Path, hu: np.ndarray) -> Path:
    import nibabel as nib

    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0])), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"
