"""Readers given files that are cut, changed, empty, renamed or full of NaN return a volume or an error, within a time
limit."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare
from ctclip.preprocessing.hounsfield import Trust
from ctclip.preprocessing.readers import read
from tests.unit.preprocessing.test_dicom import write_series

SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))
FORMATS = ("scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha", "scan.mhd", "scan.npz", "scan.zip", "series")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small chest in every format."""
    folder = tmp_path_factory.mktemp("good")
    hu = make_scan(1, 1, scale=12.0).reconstructions[0].hu
    for name in ("scan.nii", "scan.nii.gz"):
        nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0])), folder / name)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((4.0, 4.0, 5.0))
    for name in ("scan.nrrd", "scan.mha", "scan.mhd"):
        sitk.WriteImage(image, str(folder / name), useCompression=name == "scan.nrrd")
    np.savez_compressed(folder / "scan.npz", ct=hu)
    write_series(folder / "series", hu)
    shutil.make_archive(str(folder / "scan"), "zip", folder / "series")
    for name in FORMATS:
        assert prepare(folder / name, SPEC).voxels.shape == SPEC.shape
    return folder


def taken_or_refused(path: Path, trust: Trust = "auto") -> None:
    said = ""
    try:
        assert np.isfinite(prepare(path, SPEC, hu=trust).voxels).all()
    except PreprocessingError as refused:
        said = str(refused)
    assert "\n" not in said


def copied(good: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """A copy of one format: the file given to the reader, and the file whose bytes are damaged."""
    if name == "series":
        shutil.copytree(good / name, folder / name)
        return folder / name, sorted((folder / name).iterdir())[3]
    shutil.copy(good / name, folder / name)
    if name == "scan.mhd":
        shutil.copy(good / "scan.raw", folder / "scan.raw")
    return folder / name, folder / name


@pytest.mark.parametrize("name", FORMATS)
def test_cut_emptied_and_changed(good: Path, tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(FORMATS.index(name))
    asked, spoiled = copied(good, name, tmp_path)
    content = spoiled.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        spoiled.write_bytes(content[: int(share * len(content))])
        taken_or_refused(asked)
    # Headers come first, and most changes are made there.
    for place in [*random.integers(0, min(len(content), 700), 40), *random.integers(0, len(content), 10)]:
        changed = bytearray(content)
        changed[int(place)] = int(random.integers(0, 256))
        spoiled.write_bytes(bytes(changed))
        taken_or_refused(asked)


@pytest.mark.parametrize("magic", [b"n+1\0", b"n+2\0"])
def test_every_byte_of_a_nifti_header(tmp_path: Path, magic: bytes) -> None:
    """Every value of every header byte gives a finite volume or a one-line error, and prints nothing."""
    array = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    kind = nib.Nifti1Image if magic == b"n+1\0" else nib.Nifti2Image
    nib.save(kind(array, np.diag([-4.0, -4.0, 5.0, 1.0])), tmp_path / "scan.nii")
    content = (tmp_path / "scan.nii").read_bytes()
    for coded in (0, 1):
        for place in range(348 if kind is nib.Nifti1Image else 540):
            for value in (0x7F, 0xFF):
                changed = bytearray(content)
                if coded and kind is nib.Nifti1Image:
                    changed[252:256] = b"\1\0\0\0"
                changed[place] = value
                (tmp_path / "scan.nii").write_bytes(bytes(changed))
                taken_or_refused(tmp_path / "scan.nii", trust="trust-file")


def test_a_pipe_is_not_waited_for(good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scan.nii.gz")
    with pytest.raises(PreprocessingError, match="not a file"):
        read(tmp_path / "scan.nii.gz")
    shutil.copytree(good / "series", tmp_path / "series")
    os.mkfifo(tmp_path / "series" / "pipe")
    assert prepare(tmp_path / "series", SPEC).voxels.shape == SPEC.shape


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(64):
            archive.writestr(f"{number}", bytes(2**21))
    content = bytearray((tmp_path / "bomb.zip").read_bytes())
    # The archive's directory may lie about sizes: here it claims 4 GB for each member.
    start = content.find(b"PK\x01\x02")
    while start >= 0:
        content[start + 24 : start + 28] = (2**32 - 2).to_bytes(4, "little")
        start = content.find(b"PK\x01\x02", start + 4)
    (tmp_path / "bomb.zip").write_bytes(bytes(content))
    with pytest.raises(PreprocessingError, match=r"bomb\.zip: would unpack to 274\.9 GB"):
        read(tmp_path / "bomb.zip")


@pytest.mark.parametrize("name", FORMATS[:-1])
@pytest.mark.parametrize(
    "other", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha", "scan.npz", "scan.zip", "scan.dcm"]
)
def test_renamed(good: Path, tmp_path: Path, name: str, other: str) -> None:
    shutil.copy(good / name, tmp_path / other)
    taken_or_refused(tmp_path / other)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_wherever_they_are(tmp_path: Path, value: float) -> None:
    hu = make_scan(1, 1, scale=12.0).reconstructions[0].hu.astype(np.float32)
    hu[1, 2, 4] = value
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0])), tmp_path / "n.nii")
    with pytest.raises(PreprocessingError, match="NaN or infinite"):
        prepare(tmp_path / "n.nii", SPEC)


def test_headers_that_claim_terabytes_cost_nothing(tmp_path: Path) -> None:
    header = nib.Nifti2Header()
    header.set_data_shape((200_000, 200_000, 50))
    header.set_data_dtype(np.int16)
    (tmp_path / "huge.nii").write_bytes(header.binaryblock + b"\0" * 4000)
    (tmp_path / "huge.mha").write_text("ObjectType = Image\nNDims = 3\nDimSize = 90000 90000 900\nElementType = MET_SHORT\nElementDataFile = LOCAL\n")  # fmt: skip
    (tmp_path / "huge.nrrd").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 90000 90000 900\nencoding: raw\n\n"
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive, archive.open("ct.npy", "w") as member:
        claim = {"descr": "<i2", "fortran_order": False, "shape": (90000, 90000, 900)}
        np.lib.format.write_array_header_1_0(member, claim)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(PreprocessingError, match=r"huge\."):
            read(path)


def test_an_npz_that_holds_code_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return Path.touch, (ran,)

    np.savez(tmp_path / "code.npz", ct=np.array([Code()], dtype=object))
    with pytest.raises(PreprocessingError):
        read(tmp_path / "code.npz")
    assert not ran.exists()


def test_a_zip_cannot_write_outside(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for number, path in enumerate(sorted((good / "series").iterdir())):
            archive.write(path, f"../../escaped_{number}")
    prepare(tmp_path / "evil.zip", SPEC)
    assert not list(tmp_path.parent.parent.glob("escaped_*"))
    assert not list(tmp_path.parent.glob("escaped_*"))
