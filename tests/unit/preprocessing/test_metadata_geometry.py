"""Geometry and rescaling from a metadata table: voxels and positions compared with a scan with a good header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import Prepared, PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.cohorts import Cohort, read_cohort
from ctclip.preprocessing.facts import table_facts
from tests.unit.preprocessing.scan_files import zipped

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (60, 70, 90))
STEP, PLACE = (4.0, 4.0, 5.0), (-120.0, -90.0, -300.0)
# The header that the table describes, in RAS+ as NIfTI has it.
GOOD = np.array([[-4.0, 0, 0, 120.0], [0, -4.0, 0, 90.0], [0, 0, 5.0, -300.0], [0, 0, 0, 1]])
TABLE = {
    "RescaleSlope": 1, "RescaleIntercept": -1024, "XYSpacing": "[4.0, 4.0]", "ZSpacing": "5.0",
    "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]", "ImagePositionPatient": "[-120.0, -90.0, -300.0]",
}  # fmt: skip


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    """A chest with one dense marker at the patient's right, anterior, superior: after mirroring or rotation, its
    position differs."""
    made = make_scan(1, 1, scale=8.0).reconstructions[0].hu.copy()
    made[-12:-9, 20:22, 14:16] = 2500
    return made


def scaled(**axes: float) -> np.ndarray:
    return GOOD @ np.diag([axes.get("x", 1.0), axes.get("y", 1.0), axes.get("z", 1.0), 1.0])


def codes_zero(array: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    return image


@dataclass
class Row:
    """``header``: affine in RAS+, or a function that makes the image from [i, j, k] values. ``table``: differences from
    ``TABLE``; None removes a column. ``said`` is in a warning or, with ``refused``, in the refusal."""

    header: np.ndarray | Callable[[np.ndarray], nib.Nifti1Image]
    table: dict[str, Any] = field(default_factory=dict)
    offset: float = 0.0
    said: str = ""
    refused: bool = False
    kind: type = np.int16
    turned: Callable[[np.ndarray], np.ndarray] = lambda array: array


TAKEN = "geometry taken from the metadata table"
ROWS = {
    "identity and +8192": Row(np.eye(4), {"RescaleIntercept": -8192}, 8192, TAKEN, kind=np.float32),
    "identity and +1024": Row(np.eye(4), {}, 1024, TAKEN),
    "identity, in HU already": Row(np.eye(4), {}, 0, TAKEN),
    "both codes 0": Row(codes_zero, {}, 1024, TAKEN),
    "spacing alone, turned round, origin 0": Row(np.diag([4.0, 4.0, 5.0, 1.0]), {}, 0, TAKEN),
    "slices 2 % too thick": Row(scaled(z=1.02), {}, 0, TAKEN),
    "slices 0.5 % too thick": Row(scaled(z=1.005)),
    "the fixed release": Row(GOOD),
    "the fixed release, raw values": Row(GOOD, {}, 1024, "slope and intercept of the metadata table applied"),
    "strings in lists": Row(np.eye(4), {"XYSpacing": "['4.0', '4.0']", "ZSpacing": "['5']"}, 0, TAKEN),
    "DICOM's backslashes": Row(np.eye(4), {"XYSpacing": "4\\4", "ImageOrientationPatient": "1\\0\\0\\0\\1\\0"}, 0, TAKEN),
    "tuples": Row(np.eye(4), {"ImagePositionPatient": "(-120, -90, -300)", "XYSpacing": "(4; 4)"}, 0, TAKEN),
    "strings of numpy": Row(
        np.eye(4), {"ImageOrientationPatient": "[ 1.  0.  0.\n 0.  1. -0.]", "ImagePositionPatient": "[-120. -90. -300.]"}, 0, TAKEN
    ),
    "numbers of numpy, as Python writes them": Row(
        np.eye(4),
        {
            "XYSpacing": "array([4., 4.], dtype=float32)",
            "ZSpacing": "np.float64(5.0)",
            "ImageOrientationPatient": "[" + ", ".join(f"np.float64({n})" for n in (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) + "]",
            "RescaleSlope": "np.float64(1.0)",
        },
        0,
        TAKEN,
    ),
    "with units": Row(np.eye(4), {"XYSpacing": "4.0 mm x 4.0 mm", "ZSpacing": "5 mm"}, 0, TAKEN),
    "the header's origin is 0": Row(
        np.array([[-4.0, 0, 0, 0], [0, -4.0, 0, 0], [0, 0, 5.0, 0], [0, 0, 0, 1]]), {}, 0, "no position was ever stated"
    ),
    "directions of length 2": Row(
        np.eye(4), {"ImageOrientationPatient": "[2, 0, 0, 0, 2, 0]"}, said="no usable ImageOrientationPatient", refused=True
    ),
    "directions at no right angle": Row(
        np.eye(4), {"ImageOrientationPatient": "[1, 0, 0, 0.3, 0.95, 0]"}, said="no usable ImageOrientationPatient", refused=True
    ),
    "directions rounded": Row(np.eye(4), {"ImageOrientationPatient": "[0.999, 0, 0, 0, 1.002, 0]"}, 0, TAKEN),
    "one number for both": Row(np.eye(4), {"XYSpacing": 4.0, "ZSpacing": 5}, 0, TAKEN),
    "read from behind": Row(
        np.eye(4), {"ImageOrientationPatient": "[-1, 0, 0, 0, -1, 0]", "ImagePositionPatient": None}, said="no usable ImagePosition", refused=True
    ),
    "lies on its front": Row(
        np.eye(4),
        {
            "ImageOrientationPatient": "[-1.0, 0.0, 0.0, 0.0, -1.0, 0.0]",
            "ImagePositionPatient": "[132.0, 162.0, -300.0]",
        },
        0,
        TAKEN,
        turned=lambda array: array[::-1, ::-1],
    ),
    "no spacing in the table": Row(np.eye(4), {"XYSpacing": None}, said="no usable XYSpacing or ZSpacing", refused=True),
    "no spacing in the table, a good header": Row(GOOD, {"XYSpacing": None}),
    "no orientation in the table": Row(
        np.eye(4), {"ImageOrientationPatient": None}, said="no usable ImageOrientationPatient", refused=True
    ),
    "no geometry in the table": Row(
        np.eye(4), dict.fromkeys(["XYSpacing", "ZSpacing", "ImageOrientationPatient", "ImagePositionPatient"]),
        said="identity", refused=True,
    ),
    "spacing in the table, a good header": Row(GOOD, {"ImageOrientationPatient": None, "ImagePositionPatient": None}),
    "spacing in the table, another in the header": Row(
        scaled(z=1.25), {"ImageOrientationPatient": None, "ImagePositionPatient": None}, 0, TAKEN
    ),
    "slice distance of nan": Row(GOOD, {"ZSpacing": "nan"}, said="no ZSpacing", refused=True),
    "every voxel 0": Row(np.eye(4), {}, said="every voxel is 0", refused=True, turned=np.zeros_like),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_table_or_the_header_whichever_is_right(tmp_path: Path, hu: np.ndarray, name: str) -> None:
    row = ROWS[name]
    truth = prepare(save(tmp_path / "truth.nii", hu.transpose(2, 1, 0), GOOD), SPEC)
    values = (row.turned(hu.transpose(2, 1, 0)) + (row.offset if name != "every voxel 0" else 0)).astype(row.kind)
    cohort = ct_rate(tmp_path / "cohort", {"train_1_a_1": (values, row.header)}, {"train_1_a_1": TABLE | row.table})
    if row.refused:
        with pytest.raises(PreprocessingError, match=row.said) as refusal:
            prepared(cohort)
        assert "train_1_a_1" in str(refusal.value)
        return
    ready = prepared(cohort)
    loose = name == "slices 0.5 % too thick"
    if not loose:
        assert np.abs(ready.hu - truth.hu).max() < 0.01
        centred = "ImagePositionPatient" in row.table and row.table["ImagePositionPatient"] is None
        assert np.allclose(ready.affine[:3, : 3 if centred else 4], truth.affine[:3, : 3 if centred else 4], atol=1e-3)
    assert (row.said in "; ".join(ready.warnings)) if row.said else not any(TAKEN in w for w in ready.warnings)


def prepared(cohort: Cohort) -> Prepared:
    """The one volume of a cohort, as a run prepares it."""
    row = cohort.table.iloc[0]
    if row["volume"] in cohort.refused:
        raise PreprocessingError(cohort.refused[row["volume"]])
    return prepare(cohort.files[row["volume"]], SPEC, table=table_facts(row))


def test_a_file_of_the_fixed_release_that_was_reoriented_keeps_its_header(tmp_path: Path, hu: np.ndarray) -> None:
    """By nibabel: the same box in the patient along other axes. The table describes the original axes."""
    truth = prepare(save(tmp_path / "truth.nii", hu.transpose(2, 1, 0), GOOD), SPEC)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), GOOD)
    for turned in (nib.as_closest_canonical(image), image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))):
        cohort = ct_rate(
            tmp_path / "c", {"train_1_a_1": (np.asarray(turned.dataobj), turned.affine)}, {"train_1_a_1": TABLE}
        )
        ready = prepared(cohort)
        assert np.abs(ready.hu - truth.hu).max() < 0.01
        assert np.allclose(ready.affine, truth.affine, atol=1e-3)
        assert not any(TAKEN in warning for warning in ready.warnings)


def test_both_releases_in_one_folder_and_itk_agrees_with_the_repair(tmp_path: Path, hu: np.ndarray) -> None:
    """The repair as CT-RATE does it, by SimpleITK: set spacing, origin and direction, apply slope and intercept."""
    scans = {
        "train_1_a_1": ((hu.transpose(2, 1, 0) + 8192).astype(np.float32), np.eye(4)),
        "train_2_a_1": (hu.transpose(2, 1, 0), GOOD),
    }
    first = TABLE | {"RescaleIntercept": -8192}
    cohort = ct_rate(tmp_path / "c", scans, {"train_1_a_1": first, "train_2_a_1": TABLE})
    one, two = (
        prepare(cohort.files[row["volume"]], SPEC, table=table_facts(row)) for row in cohort.table.to_dict("records")
    )
    assert np.abs(one.hu - two.hu).max() < 0.01
    repaired = sitk.ReadImage(str(cohort.files["train_1_a_1"])) - 8192
    repaired.SetSpacing(STEP)
    repaired.SetOrigin(PLACE)
    repaired.SetDirection(np.eye(3).ravel().tolist())
    index = np.unravel_index(one.hu.argmax(), one.hu.shape)
    place = (one.affine @ [*index, 1])[:3]
    assert repaired.GetPixel(*repaired.TransformPhysicalPointToIndex(place.tolist())) == 2500


def test_geometry_in_a_table_of_paths_for_a_blank_metaimage(tmp_path: Path, hu: np.ndarray) -> None:
    """ITK's arrays have the reverse axis order of NIfTI's: the axes of the table are those of the file."""
    truth = prepare(save(tmp_path / "truth.nii", hu.transpose(2, 1, 0), GOOD), SPEC)
    image = sitk.GetImageFromArray(hu)
    sitk.WriteImage(image, tmp_path / "scan.mha")
    pd.DataFrame([{"path": "scan.mha"} | TABLE | {"RescaleSlope": None, "RescaleIntercept": None}]).to_parquet(
        tmp_path / "list.parquet"
    )
    cohort = read_cohort(tmp_path / "list.parquet")
    ready = prepare(cohort.files["scan"], SPEC, table=table_facts(cohort.table.iloc[0]))
    assert np.abs(ready.hu - truth.hu).max() < 0.01
    assert np.allclose(ready.affine, truth.affine, atol=1e-3)


@pytest.mark.parametrize("name", ["scan", "scan.dat", "scan.zip", "scan.hdr"])
def test_the_table_speaks_of_a_file_whatever_it_is_called(tmp_path: Path, hu: np.ndarray, name: str) -> None:
    truth = prepare(save(tmp_path / "truth.nii", hu.transpose(2, 1, 0), GOOD), SPEC)
    blank = nib.Nifti1Image(hu.transpose(2, 1, 0), np.eye(4))
    if name.endswith(".hdr"):
        nib.save(nib.Nifti1Pair(hu.transpose(2, 1, 0), np.eye(4)), tmp_path / "scan.img")
    elif name.endswith(".zip"):
        (tmp_path / name).write_bytes(zipped({"x.nii": blank.to_bytes()}))
    else:
        (tmp_path / name).write_bytes(blank.to_bytes())
    pd.DataFrame([{"path": name} | TABLE | {"RescaleSlope": 1, "RescaleIntercept": 0}]).to_csv(
        tmp_path / "list.csv", index=False
    )
    cohort = read_cohort(tmp_path / "list.csv")
    ready = prepare(next(iter(cohort.files.values())), SPEC, table=table_facts(cohort.table.iloc[0]))
    assert np.abs(ready.hu - truth.hu).max() < 0.01
    assert np.allclose(ready.affine, truth.affine, atol=1e-3)


LISTS = {
    "name": "train_2_a_1\n",
    "file name": "train_2_a_1.nii.gz\n",
    "path": "dataset/train/train_2/train_2_a/train_2_a_1.nii.gz\r\n",
    "byte order mark and blanks": "\ufeff  train_2_a_1.nii.gz  \n\n",
    "quoted list": "['train_2_a_1.nii.gz', 'train_999_a_1.nii.gz']",
}


@pytest.mark.parametrize("form", LISTS)
def test_volumes_listed_as_no_chest_are_left_out(tmp_path: Path, hu: np.ndarray, form: str) -> None:
    scans = {name: (hu.transpose(2, 1, 0), GOOD) for name in ("train_1_a_1", "train_2_a_1")}
    root = tmp_path / "c"
    ct_rate(root, scans, dict.fromkeys(scans, TABLE))
    (root / "metadata" / "no_chest_train.txt").write_text(LISTS[form], encoding="utf-8")
    (root / "metadata" / "no_chest_valid.txt").write_text("")
    report = preprocess_cohort(root, tmp_path / "s", SPEC, workers=1)
    assert {o.volume: o.word for o in report.outcomes} == {"train_1_a_1": "done", "train_2_a_1": "left out"}
    told = pd.read_csv(tmp_path / "s" / "outcomes.csv").set_index("volume")
    assert "no_chest_train.txt" in told.at["train_2_a_1", "reason"]
    assert pd.read_parquet(tmp_path / "s" / "cohort.parquet")["volume"].tolist() == ["train_1_a_1"]
    kept = read_cohort(root, keep_no_chest=True).table.set_index("volume")["no_chest"]
    assert kept.to_dict() == {"train_1_a_1": False, "train_2_a_1": True}


@pytest.mark.parametrize("column", ["report", "Radiology Report", "Findings", "Impressions_EN", "text"])
def test_a_column_that_is_probably_a_report_is_not_ignored_in_silence(column: str, tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz", np.zeros((4, 4, 4), np.int16), np.eye(4))
    rows = [{"path": f"{name}.nii.gz", column: f"Patient {name} has an effusion.", "site": name} for name in "ab"]
    pd.DataFrame(rows).to_csv(tmp_path / "c.csv", index=False)
    cohort = read_cohort(tmp_path / "c.csv")
    assert cohort.warnings == [
        f"the column {column!r} is kept, but not read as a report; name it 'findings', or 'impression', if it is one"
    ]
    assert "site" in " ".join(cohort.notes)
    assert "effusion" not in " ".join(cohort.notes)
    pd.DataFrame(rows).rename(columns={column: "findings"}).to_csv(tmp_path / "c.csv", index=False)
    assert read_cohort(tmp_path / "c.csv").warnings == []


def test_no_chest_is_an_option_of_ct_rate_alone(tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").touch()
    with pytest.raises(PreprocessingError, match=r"only to the layout ct-rate.* of this cohort is folder"):
        read_cohort(tmp_path, keep_no_chest=True)
    with pytest.raises(PreprocessingError, match=r"only to the layout ct-rate.* of this cohort is os:listdir"):
        read_cohort(tmp_path, "os:listdir", keep_no_chest=True)


def test_reports_of_volumes_nobody_has_are_a_matter_of_partial(tmp_path: Path, hu: np.ndarray) -> None:
    scans = {"train_1_a_1": (hu.transpose(2, 1, 0), GOOD)}
    cohort = ct_rate(tmp_path / "c", scans, {"train_1_a_1": TABLE, "train_7_a_1": TABLE, "train_8_a_1": TABLE})
    assert cohort.unmatched == ["2 of the reports have no volume on disk (the first: train_7_a_1)"]
    with pytest.raises(PreprocessingError, match="--partial"):
        preprocess_cohort(tmp_path / "c", tmp_path / "s", SPEC, workers=1)
    assert [
        o.word for o in preprocess_cohort(tmp_path / "c", tmp_path / "s", SPEC, workers=1, partial=True).outcomes
    ] == ["done"]


def save(path: Path, values: np.ndarray, header: np.ndarray | Callable[[np.ndarray], nib.Nifti1Image]) -> Path:
    nib.save(header(values) if callable(header) else nib.Nifti1Image(values, header), path)
    return path


def ct_rate(root: Path, scans: dict[str, tuple[np.ndarray, Any]], table: dict[str, dict[str, Any]]):  # type: ignore[no-untyped-def]
    """A folder like CT-RATE's: volumes by patient and scan, their reports and the metadata of ``table``."""
    for name, (values, header) in scans.items():
        patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
        folder = root / "train" / patient / scan
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / f"{name}.nii.gz", values, header)
    (root / "metadata").mkdir(exist_ok=True)
    rows = [
        {"VolumeName": f"{name}.nii.gz"} | {k: v for k, v in row.items() if v is not None}
        for name, row in table.items()
    ]
    pd.DataFrame(rows).to_csv(root / "metadata" / "train_metadata.csv", index=False)
    sections = ("ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
    reports = [{"VolumeName": f"{name}.nii.gz", **dict.fromkeys(sections, "Normal.")} for name in table]
    pd.DataFrame(reports).to_csv(root / "train_reports.csv", index=False)
    return read_cohort(root)
