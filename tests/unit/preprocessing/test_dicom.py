"""DICOM series as scanners and archives write them: syntaxes, copies, gaps, media, and no patient identifiers."""

from __future__ import annotations

import base64
import contextlib
import io
import locale
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pydicom.fileset
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
    generate_uid,
)

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.identifiers import masked
from ctclip.preprocessing.readers import read

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))
IDENTIFIERS = ("Zebrowski^Ottilie", "PID-778899", "19410217", "St Elsewhere Hospital", "ACC-424242", "Dr^Frankenstein")


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return make_scan(1, 1, scale=8.0).reconstructions[0].hu


def write_series(folder: Path, hu: np.ndarray, *, spacing: float = 5.0, skip: tuple[int, ...] = ()) -> Path:
    """HU [slice, row, column] as DICOM slices of a patient with a name, in files with shuffled names and no
    extension."""
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


def test_a_dicomdir_of_any_name_stands_for_its_folder(tmp_path: Path, shared: Path) -> None:
    folder = tmp_path / "disc"
    shutil.copytree(shared / "ct" / "dicom" / "dcm_qa_ct" / "philips_28x5mm", folder)
    assert read(folder / "DIRFILE").array.shape == (28, 512, 512)


def packed(folder: Path, stream: bytes, syntax: str, shape: tuple[int, int], **values: float) -> Path:
    """Three slices that contain the same compressed stream of a transfer syntax."""
    for path in write_series(folder, np.zeros((3, *shape), np.int16)).iterdir():
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        header.RescaleIntercept = 0
        for keyword, value in values.items():
            setattr(header, keyword, value)
        header.PixelData = encapsulate([stream + b"\0" * (len(stream) % 2)])
        header["PixelData"].VR = "OB"
        header.save_as(path, enforce_file_format=True)
    return folder


def stream_of(name: str) -> tuple[bytes, tuple[int, int]]:
    """The compressed stream of one of pydicom's own test files, and its rows and columns."""
    header = pydicom.dcmread(str(get_testdata_file(name, download=False)))
    return next(generate_frames(header.PixelData, number_of_frames=1)), (header.Rows, header.Columns)


def compressed_by_itk(path: Path, output: Path, compressor: str) -> None:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.LoadPrivateTagsOn()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(output))
    image = reader.Execute()
    stored = sitk.Cast(image, sitk.sitkInt16)
    for key in image.GetMetaDataKeys():
        if not key.startswith("0028"):
            stored.SetMetaData(key, image.GetMetaData(key))
    writer.Execute(stored)
    # After writing JPEG, ITK leaves the process in the C locale, in which other libraries cannot read their own files.
    locale.setlocale(locale.LC_ALL, "")


@pytest.mark.parametrize(
    ("compressor", "syntax"), [("RLE", "5"), ("JPEG", "4.70"), ("JPEG2000", "4.90"), ("deflated", "1.99")]
)
def test_compressed_transfer_syntaxes(tmp_path: Path, hu: np.ndarray, compressor: str, syntax: str) -> None:
    """The same voxels from each of the lossless syntaxes; each file really uses the intended syntax."""
    plain, folder = write_series(tmp_path / "plain", hu[:8]), tmp_path / "packed"
    folder.mkdir()
    for path in sorted(plain.iterdir()):
        if compressor in ("RLE", "deflated"):
            header = pydicom.dcmread(path)
            if compressor == "RLE":
                header.compress(RLELossless, generate_instance_uid=False)
            else:
                header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
            header.save_as(folder / path.name)
            continue
        compressed_by_itk(path, folder / f"{path.name}.dcm", compressor)
    for path in folder.iterdir():
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == f"1.2.840.10008.1.2.{syntax}"
    assert np.array_equal(read(folder).array, read(plain).array)


