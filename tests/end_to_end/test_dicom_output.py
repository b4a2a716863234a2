"""`ctclip explain --dicom`: the objects for a PACS, read back with pydicom, highdicom and dcmtk."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

import ctclip
from ctclip.cli import main
from ctclip.explanation.dicom.save import save_dicom
from ctclip.explanation.dicom.words import code
from ctclip.preprocessing.errors import PreprocessingError
from tests.phantom_dicom import write_series
from tests.unit.preprocessing import dicom_builder

pytestmark = pytest.mark.integration

hd = pytest.importorskip("highdicom")
ASKED = ["Pleural effusion", "Lung nodule"]
PATIENT = {"PatientName": "Doe^Jane", "PatientID": "MRN4711", "PatientBirthDate": "19500101", "PatientSex": "F",
           "AccessionNumber": "ACC0815"}  # fmt: skip


@pytest.fixture(scope="module")
def model(trained: Path) -> Any:
    return ctclip.load(trained / "model")


@pytest.fixture(scope="module")
def scan(cohort: Path) -> Path:
    return min((cohort / "dataset").rglob("*.nii.gz"))


@pytest.fixture(scope="module")
def output(trained: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command writes for a series."""
    folder = tmp_path_factory.mktemp("dicom")
    write_series(scan, folder / "series", **PATIENT)
    asked = [word for name in ASKED for word in ("--abnormality", name)]
    command = [
        "explain",
        folder / "series",
        "--model",
        trained / "model",
        *asked,
        "--dicom",
        "--output",
        folder / "out",
    ]
    assert main([str(word) for word in command]) == 0
    return folder / "out"


