"""Streams with flipped bits, decompression bombs and false sizes: no silently changed voxels, and no memory beyond the
limit."""

from __future__ import annotations

import functools
import gzip
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.formats import archive
from ctclip.preprocessing.readers import read
from tests.unit.preprocessing import dicom_builder
from tests.unit.preprocessing.scan_files import (
    HU,
    flipped,
    meta,
    meta_header,
    nifti,
    nrrd,
    nrrd_header,
    tarred,
    written,
    zipped,
)


def packed_npz() -> bytes:
    memory = io.BytesIO()
    np.savez_compressed(memory, ct=HU)
    return memory.getvalue()


# Each with the first byte of its compressed stream: the text before it has no checksum.
COMPRESSED = {
    "scan.nii.gz": (gzip.compress(nifti()), 0),
    "scan.nrrd": (nrrd(encoding="gzip"), len(nrrd_header(encoding="gzip")) + 1),
    "bzip2.nrrd": (nrrd(encoding="bzip2"), len(nrrd_header(encoding="bzip2")) + 1),
    "scan.mha": (meta(CompressedData="True"), len(meta_header(CompressedData="True"))),
    "scan.npz": (packed_npz(), 0),
    "scan.zip": (zipped({"scan.nii": nifti()}), 0),
    "scan.tar.gz": (tarred({"scan.nii": nifti()}), 0),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_no_flipped_bit_gives_other_voxels(tmp_path: Path, name: str) -> None:
    content, begin = COMPRESSED[name]
    expected = read(written(tmp_path, name, content))
    refused = 0
    for place in range(begin, len(content)):
        written(tmp_path, name, flipped(content, place, 1 << place % 8))
        try:
            volume = read(tmp_path / name)
        except PreprocessingError:
            refused += 1
        else:
            assert np.array_equal(volume.array, expected.array)
            assert np.array_equal(volume.affine, expected.affine)
    assert refused > 0.8 * (len(content) - begin)


@pytest.mark.parametrize("name", COMPRESSED)
def test_no_cut_gives_other_voxels(tmp_path: Path, name: str) -> None:
    content, _ = COMPRESSED[name]
    for length in range(len(content) - 1, 0, -7):
        with pytest.raises(PreprocessingError):
            read(written(tmp_path, name, content[:length]))


def test_npz(tmp_path: Path) -> None:
    """RAD-ChestCT's layout, compared with NumPy, and files that must be refused."""
    np.savez_compressed(tmp_path / "scan.npz", ct=HU.astype(np.float32))
    volume = read(tmp_path / "scan.npz")
    assert np.array_equal(volume.array, np.load(tmp_path / "scan.npz")["ct"])
    assert np.allclose(volume.spacing, 0.8)
    assert volume.geometry_doubt is None
    np.savez(tmp_path / "scan.npz", ct=np.asfortranarray(HU))
    assert np.array_equal(read(tmp_path / "scan.npz").array, HU)
    for array, words in (
        (HU[0], "not a volume"), (HU.astype(complex), "a type that no CT has"), (HU.astype("U3"), "type that no CT"),
    ):  # fmt: skip
        np.savez(tmp_path / "scan.npz", ct=array)
        with pytest.raises(PreprocessingError, match=words):
            read(tmp_path / "scan.npz")
    np.savez(tmp_path / "scan.npz", other=HU)
    with pytest.raises(PreprocessingError, match="has no array 'ct'"):
        read(tmp_path / "scan.npz")
    member = io.BytesIO()
    np.save(member, HU)
    (tmp_path / "scan.npz").write_bytes(zipped({"ct.npy": member.getvalue() + b"more"}))
    with pytest.raises(PreprocessingError, match="more bytes"):
        read(tmp_path / "scan.npz")


def test_the_largest_ct_is_a_bound_that_can_be_raised(tmp_path: Path) -> None:
    for name, content in (
        ("scan.nii", nifti()),
        ("scan.nrrd", nrrd()),
        ("scan.mha", meta()),
        ("scan.npz", packed_npz()),
    ):
        path = written(tmp_path, name, content)
        with pytest.raises(PreprocessingError, match="more than 4e-07 GB; --largest-gb raises the limit"):
            read(path, largest_gb=4e-7)
        assert read(path, largest_gb=5e-7).array.size == HU.size
    whole = dicom_builder.write(tmp_path / "series", dicom_builder.series(HU, RescaleIntercept=-1024))
    frames = dicom_builder.write(tmp_path / "frames", [dicom_builder.enhanced(HU)])
    for path in (whole, frames, min(whole.iterdir())):
        with pytest.raises(PreprocessingError, match=r"4\.2e-07 GB of voxels, more than 4e-07 GB; --largest-gb raises"):
            read(path, largest_gb=4e-7)
        assert np.array_equal(read(path, largest_gb=5e-7).array, HU)
    fractions = dicom_builder.write(tmp_path / "fractions", dicom_builder.series(HU, RescaleSlope=0.5))
    with pytest.raises(PreprocessingError, match=r"8\.4e-07 GB of voxels, more than 5e-07 GB"):
        read(fractions, largest_gb=5e-7)
    path = written(tmp_path, "scan.zip", zipped({"scan.nii": nifti()}))
    with pytest.raises(PreprocessingError, match="would unpack to"):
        read(path, largest_gb=5e-7)
    path = written(tmp_path, "scan.tar.gz", tarred({"scan.nii": nifti()}))
    with pytest.raises(PreprocessingError, match="would unpack to more than"):
        read(path, largest_gb=5e-7)


@functools.cache
def bomb(size: int, wrap: int = 31) -> bytes:
    """``size`` zeros, compressed a thousandfold."""
    packer = zlib.compressobj(1, zlib.DEFLATED, wrap)
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(size >> 20)), packer.flush()])