def test_jpeg_ls_of_another_encoder(tmp_path: Path) -> None:
    stream, shape = stream_of("MR_small_jpeg_ls_lossless.dcm")
    plain = pydicom.dcmread(str(get_testdata_file("MR_small.dcm", download=False))).pixel_array
    assert np.array_equal(read(packed(tmp_path / "s", stream, "1.2.840.10008.1.2.4.80", shape)).array[1], plain)


# 8 x 8 voxels of (37 x + 91 y) mod 2000, encoded by OpenJPH.
HTJ2K = (
    "/0//UQApQAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
    "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAFYAAf+TwAAmtf0FB3QAAADAABLAABKAUAGH"
    "dAA8Agd0AMAAE0AAEwAk0gECdACYMQBjVADAACogABVACIIgqnCCdQC0NBrtwCEB7LYA/9k="
)


@pytest.mark.parametrize("syntax", ["201", "202", "203"])
def test_high_throughput_jpeg_2000(tmp_path: Path, syntax: str) -> None:
    rows, columns = np.mgrid[:8, :8]
    folder = packed(
        tmp_path / "s", base64.b64decode(HTJ2K), f"1.2.840.10008.1.2.4.{syntax}", (8, 8), PixelRepresentation=0
    )
    assert np.array_equal(read(folder).array[2], 37 * columns + 91 * rows)


def test_lossy_jpeg_is_read_and_told(tmp_path: Path) -> None:
    """Baseline, 8 bits, as Pillow decodes it; extended, 12 bits, with two pixels that pydicom's tests state."""
    rows, columns = np.mgrid[:64, :64]
    picture = (128 + 60 * np.sin(columns / 9) + 50 * np.cos(rows / 7)).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "JPEG", quality=90)
    values = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0}
    folder = packed(tmp_path / "8", written.getvalue(), JPEGBaseline8Bit, (64, 64), **values,
                    RescaleSlope=8, RescaleIntercept=-1024)  # fmt: skip
    volume = read(folder)
    assert np.array_equal(volume.array[0], np.asarray(Image.open(written)).astype(int) * 8 - 1024)
    assert volume.warnings == ["lossy compression: HU are approximate"]
    values = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}
    stream, shape = stream_of("JPGExtended.dcm")
    volume = read(packed(tmp_path / "12", stream, JPEGExtended12Bit, shape, **values))
    assert volume.array[0, 420, 140] == 244
    assert volume.array[0, 230, 120] == 95
    assert volume.warnings == ["lossy compression: HU are approximate"]


def test_what_cannot_be_decoded_names_its_syntax_and_the_remedy(tmp_path: Path) -> None:
    stream, shape = stream_of("MR_small_jpeg_ls_lossless.dcm")
    with pytest.raises(PreprocessingError, match=r"\(MPEG-4 AVC.*4\.102\).*export the series again, uncompressed"):
        read(packed(tmp_path / "video", stream, "1.2.840.10008.1.2.4.102", shape))


@pytest.mark.parametrize("precision", [0, 17, 28, 255])
def test_a_jpeg_of_an_impossible_precision_does_not_end_the_process(
    tmp_path: Path, hu: np.ndarray, precision: int
) -> None:
    plain, folder = write_series(tmp_path / "plain", hu[:3]), tmp_path / "packed"
    folder.mkdir()
    for path in plain.iterdir():
        compressed_by_itk(path, folder / f"{path.name}.dcm", "JPEG")
    spoiled = sorted(folder.iterdir())[1]
    content = bytearray(spoiled.read_bytes())
    content[content.index(b"\xff\xc3", content.rindex(b"\xe0\x7f\x10\x00")) + 4] = precision
    spoiled.write_bytes(content)
    with pytest.raises(PreprocessingError, match=r"damaged, or its transfer syntax \(JPEG Lossless"):
        read(folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["changed", "cut", "zeroed"])