def test_the_segmentation_is_the_mask_in_place(output: Path) -> None:
    mask = nib.load(output / "findings.seg.nii.gz")
    expected = np.asarray(mask.dataobj).transpose(2, 1, 0)
    assert len(np.unique(expected)) == 3
    written = hd.seg.segread(output / "dicom" / "segmentation.dcm")
    assert [item.SegmentLabel for item in written.SegmentSequence] == ASKED
    source = sorted(
        (pydicom.dcmread(path) for path in (output.parent / "series").iterdir()),
        key=lambda image: float(image.ImagePositionPatient[2]),
    )
    pixels = written.get_pixels_by_source_instance(
        [image.SOPInstanceUID for image in source], combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(pixels, expected)
    # The position of each voxel from the Segmentation alone, compared with nibabel's affine of the mask.
    volume = written.get_volume(combine_segments=True)
    index = np.argwhere(volume.array > 0)[[0, -1]]
    lps = volume.map_indices_to_reference(index)
    ras = lps * [-1, -1, 1]
    at = np.rint(np.linalg.inv(mask.affine) @ np.c_[ras, np.ones(2)].T).astype(int)[:3]
    np.testing.assert_array_equal(np.asarray(mask.dataobj)[tuple(at)], volume.array[tuple(index.T)])


def test_the_report_says_findings_and_probabilities(output: Path, model: Any, scan: Path) -> None:
    written = hd.sr.srread(output / "dicom" / "report.dcm")
    assert (written.VerificationFlag, written.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    detection = model.detect(output.parent / "series")
    groups = written.content.get_volumetric_roi_measurement_groups()
    assert [group.finding_type.meaning for group in groups] == ASKED
    others = written.content.get_image_measurement_groups()
    said = {}
    for group in [*groups, *others]:
        values = {item.name.meaning: item.value for item in group.get_measurements()}
        said[group.finding_type.meaning] = values["Probability"] / 100
    assert said == pytest.approx(detection.probabilities, abs=1e-4)
    segments = pydicom.dcmread(output / "dicom" / "segmentation.dcm")
    mask = nib.load(output / "findings.seg.nii.gz")
    ml = float(abs(np.linalg.det(mask.affine[:3, :3]))) / 1000
    for number, group in enumerate(groups, start=1):
        assert group.referenced_segment.referenced_segment_numbers == [number]
        assert group.referenced_segment.referenced_sop_instance_uid == segments.SOPInstanceUID
        values = {item.name.meaning: item.value for item in group.get_measurements()}
        assert values["Volume"] == pytest.approx((np.asarray(mask.dataobj) == number).sum() * ml, rel=1e-3)
    text = str(written)
    assert "NOT FOR DIAGNOSIS" in text
    assert detection.model in text
    assert ctclip.__version__ in text


def test_all_belong_to_the_study_and_say_what_they_are(output: Path) -> None:
    source = pydicom.dcmread(next((output.parent / "series").iterdir()))
    paths = sorted((output / "dicom").iterdir())
    assert [path.name for path in paths] == ["picture-01.dcm", "picture-02.dcm", "report.dcm", "segmentation.dcm"]
    uids = set()
    for path in paths:
        made = pydicom.dcmread(path)
        for keyword in ("StudyInstanceUID", "StudyDate", *PATIENT):
            assert made[keyword].value == source[keyword].value
        assert made.SeriesDescription.startswith("RESEARCH, NOT FOR DIAGNOSIS")
        assert path.stat().st_mode & 0o077 == 0
        uids |= {made.SOPInstanceUID, made.SeriesInstanceUID}
    # Three separate series: the pictures share one.
    assert len(uids) == 4 + 3
    assert source.SeriesInstanceUID not in uids
    picture = pydicom.dcmread(paths[0]).pixel_array
    assert picture.shape[2] == 3
    assert picture.std() > 20
    # Only the DICOM files contain the patient's name.
    for path in output.iterdir():
        if path.is_file():
            assert not re.search(rb"Doe\^Jane|MRN4711|ACC0815|19500101", path.read_bytes())


@pytest.mark.skipif(shutil.which("dcmftest") is None, reason="dcmtk is not installed")
def test_dcmtk_takes_them(output: Path) -> None:
    for path in (output / "dicom").iterdir():
        assert subprocess.run(["dcmftest", path], capture_output=True, text=True).stdout.startswith("yes")
    shown = subprocess.run(["dsrdump", "-Ec", output / "dicom" / "report.dcm"], capture_output=True, text=True)
    assert shown.returncode == 0
    errors = [line for line in shown.stderr.splitlines() if line.startswith(("E:", "F:"))]
    assert errors == []
    assert '"Pleural effusion"' in shown.stdout
    # VR and length of every value; DCMTK's checker does not know UTF-8.
    for path in (output / "dicom").iterdir():
        dumped = subprocess.run(["dcmdump", path], capture_output=True, text=True, errors="replace")
        assert dumped.returncode == 0
        assert not [line for line in dumped.stderr.splitlines() if line.startswith("E:")]


def test_frames_of_an_enhanced_image(model: Any, scan: Path, tmp_path: Path) -> None:
    hu = dicom_builder.truth(24, 64, 48)
    order = list(np.random.default_rng(0).permutation(24))
    image = dicom_builder.enhanced(hu, order)
    image.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    ready = model.prepare(tmp_path / "one.dcm", headers=True, expect="any")
    explanation = model.explain(ready, ASKED)
    save_dicom(explanation, tmp_path / "out", pictures=False)
    written = hd.seg.segread(tmp_path / "out" / "segmentation.dcm")
    frames = [order.index(index) + 1 for index in range(24)]
    pixels = written.get_pixels_by_source_frame(
        image.SOPInstanceUID, frames, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(pixels, explanation.mask()[0])
    assert len(written.SourceImageSequence) == 1
    evidence = hd.sr.srread(tmp_path / "out" / "report.dcm").content
    assert len(evidence.get_volumetric_roi_measurement_groups()) > 0


def test_a_tilted_gantry_is_drawn_in_the_planes_of_the_images(model: Any, tmp_path: Path) -> None:
    """The reader straightens the series, so the grid of the volume is not that of the images: every pixel is compared
    by its position in the patient."""

    def tilt(index: int, data: Any) -> None:
        data.ImagePositionPatient = [*data.ImagePositionPatient[:1], float(data.ImagePositionPatient[1]) + index, *data.ImagePositionPatient[2:]]  # fmt: skip

    folder = dicom_builder.write(tmp_path / "series", dicom_builder.series(dicom_builder.truth(24, 64, 48), tilt))
    ready = model.prepare(folder, headers=True, expect="any")
    assert any("tilt" in warning for warning in ready.warnings)
    explanation = model.explain(ready, ["Pleural effusion"])
    save_dicom(explanation, tmp_path / "out", pictures=False)
    written = hd.seg.segread(tmp_path / "out" / "segmentation.dcm")
    images = sorted(
        (pydicom.dcmread(path) for path in folder.iterdir()), key=lambda i: float(i.ImagePositionPatient[2])
    )
    pixels = written.get_pixels_by_source_instance(
        [image.SOPInstanceUID for image in images], combine_segments=True, assert_missing_frames_are_empty=True
    )
    straight = explanation.mask()[0]
    affine = ready.file_grid.affine
    same = total = 0
    for plane, image in zip(pixels, images, strict=True):
        rows, columns = np.mgrid[: image.Rows, : image.Columns]
        lps = np.array(image.ImagePositionPatient, float)[:, None] + np.array(
            [columns.ravel() * image.PixelSpacing[1], rows.ravel() * image.PixelSpacing[0], 0 * rows.ravel()]
        )
        at = np.rint(np.linalg.inv(affine) @ np.vstack([lps, np.ones(lps.shape[1])]))[:3].astype(int)
        inside = np.all((at >= 0) & (at < np.array(straight.shape)[:, None]), axis=0)
        same += (straight[tuple(at[:, inside])] == plane.ravel()[inside]).sum()
        total += inside.sum()
    assert (pixels > 0).sum() > 100
    # Differences are at the region's edge only: half a pixel of rounding.
    assert same / total > 0.97


def test_careless_headers_are_not_passed_on_nor_told(
    model: Any, scan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "PatientName": "Doe Jane=====",
        "PatientBirthDate": "1.1.1950",
        "PatientSex": "unknown sex",
        "PatientID": "7" * 80,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_series(scan, tmp_path / "series", **wrong)
    capfd.readouterr()
    explanation = model.explain(model.prepare(tmp_path / "series", headers=True), ASKED)
    save_dicom(explanation, tmp_path / "out", pictures=False)
    made = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    assert (made.PatientBirthDate, made.PatientSex, made.PatientID) == ("", "", "")
    told = "".join(capfd.readouterr())
    assert not re.search("Doe|1950|777", told)
    assert "Doe" not in repr(explanation) + repr(explanation.prepared)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"FrameOfReferenceUID": None}, "no valid FrameOfReferenceUID"),
        ({"StudyInstanceUID": None}, "no valid StudyInstanceUID"),
    ],
)
def test_a_series_that_nothing_can_refer_to(model: Any, scan: Path, tmp_path: Path, tags: Any, reason: str) -> None:
    write_series(scan, tmp_path / "series", **tags)
    ready = model.prepare(tmp_path / "series", headers=True)
    with pytest.raises(ctclip.errors.ExplanationError, match=reason):
        save_dicom(model.explain(ready, ASKED), tmp_path / "out")


