"""NIfTI files from unknown sources: one row per situation."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.unit.preprocessing.file_situations import GZ, HEADER, NIFTI, NOT_ASKED, VOXELS, Row, check, files
from tests.unit.preprocessing.scan_files import AFFINE, HU, RAS, flipped, nifti, patched

NAN = float("nan")


def n(what: str, content: bytes, refused: str = "", name: str = "scan.nii", nibabel: str = "same", itk: str = "same", **more) -> Row:  # type: ignore[no-untyped-def]  # fmt: skip
    return Row(what, name, content, refused, nibabel=nibabel, itk=itk, **more)


def typed(kind: str) -> bytes:
    return nifti(HU.clip(0, 100).astype(kind) if kind in ("u1", "i1", "u2", "u4", "u8") else HU.astype(kind))


def coded(sform: int, qform: int, **fields: tuple) -> bytes:  # type: ignore[type-arg]
    return patched(nifti(codes=(sform, qform)), **fields)


def scaled(factor: float, units: int) -> bytes:
    affine = AFFINE.copy()
    affine[:3] *= factor
    return patched(nifti(affine=affine), units=("B", units))


def steps(factors: tuple[float, float, float]) -> np.ndarray:
    """The true affine with its slice, row and column distances multiplied."""
    affine = AFFINE.copy()
    affine[:3, :3] *= factors
    return affine


SROW = (RAS @ AFFINE[:, [2, 1, 0, 3]])[:3]
TALLER = ("12f", *(SROW * [1, 1, 1.34, 1]).ravel())
MIRRORED = ("12f", *(SROW * [-1, 1, 1, 1]).ravel())
MOVED = ("12f", *(SROW + np.eye(3, 4, 3) * 300).ravel())
IDENTITY = nifti(affine=np.eye(4)[[2, 1, 0, 3]])
# Without orientation nibabel assumes that x runs to the left, around the centre of the volume.
UNORIENTED = np.zeros((4, 4))
UNORIENTED[[0, 1, 2], [2, 1, 0]] = 0.8, -0.9, 2.5
UNORIENTED[:, 3] = -0.8 * 2, 0.9 * 2.5, -2.5 * 3, 1


MIDDLE = len(GZ) // 2

NIFTI_ROWS = [
    n("plain", NIFTI),
    n("gzip", GZ, name="scan.nii.gz"),
    n("NIfTI-2", nifti(kind=nib.Nifti2Image), itk="refuses: reads no NIfTI-2"),
    n("big-endian", nifti(order=">")),
    n("big-endian NIfTI-2", nifti(kind=nib.Nifti2Image, order=">"), itk="refuses: reads no NIfTI-2"),
    *(n(f"voxels of {kind}", typed(kind), hu=HU if kind in ("i4", "i8", "f4", "f8") else HU.clip(0, 100))
      for kind in ("u1", "i1", "u2", "u4", "i4", "u8", "i8", "f4", "f8")),
    n("slope and intercept", patched(NIFTI, slope=("f", 2), inter=("f", -24)), hu=HU * 2 - 24),
    n("slope 0 sets nothing", patched(NIFTI, slope=("f", 0), inter=("f", -24)), itk="differs: adds the intercept"),
    n("slope not a number", patched(NIFTI, slope=("f", NAN), inter=("f", 7)), itk="differs: 0 everywhere or NaN"),
    n("slope infinite", patched(NIFTI, slope=("f", float("inf"))), "its header is damaged", nibabel="same: ignores it",
      itk="same: ignores it"),
    n("slope without intercept", patched(NIFTI, slope=("f", 2), inter=("f", NAN)), "its header is damaged",
      nibabel="refuses", itk="differs: NaN voxels"),
    n("one time point", patched(NIFTI, dim=("8h", 4, 5, 6, 7, 1, 1, 1, 1))),
    n("two time points", patched(NIFTI + HU.tobytes(), dim=("8h", 4, 5, 6, 7, 2, 1, 1, 1)), r"holds 2 volumes", itk=NOT_ASKED,
      nibabel=NOT_ASKED),
    *(n(f"called {name}", NIFTI, name=name, nibabel=NOT_ASKED, itk=NOT_ASKED)
      for name in ("scan.nrrd", "scan.mha", "scan.zip", "scan.dcm", "scan.npz")),
    n("gzip, called .tar.gz", GZ, name="scan.tar.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("gzip in gzip", gzip.compress(GZ), "compressed twice", name="scan.nii.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    *(n(f"compressed: {name}", content, f"{word}.*decompress it first", name=name, nibabel=NOT_ASKED, itk=NOT_ASKED)
      for name, content, word in (("scan.nii.bz2", bz2.compress(NIFTI), "bzip2"), ("scan.nii.xz", lzma.compress(NIFTI), "xz"),
                                  ("scan.nii.zst", b"\x28\xb5\x2f\xfd" + bytes(99), "Zstandard"))),
    n("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull",
      name="scan.nii.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("a page of a login", b"<!DOCTYPE html><html>" + bytes(999), "a web page.*download", name="scan.nii.gz",
      nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("gzip under .nii", GZ, nibabel="refuses: by name", itk="refuses: by name"),
    n("not gzip under .nii.gz", NIFTI, name="scan.nii.gz", nibabel="refuses: by name"),
    n("capital suffix", GZ, name="SCAN.NII.GZ"),
    n("another name", NIFTI, name="scan", nibabel="refuses: by name", itk="refuses: by name"),
    n("bytes after the gzip stream", GZ + b"junk" * 9, name="scan.nii.gz", warned="bytes follow the end",
      nibabel="refuses: loses voxels over them"),
    n("zeros after the gzip stream", GZ + bytes(512), name="scan.nii.gz"),
    n("two gzip members", gzip.compress(NIFTI[:500]) + gzip.compress(NIFTI[500:]), name="scan.nii.gz"),
    Row("pair, by its header", "scan.hdr", files("scan.hdr", scan__hdr=HEADER, scan__img=VOXELS), nibabel="same", itk="same"),
    Row("pair, by its voxels", "scan.img", files("scan.img", scan__hdr=HEADER, scan__img=VOXELS), nibabel="same", itk="same"),
    Row("pair, gzip", "scan.hdr.gz",
        files("scan.hdr.gz", scan__hdr__gz=gzip.compress(HEADER), scan__img__gz=gzip.compress(VOXELS)), nibabel="same"),
    Row("pair, capital", "SCAN.HDR", files("SCAN.HDR", SCAN__HDR=HEADER, SCAN__IMG=VOXELS)),
    Row("pair without voxels", "scan.hdr", files("scan.hdr", scan__hdr=HEADER), r"scan\.img, is missing", nibabel="refuses"),
    Row("pair without header", "scan.img", files("scan.img", scan__img=VOXELS), r"scan\.hdr, is missing", nibabel="refuses"),
    Row("pair, voxels cut short", "scan.hdr", files("scan.hdr", scan__hdr=HEADER, scan__img=VOXELS[:-2]), "cut short"),
    n("Analyze", HEADER[:344] + bytes(4), "Analyze 7.5", name="scan.hdr", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("qfac 0", coded(0, 1, qfac=("f", 0))),
    n("quaternion off by rounding", coded(0, 1, quatern=("3f", 0.0, 1.0002, 0.0)), nibabel="refuses",
      affine=np.array([[0, 0, 0.8, -31], [0, -0.9, 0, 7], [-2.5, 0, 0, 55], [0, 0, 0, 1]]), itk="same: normalises too"),
    n("quaternion far off", coded(0, 1, quatern=("3f", 0.9, 0.9, 0)), "its qform is damaged", nibabel="refuses",
      itk="differs: takes it all the same"),
    n("qform alone", coded(0, 1)),
    n("sform alone", coded(1, 0)),
    n("zero sform, good qform", coded(1, 1, srow=("12f", *[0] * 12)), nibabel="differs: an affine of zeros"),
    n("zero sform with an origin", coded(1, 1, srow=("12f", *np.eye(3, 4, 3).ravel())), nibabel="differs: zeros"),
    n("zero sform, no qform", coded(1, 0, srow=("12f", *[0] * 12)), "sform is empty and its qform code 0",
      nibabel="differs: zeros", itk="refuses"),
    n("sform is not a number", coded(1, 1, srow=("12f", *[NAN] * 12)), "sform is damaged", nibabel="differs: NaN",
      itk=NOT_ASKED),
    n("qform is not a number", coded(1, 1, quatern=("3f", NAN, 0, 0)), "qform is damaged", itk=NOT_ASKED),
    n("sform differs in spacing", coded(1, 1, srow=TALLER),
      r"contradicts itself: sform says 0\.8 x 0\.9 x 3\.35 mm.*; qform says 0\.8 x 0\.9 x 2\.5 mm.*--geometry sform\|qform",
      nibabel="differs: the sform, without a word", itk="same: takes the qform, without a word"),
    n("sform mirrored", coded(1, 1, srow=MIRRORED), r"sform says .* towards R, .*; qform says .* towards L, ",
      nibabel="differs: the sform, without a word", itk="differs: one of them, without a word"),
    n("sform, at the user's word", coded(1, 1, srow=TALLER), geometry="sform", affine=steps((1.34, 1, 1)), itk=NOT_ASKED),
    n("qform, at the user's word", coded(1, 1, srow=TALLER), geometry="qform", nibabel="differs: the sform", itk=NOT_ASKED),
    n("header, at the user's word", coded(1, 1, srow=TALLER), geometry="header", warned="taken from the header",
      affine=steps((1.34, 1, 1)), itk=NOT_ASKED),
    n("table, where there is none", coded(1, 1), "no metadata table", geometry="table"),
    n("origins differ", coded(1, 1, srow=MOVED), warned="origins of sform and qform lie 300.0 mm apart",
      affine=AFFINE + np.outer([-300, 0, 0, 0], [0, 0, 0, 1]), itk=NOT_ASKED),
    n("sform differs from pixdim", coded(1, 0, srow=TALLER), r"sform says .*3\.35 mm.*pixdim \(qform\) says .*2\.5 mm",
      nibabel="differs: the sform, without a word", itk=NOT_ASKED),
    n("pixdim left at 1", coded(1, 0, pixdim=("3f", 1, 1, 1)), warned="pixdim was left at its default",
      itk="differs: pixdim's spacing with the sform's directions"),
    n("codes 0", coded(0, 0), "sform and qform codes are both 0", nibabel="differs: assumes an orientation",
      itk="differs: assumes another"),
    n("codes 0, at the user's word", coded(0, 0), geometry="header", warned="codes are both 0", affine=UNORIENTED,
      itk="differs: assumes another"),
    n("codes 0, sform at the user's word", coded(0, 0), geometry="sform", nibabel="differs", itk="differs"),
    n("sform code 300", coded(1, 1, sform_code=("h", 300)), "sform code is 300", nibabel="same: takes it for a code", itk="same: ignores it"),
    n("identity", IDENTITY, "exactly the identity", nibabel="differs: takes it", itk="differs: takes it"),
    n("identity, at the user's word", IDENTITY, geometry="header", warned="exactly the identity", affine=np.array(
        [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])),
    n("micron", scaled(1000, 3), nibabel="differs: ignores the unit"),
    n("metre", scaled(0.001, 1), nibabel="differs: ignores the unit"),
    n("unknown unit is mm", patched(NIFTI, units=("B", 0))),
    n("unit 7", patched(NIFTI, units=("B", 7)), "unit of length has code 7", itk=NOT_ASKED),
    n("seconds beside mm", patched(NIFTI, units=("B", 10))),
    n("mm said to be metres", patched(NIFTI, units=("B", 1)), r"voxels of 800 x 900 x 2500 mm.*another unit",
      itk="differs: metres"),
    n("voxels of 0.05 mm", nifti(affine=steps((1, 1, 1 / 16))), r"0\.1 to 20 mm", affine=steps((1, 1, 1 / 16))),
    n("slices of 25 mm", nifti(affine=steps((10, 1, 1))), r"0\.1 to 20 mm", affine=steps((10, 1, 1))),
    n("voxels that begin in the header", patched(NIFTI, vox_offset=("f", 100)), "cannot begin before byte 352",
      nibabel="refuses", itk="differs: bytes of the header as voxels"),
    n("voxels that begin at 0", patched(NIFTI, vox_offset=("f", 0)), nibabel="differs: its header as voxels", itk=NOT_ASKED),
    n("voxels that begin at no whole byte", patched(NIFTI, vox_offset=("f", 352.5)), "begin at byte", itk=NOT_ASKED),
    n("voxels that begin nowhere", patched(NIFTI, vox_offset=("f", NAN)), "begin at byte", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("voxels that begin behind the end", patched(NIFTI, vox_offset=("f", 1e6)), "cut short", nibabel="refuses",
      itk="differs: other voxels"),
    n("extension of the header", patched(NIFTI[:348] + b"\1\0\0\0" + struct.pack("<2i", 32, 6) + bytes(24) + NIFTI[352:],
                                         vox_offset=("f", 384))),
    n("bitpix of another type", patched(NIFTI, bitpix=("h", 32)), "contradicts itself: 32 bits", itk=NOT_ASKED),
    n("a byte too many", NIFTI + b"\0", "more bytes than the 420", itk="same: reads no further"),
    n("a slice fewer in the header", patched(NIFTI, dim=("4h", 3, 5, 6, 6)), "more bytes than the 360",
      nibabel="differs: leaves a slice out", itk="differs: leaves a slice out"),
    n("a byte too few", NIFTI[:-1], "cut short", nibabel="refuses", itk="differs: other voxels, without a word"),
    n("a byte too few in gzip", gzip.compress(NIFTI[:-1]), "cut short", name="scan.nii.gz", nibabel="refuses", itk="differs: other voxels, without a word"),
    n("a byte too many in gzip", gzip.compress(NIFTI + b"\0"), "more bytes", name="scan.nii.gz", nibabel="same: reads no further",
      itk="same: reads no further"),
    n("gzip cut short", GZ[:-30], "damaged or cut short", name="scan.nii.gz", nibabel="refuses", itk="differs: other voxels, without a word"),
    n("gzip without its trailer", GZ[:-8], "damaged or cut short", name="scan.nii.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("gzip with a wrong checksum", flipped(GZ, len(GZ) - 6), "damaged", name="scan.nii.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("gzip with a wrong length", flipped(GZ, len(GZ) - 4), "damaged", name="scan.nii.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("a flipped bit in gzip", flipped(GZ, MIDDLE), "damaged", name="scan.nii.gz", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("colours", patched(NIFTI, datatype=("h", 128), bitpix=("h", 24)), "are not a CT", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("no such type", patched(NIFTI, datatype=("h", 5)), "are not a CT", nibabel="refuses", itk="refuses"),
    n("one slice", nifti(HU[:1]), "not a volume", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("nine dimensions", patched(NIFTI, dim=("h", 9)), "damaged", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("negative size", patched(NIFTI, dim=("4h", 3, 5, -6, 7)), "not a volume", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("a claim of 70 GB", patched(NIFTI, dim=("4h", 3, 32767, 32767, 32)), "claims 68.7 GB", nibabel=NOT_ASKED, itk=NOT_ASKED),
    n("macOS's ._ file", b"\0\5\x16\7" + bytes(100), "a metadata file of macOS", name="._scan.nii.gz", nibabel="refuses", itk=NOT_ASKED),
    n("nothing", b"", "is empty", nibabel="refuses", itk="refuses"),
    n("something else", b"something" * 100, "not a NIfTI file", nibabel="refuses", itk="refuses"),
]  # fmt: skip


@pytest.mark.parametrize("row", NIFTI_ROWS, ids=lambda row: row.what)
def test_situation(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)