def test_a_damaged_slice_is_refused_told_or_of_no_consequence(tmp_path: Path, hu: np.ndarray, kind: str) -> None:
    """A file that is cut anywhere, or whose header is changed, never gives another volume without a warning.

    DICOM has no checksum of the voxels: changed values of voxels cannot be detected.
    """
    folder = write_series(tmp_path / "s", hu[:6])
    whole, files = read(folder), sorted(folder.iterdir())
    assert whole.warnings == []
    random = np.random.default_rng(len(kind))
    for _ in range(60):
        path = files[int(random.integers(len(files)))]
        content = path.read_bytes()
        header = content.rindex(b"\xe0\x7f\x10\x00") + 12
        place, spoiled = int(random.integers(header)), bytearray(content)
        if kind == "changed":
            spoiled[place] ^= int(random.integers(1, 256))
        elif kind == "cut":
            spoiled = spoiled[: int(random.integers(len(content)))]
        else:
            end = min(header, place + int(random.integers(1, 100)))
            spoiled[place:end] = bytes(end - place)
        path.write_bytes(spoiled)
        said = ""
        try:
            found = read(folder)
            same = np.array_equal(found.array, whole.array) and np.allclose(found.affine, whole.affine)
            said = "" if same else "; ".join(found.warnings)
        except PreprocessingError as refused:
            same, said = False, str(refused)
        assert same or said, (path.name, place)
        assert "\n" not in said
        path.write_bytes(content)


def test_missing_slices_and_copies_are_told_or_refused(tmp_path: Path, hu: np.ndarray) -> None:
    with pytest.raises(PreprocessingError, match="slices are missing"):
        prepare(write_series(tmp_path / "gap", hu, skip=(5, 6, 7)), SPEC)
    with pytest.raises(PreprocessingError, match=r"5 of \d+ slices are missing"):
        prepare(write_series(tmp_path / "many", hu[:24], skip=(2, 5, 8, 11, 14)), SPEC)
    one = read(write_series(tmp_path / "one", hu, skip=(5,)))
    assert one.array.shape == hu.shape
    assert "1 slice is missing" in one.warnings[0]
    between = (hu[4].astype(float) + hu[6]) / 2
    assert np.abs(one.array[5] - between).max() < 0.01
    assert np.abs(np.delete(one.array, 5, axis=0) - np.delete(hu, 5, axis=0)).max() < 0.01
    twice = write_series(tmp_path / "twice", hu)
    same = sorted(twice.iterdir())[4]
    shutil.copy(same, twice / "copy")
    assert "1 slice is a copy" in read(twice).warnings[0]
    other = pydicom.dcmread(same)
    other.PixelData = (other.pixel_array + 3).astype(np.int16).tobytes()
    other.save_as(twice / "copy")
    with pytest.raises(PreprocessingError, match="several phases or reconstructions"):
        read(twice)


@pytest.mark.parametrize(("degrees", "uneven"), [(18.5, 0.0), (-12.0, 0.0), (0.0, 0.3), (15.0, 0.3)])
def test_tilt_and_uneven_gaps_leave_a_point_in_its_place(tmp_path: Path, degrees: float, uneven: float) -> None:
    """A Gaussian at a known point of the patient, sampled at the slices of a tilted gantry."""
    place, random = np.array([50.0, 62.0, 48.0]), np.random.default_rng(0)
    angle = np.radians(degrees)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(angle), np.sin(angle)])
    down, right = np.mgrid[:32, :28] * 4.0
    folder = write_series(tmp_path / "s", np.zeros((24, 32, 28), np.int16))
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        index = int(header.InstanceNumber) - 1
        corner = np.array([0.0, 0.0, 5.0 * index + uneven * 5.0 * random.uniform(-1, 1)])
        world = corner + down[..., None] * column + right[..., None] * row
        excess = 1000 * np.exp(-((world - place) ** 2).sum(axis=-1) / (2 * 12.0**2))
        header.ImagePositionPatient, header.ImageOrientationPatient = list(corner), [*row, *column]
        header.PixelData = np.rint(excess).astype(np.int16).tobytes()
        header.save_as(path)
    found = read(folder)
    assert any("gantry tilt" in warning for warning in found.warnings) == (degrees != 0)
    assert any("slice gaps" in warning for warning in found.warnings) == (uneven != 0)
    weight = np.maximum(found.array + 1024.0 - 50, 0)
    centre = np.array([(weight * axis).sum() for axis in np.indices(weight.shape)]) / weight.sum()
    assert np.linalg.norm(found.affine[:3, :3] @ centre + found.affine[:3, 3] - place) < 0.5