def test_a_scan_that_is_no_dicom(trained: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", scan, "--model", trained / "model", "--dicom", "--output", tmp_path / "out"]
    assert main([str(word) for word in command]) == 2
    assert "not a DICOM series" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_headers_are_kept_only_when_asked_for(model: Any, scan: Path, tmp_path: Path) -> None:
    write_series(scan, tmp_path / "series", **PATIENT)
    assert model.prepare(tmp_path / "series").headers == []
    assert len(model.prepare(tmp_path / "series", headers=True).headers) == nib.load(scan).shape[2]


def test_codes() -> None:
    """A code of SNOMED CT if DICOM lists exactly this name (PS3.16, CID 6102 and others), otherwise our own code, which
    is the same for the same name."""
    assert (code("Pleural effusion").value, code("Pleural effusion").scheme_designator) == ("60046008", "SCT")
    assert code("Lung nodule").scheme_designator == "99CTCLIP"
    assert code("Lung nodule").value == code("lung nodule").value != code("Lung opacity").value
    assert len(code("x" * 500).meaning) == 64


def test_slices_of_a_user_are_never_deleted(trained: Path, output: Path, tmp_path: Path) -> None:
    """If the folder of the objects contains a user's own DICOM files, even under the names of the objects, the whole
    folder is not replaced; the objects of an earlier explanation are replaced."""
    slices = sorted((output.parent / "series").iterdir())
    command = [
        "explain",
        output.parent / "series",
        "--model",
        trained / "model",
        "--abnormality",
        ASKED[0],
        "--dicom",
        "--output",
    ]
    for name in ("IM_0001.dcm", "report.dcm"):
        ours = tmp_path / name / "ours"
        shutil.copytree(output, ours)
        shutil.copy(slices[0], ours / "dicom" / name)
        before = {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()}
        assert main([str(word) for word in (*command, ours)]) == 2
        assert {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()} == before
    again = tmp_path / "again"
    shutil.copytree(output, again)
    # An unfinished file, as after a kill.
    (again / "dicom" / ".report.dcm.a1b2c3d_.partial.dcm").write_bytes(b"half")
    assert main([str(word) for word in (*command, again)]) == 0
    assert sorted(path.name for path in (again / "dicom").iterdir()) == [
        "picture-01.dcm",
        "report.dcm",
        "segmentation.dcm",
    ]


def test_the_folder_of_the_slices_is_no_place_for_objects(model: Any, output: Path, tmp_path: Path) -> None:
    series = tmp_path / "series"
    shutil.copytree(output.parent / "series", series)
    explained = model.explain(model.prepare(series, headers=True), ASKED[:1])
    names = sorted(path.name for path in series.iterdir())
    with pytest.raises(PreprocessingError, match="holds no DICOM objects of an explanation"):
        save_dicom(explained, series)
    assert sorted(path.name for path in series.iterdir()) == names