def lying_tar(kind: bytes) -> bytes:
    """A tar whose first header claims 2 GB for a long name, an extended header, or a sparse file, all zeros."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 2 << 30
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT)) + bomb(1 << 28)


def lying_zip() -> bytes:
    content = bytearray(zipped({"scan.nii": bytes(1 << 26)}))
    for mark, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        place = content.find(mark) + at
        content[place : place + 4] = (1000).to_bytes(4, "little")
    return bytes(content)


BOMBS = {
    "gzip.nii.gz": lambda: gzip.compress(nifti()) [:-8] + bomb(1 << 28)[10:],
    "nifti.nii.gz": lambda: gzip.compress(nifti(np.zeros((2, 2, 2), np.int16))[:352]) + bomb(1 << 28),
    "nrrd.nrrd": lambda: nrrd(bomb(1 << 28), encoding="gzip"),
    "meta.mha": lambda: meta(bomb(1 << 30, 15), CompressedData="True"),
    "tar.tar.gz": lambda: bomb(1 << 28),
    "name.tar.gz": lambda: lying_tar(tarfile.GNUTYPE_LONGNAME),
    "pax.tar.gz": lambda: lying_tar(tarfile.XHDTYPE),
    "sparse.tar.gz": lambda: lying_tar(tarfile.GNUTYPE_SPARSE),
    "lying.zip": lying_zip,
    "nested.zip": lambda: zipped({"a.tar.gz": bomb(1 << 28)}),
    "npz.npz": lambda: zipped({"ct.npy": bytes(1 << 28)}),
}  # fmt: skip
LIMITED = """
import resource, sys
from ctclip.preprocessing.readers import read
from ctclip.preprocessing import PreprocessingError
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read(sys.argv[1], largest_gb=0.1)
except PreprocessingError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1000)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_no_memory(tmp_path: Path, name: str) -> None:
    """A quarter of a gigabyte of zeros in a megabyte, for each reader that decompresses: at most 60 MB are used."""
    path = written(tmp_path, name, BOMBS[name]())
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=120)
    *said, megabytes = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(said) == 1
    assert said[0].startswith(f"{path}: ")
    assert int(megabytes) < 60


def test_nothing_of_an_archive_is_left_even_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    path = written(tmp_path, "scan.zip", zipped({"scan.nii": nifti()}))
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom ctclip.preprocessing.formats.archive import unpacked\n"
        "with unpacked(Path(sys.argv[1]), 'x', 10**9) as scan:\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], env={"TMPDIR": str(tmp_path), "PYTHONPATH": "."})
    assert len(list(tmp_path.glob(f"{archive.PREFIX}*"))) == 1
    with archive.unpacked(path, "x", 10**9) as held:
        assert [folder for folder in tmp_path.glob(f"{archive.PREFIX}*")] == [held.parent.parent]
        read(path)
        assert held.exists(), "what another process or thread holds is not swept away"
    assert not list(tmp_path.glob(f"{archive.PREFIX}*"))


def test_a_patients_cd_is_read_without_a_word_about_its_viewer(tmp_path: Path) -> None:
    from tests.unit.preprocessing.test_dicom import write_series

    folder = write_series(tmp_path / "series", HU)
    members = {f"DICOM/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    viewer = {
        "autorun.inf": b"[autorun]", "VIEWER/viewer.exe": b"MZ" * 9000, "VIEWER/lib.dll": b"MZ" * 9000,
        "DICOM/index.html": b"<html>" * 2000, "README.TXT": b"x" * 9000, "DICOM/logo.png": b"\x89PNG" * 3000,
        "__MACOSX/DICOM/._0001.dcm": b"\0\5\x16\7" * 1000, "DICOM/.DS_Store": b"x" * 9000,
    }  # fmt: skip
    expected = read(folder)
    for name, content in (("cd.zip", zipped({**viewer, **members})), ("cd.tar.gz", tarred({**viewer, **members}))):
        volume = read(written(tmp_path, name, content))
        assert volume.warnings == expected.warnings
        assert np.array_equal(volume.array, expected.array)
        assert np.array_equal(volume.affine, expected.affine)


def test_zips_with_members_outside_leave_nothing_there(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    with zipfile.ZipFile(below / "scan.zip", "w") as evil:
        evil.writestr("../../outside.nii", nifti())
        evil.writestr("/tmp/outside.raw", b"x")
    assert read(below / "scan.zip").array.size == HU.size
    assert not list(tmp_path.rglob("outside*"))
    assert not Path("/tmp/outside.raw").exists()