def test_slices_of_different_spacing_are_no_volume(tmp_path: Path, hu: np.ndarray) -> None:
    folder = write_series(tmp_path / "s", hu[:6])
    path = sorted(folder.iterdir())[2]
    header = pydicom.dcmread(path)
    header.PixelSpacing = [4.0, 4.5]
    header.save_as(path)
    with pytest.raises(PreprocessingError, match=r"1 slice with another PixelSpacing was left out"):
        read(folder)


def test_the_series_with_most_slices_or_the_one_that_is_named(tmp_path: Path, hu: np.ndarray) -> None:
    both = write_series(tmp_path / "both", hu)
    write_series(tmp_path / "both" / "short", hu[:6])
    taken = prepare(both, SPEC)
    assert taken.source_shape == hu.shape
    assert any("2 series" in warning for warning in taken.warnings)
    uid = pydicom.dcmread(next((both / "short").iterdir()), stop_before_pixels=True).SeriesInstanceUID
    assert prepare(both, SPEC, series=str(uid)).source_shape[0] == 6
    with pytest.raises(PreprocessingError, match=rf"{uid} \(6 files\)"):
        prepare(both, SPEC, series="1.2.3")


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient",
                                     "PixelSpacing", "SeriesInstanceUID", "Modality", "RescaleSlope", "PixelData"])  # fmt: skip
def test_a_header_without_what_matters(tmp_path: Path, hu: np.ndarray, keyword: str) -> None:
    for emptied in (False, True):
        for count in (1, 8):
            folder = write_series(tmp_path / f"{emptied}{count}", hu[:8])
            for path in sorted(folder.iterdir())[:count]:
                header = pydicom.dcmread(path)
                if emptied:
                    setattr(header, keyword, b"" if keyword == "PixelData" else None)
                else:
                    delattr(header, keyword)
                header.save_as(path)
            with contextlib.suppress(PreprocessingError):
                # Either slices without a position were left out, or the change had no effect.
                volume = read(folder)
                assert volume.array.shape[1:] == hu.shape[1:]
                assert volume.spacing == pytest.approx((5.0, 4.0, 4.0))


SPELLINGS = ("Zebrowski, Ottilie", "OTTILIE_ZEBROWSKI", "pid 778899", "1941-02-17", "17.02.1941", "acc_424242_b")


def test_folders_named_after_the_patient_are_masked(tmp_path: Path, hu: np.ndarray) -> None:
    header = pydicom.dcmread(next(write_series(tmp_path / "s", hu[:3]).iterdir()))
    for text in (*SPELLINGS, "Zebrowski^Ottilie/PID-778899/19410217/St Elsewhere Hospital"):
        shown = masked(f"/data/{text}/chest", header)
        assert shown.startswith("/data/***")
        assert not any(
            part.lower() in shown.lower() for part in ("zebrow", "ottil", "778899", "1941", "elsewh", "4242")
        )
    assert masked("/data/chest_5mm/IM_0001", header) == "/data/chest_5mm/IM_0001"
    header.PatientIdentityRemoved = "YES"
    assert masked("/data/PID-778899/chest", header) == "/data/PID-778899/chest"


def test_no_identifier_of_a_dicom_header_reaches_any_output(tmp_path: Path, hu: np.ndarray) -> None:
    """Good, refused, damaged and zipped scans, in folders named after the patient, as a folder and as a CSV."""
    scans = tmp_path / "scans"
    write_series(scans / "a", hu)
    write_series(scans / "b", hu, skip=(5, 6, 7))
    write_series(scans / "c", np.full((6, 20, 20), 40))
    write_series(scans / "Zebrowski_Ottilie_19410217" / "CT", hu)
    write_series(scans / "Zebrowski_Ottilie_19410217" / "gap", hu, skip=(5, 6, 7))
    damaged = write_series(scans / "PID-778899 St Elsewhere Hospital", hu)
    for path in sorted(damaged.iterdir())[3:]:
        path.write_bytes(path.read_bytes()[:-900])
    wrong = write_series(scans / "warned", hu)
    for path in wrong.iterdir():
        # An invalid birth date: pydicom's warning would contain its value.
        path.write_bytes(path.read_bytes().replace(b"19410217", b"1941021Z"))
    zipped = write_series(tmp_path / "zipped" / "Zebrowski", hu, skip=(5, 6, 7))
    shutil.make_archive(str(scans / "ottilie zebrowski"), "zip", zipped.parent)
    shutil.move(zipped, tmp_path / "d")
    broken = (scans / "ottilie zebrowski.zip").read_bytes()
    (scans / "broken.zip").write_bytes(broken[:3000] + bytes(200) + broken[3200:])
    store = tmp_path / "store"
    table = tmp_path / "cohort.csv"
    paths = ["scans/a", "scans/Zebrowski_Ottilie_19410217/CT", "scans/ottilie zebrowski.zip"]
    pd.DataFrame({"path": paths}).to_csv(table, index=False)
    named = tmp_path / "named.csv"
    pd.DataFrame({"volume": ["Zebrowski"], "path": paths[:1]}).to_csv(named, index=False)
    said = []
    commands = [
        (3, "preprocess", scans, "--output", store, "--spec", "phantom", "--workers", "2"),
        (0, "quality", store),
        (3, "preprocess", table, "--output", tmp_path / "store2", "--spec", "phantom", "--workers", "1"),
        (2, "preprocess", named, "--output", tmp_path / "store3", "--spec", "phantom"),
        (0, "preprocess", scans / "Zebrowski_Ottilie_19410217" / "CT", "--output", tmp_path / "store4"),
        (3, "preprocess", scans / "b", "--output", tmp_path / "store5", "--series", "1.2.3"),
    ]
    script = "import sys, traceback; from ctclip.cli import main\nfor line in sys.stdin.read().splitlines():\n"
    script += "    try: print('ENDED', main(eval(line)), flush=True)\n"
    script += "    except Exception: traceback.print_exc(); print('ENDED 2', flush=True)\n"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, check=True, timeout=200,
        input="\n".join(repr(["--debug", *map(str, words)]) for _, *words in commands).encode(), env={**os.environ, "COLUMNS": "400"},
    )  # fmt: skip
    ends = [int(line.split()[1]) for line in done.stdout.decode().splitlines() if line.startswith("ENDED")]
    assert ends == [code for code, *_ in commands], done.stderr.decode()
    said += [done.stdout, done.stderr]
    files = [
        path for number in ("", "2", "3", "4", "5") for path in tmp_path.glob(f"store{number}/**/*") if path.is_file()
    ]
    assert len(list((store / "volumes").iterdir())) == 3
    content = b"\n".join([*said, *(path.read_bytes() + str(path.name).encode() for path in files)]).lower()
    content = content.replace(str(tmp_path).encode().lower(), b"")
    for part in (
        b"zebrowski",
        b"ottilie",
        b"778899",
        b"19410217",
        b"1941021z",
        b"elsewhere",
        b"424242",
        b"frankenstein",
    ):
        where = content.find(part)
        assert where < 0, content[max(0, where - 200) : where + 100]


def _nifti(folder: Path, hu: np.ndarray) -> Path:
    import nibabel as nib

    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0])), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"
