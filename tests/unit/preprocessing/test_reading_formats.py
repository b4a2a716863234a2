"""Any volume file a stranger brings: the right voxels in the right place, or a refusal that says why.

One row a situation. What is accepted is compared voxel by voxel, at its place in the patient, with the truth it was built
from. ``nibabel`` and ``itk`` say what those make of the same bytes ("same", "refuses", or how they differ and why we are
right), and that is tested too, wherever they can be asked without ending the process.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.geometry_check import Geometry, settle
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.volume import Volume
from tests.unit.preprocessing.scan_files import (
    AFFINE,
    HU,
    RAS,
    flipped,
    meta,
    meta_header,
    nifti,
    nrrd,
    nrrd_header,
    patched,
    tarred,
    written,
    zipped,
)

NIFTI = nifti()
NAN = float("nan")
NOT_ASKED = "not asked"


@dataclass(frozen=True)
class Row:
    """``name`` of the file that is read and its ``content`` (bytes, or a function that fills a folder and returns the
    path); ``refused`` or ``warned`` by words, else read without a word. ``affine`` and ``hu`` where the truth is other."""

    what: str
    name: str
    content: bytes | Callable[[Path], Path]
    refused: str = ""
    warned: str = ""
    geometry: Geometry = "auto"
    affine: np.ndarray | None = None
    hu: np.ndarray | None = None
    nibabel: str = NOT_ASKED
    itk: str = NOT_ASKED


def n(what: str, content: bytes, refused: str = "", name: str = "scan.nii", nibabel: str = "same", itk: str = "same", **more) -> Row:  # type: ignore[no-untyped-def]  # fmt: skip
    return Row(what, name, content, refused, nibabel=nibabel, itk=itk, **more)


def itk(what: str, name: str, content, refused: str = "", itk: str = "same", **more) -> Row:  # type: ignore[no-untyped-def]  # fmt: skip
    return Row(what, name, content, refused, itk=itk, **more)


def files(named: str, **others: bytes) -> Callable[[Path], Path]:
    """Several files; ``__`` in a name stands for a full stop and ``___`` for a folder."""

    def build(folder: Path) -> Path:
        for name, content in others.items():
            written(folder, name.replace("___", "/").replace("__", "."), content)
        return folder / named

    return build


def piped(named: str, content: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        os.mkfifo(folder / "voxels.raw")
        return written(folder, named, content)

    return build


def linked_out(folder: Path) -> Path:
    below = folder / "below"
    below.mkdir()
    written(folder, "secret.raw", HU.tobytes())
    (below / "scan.raw").symlink_to(folder / "secret.raw")
    return written(below, "scan.mhd", meta_header(ElementDataFile="scan.raw"))


def split(content: bytes) -> tuple[bytes, bytes]:
    """A single NIfTI file as the two of a pair."""
    return patched(content, magic=("4s", b"ni1\0"), vox_offset=("f", 0))[:348], content[352:]


def typed(kind: str) -> bytes:
    return nifti(HU.clip(0, 100).astype(kind) if kind in ("u1", "i1", "u2", "u4", "u8") else HU.astype(kind))


def coded(sform: int, qform: int, **fields: tuple) -> bytes:  # type: ignore[type-arg]
    return patched(nifti(codes=(sform, qform)), **fields)


def scaled(factor: float, units: int) -> bytes:
    affine = AFFINE.copy()
    affine[:3] *= factor
    return patched(nifti(affine=affine), units=("B", units))


def steps(factors: tuple[float, float, float]) -> np.ndarray:
    """The truth with its slice, row and column distances multiplied."""
    affine = AFFINE.copy()
    affine[:3, :3] *= factors
    return affine


SROW = (RAS @ AFFINE[:, [2, 1, 0, 3]])[:3]
TALLER = ("12f", *(SROW * [1, 1, 1.34, 1]).ravel())
MIRRORED = ("12f", *(SROW * [-1, 1, 1, 1]).ravel())
MOVED = ("12f", *(SROW + np.eye(3, 4, 3) * 300).ravel())
IDENTITY = nifti(affine=np.eye(4)[[2, 1, 0, 3]])
# Without orientation nibabel assumes that x runs to the left, about the volume's centre.
UNORIENTED = np.zeros((4, 4))
UNORIENTED[[0, 1, 2], [2, 1, 0]] = 0.8, -0.9, 2.5
UNORIENTED[:, 3] = -0.8 * 2, 0.9 * 2.5, -2.5 * 3, 1
HEADER, VOXELS = split(NIFTI)
GZ = gzip.compress(NIFTI)
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
    n("macOS's ._ file", b"\0\5\x16\7" + bytes(100), "what macOS keeps", name="._scan.nii.gz", nibabel="refuses", itk=NOT_ASKED),
    n("nothing", b"", "is empty", nibabel="refuses", itk="refuses"),
    n("something else", b"<html>" * 100, "not a NIfTI file", nibabel="refuses", itk="refuses"),
]  # fmt: skip

DIRECTIONS = "(1,0,0) (0,1,0) (0,0,1)"
RAW = HU.tobytes()
PACKED = nrrd(encoding="gzip")
BODY = len(nrrd_header(encoding="gzip")) + 1
RASPED = " ".join(f"({-c[0]:.9g},{-c[1]:.9g},{c[2]:.9g})" for c in AFFINE[:3, 2::-1].T)
MICRON = " ".join("({:.9g},{:.9g},{:.9g})".format(*(1000 * c)) for c in AFFINE[:3, 2::-1].T)
STRAIGHT = np.array([[0, 0, 0.8, 0], [0, 0.9, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])

NRRD_ROWS = [
    itk("raw", "scan.nrrd", nrrd()),
    itk("gzip", "scan.nrrd", PACKED),
    itk("bzip2", "scan.nrrd", nrrd(encoding="bzip2"), itk="refuses: built without it"),
    itk("capital suffix", "SCAN.NRRD", nrrd(), itk=NOT_ASKED),
    itk("big-endian", "scan.nrrd", nrrd(HU.astype(">i2").tobytes(), endian="big")),
    itk("float", "scan.nrrd", nrrd(HU.astype("f4").tobytes(), type="float")),
    itk("lines of Windows", "scan.nrrd", nrrd_header().replace("\n", "\r\n").encode() + b"\r\n" + RAW),
    itk("a long key", "scan.nrrd", (nrrd_header() + "note:=" + "x" * 5000 + "\n\n").encode() + RAW, itk=NOT_ASKED),
    itk("detached", "scan.nhdr", files("scan.nhdr", scan__nhdr=nrrd(b"", data_file="scan.raw"), scan__raw=RAW)),
    itk("detached, in a folder below", "scan.nhdr",
        files("scan.nhdr", scan__nhdr=nrrd(b"", data_file="below/scan.raw"), below___scan__raw=RAW)),
    itk("detached, gzip", "scan.nhdr", files(
        "scan.nhdr", scan__nhdr=nrrd(b"", data_file="scan.raw.gz", encoding="gzip"), scan__raw__gz=gzip.compress(RAW))),
    itk("detached, missing", "scan.nhdr", nrrd(b"", data_file="scan.raw"), r"scan\.nhdr: .*scan\.raw, is missing", itk="refuses"),
    itk("detached, above", "scan.nhdr", nrrd(b"", data_file="../scan.raw"), "not in its own folder", itk=NOT_ASKED),
    itk("detached, absolute", "scan.nhdr", nrrd(b"", data_file="/etc/passwd"), "not in its own folder", itk=NOT_ASKED),
    itk("detached, a pattern", "scan.nhdr", nrrd(b"", data_file="s%03d.raw 1 7 1"), "not in its own folder", itk=NOT_ASKED),
    itk("detached, a list", "scan.nhdr", nrrd(b"", data_file="LIST"), "several files", itk=NOT_ASKED),
    itk("detached, a pipe", "scan.nhdr", piped("scan.nhdr", nrrd_header(data_file="voxels.raw")), "is not a file", itk=NOT_ASKED),
    itk("bytes before the voxels", "scan.nhdr", files(
        "scan.nhdr", scan__nhdr=nrrd(b"", data_file="scan.raw", byte_skip="9"), scan__raw=b"preceding" + RAW)),
    itk("voxels that end the file", "scan.nhdr", files(
        "scan.nhdr", scan__nhdr=nrrd(b"", data_file="scan.raw", byte_skip="-1"), scan__raw=b"preceding" + RAW)),
    itk("right-anterior-superior", "scan.nrrd", nrrd(
        space="right-anterior-superior", space_directions=RASPED, space_origin="(31,-7,55)")),
    itk("micron", "scan.nrrd", nrrd(space_directions=MICRON, space_origin="(-31000,7000,55000)", space_units='"um" "um" "um"'),
        itk="differs: ignores the unit"),
    itk("a unit that is none", "scan.nrrd", nrrd(space_units='"px" "px" "px"'), "no single unit of length", itk=NOT_ASKED),
    itk("no spacings, no directions", "scan.nrrd", nrrd(space_directions=None, space_origin=None),
        "states neither spacings nor directions", itk="differs: 1 mm without a word"),
    itk("no directions", "scan.nrrd", nrrd(space_directions=None, space_origin=None, space=None, spacings="0.8 0.9 2.5"),
        "states spacings, but no orientation", itk="differs: assumes an orientation"),
    itk("no directions, at the user's word", "scan.nrrd", nrrd(space_directions=None, space_origin=None, space=None,
        spacings="0.8 0.9 2.5"), warned="no orientation", geometry="header", affine=STRAIGHT),
    itk("no space", "scan.nrrd", nrrd(space=None, space_dimension="3"), "no anatomical space", itk=NOT_ASKED),
    itk("a space of the scanner", "scan.nrrd", nrrd(space="scanner-xyz"), "no anatomical space", itk=NOT_ASKED),
    itk("identity", "scan.nrrd", nrrd(space_directions=DIRECTIONS, space_origin="(0,0,0)"), "exactly the identity",
        itk="differs: takes it"),
    itk("spacings against directions", "scan.nrrd", nrrd(spacings="0.8 0.9 5"), "contradicts itself: directions", itk=NOT_ASKED),
    itk("spacing of 0", "scan.nrrd", nrrd(space_directions=None, spacings="0.8 0.9 0"), "no usable spacings", itk=NOT_ASKED),
    itk("directions that are none", "scan.nrrd", nrrd(space_directions="none none none"), "not 3 vectors", itk=NOT_ASKED),
    itk("degenerate directions", "scan.nrrd", nrrd(space_directions="(1,0,0) (1,0,0) (0,0,1)"), "degenerate", itk=NOT_ASKED),
    itk("no endian", "scan.nrrd", nrrd(endian=None), "'endian'", itk="refuses"),
    itk("no sizes", "scan.nrrd", nrrd(sizes=None), "'sizes' of its header is missing", itk="refuses"),
    itk("text", "scan.nrrd", nrrd(b"1 2 3", encoding="ascii"), "encoded as text", itk=NOT_ASKED),
    itk("two dimensions", "scan.nrrd", nrrd(dimension="2", sizes="5 6"), "has 2 dimensions", itk=NOT_ASKED),
    itk("sizes that are not three", "scan.nrrd", nrrd(sizes="5 6"), "not 3 whole numbers", itk="refuses"),
    itk("sizes that are not whole", "scan.nrrd", nrrd(sizes="5 6 7.5"), "not 3 whole numbers", itk=NOT_ASKED),
    itk("a vector in each voxel", "scan.nrrd", nrrd(kinds="vector domain domain"), "not all of space", itk=NOT_ASKED),
    itk("a field of 1,100 characters", "scan.nrrd", nrrd(kinds="A" * 1100), "'kinds' of its header has 1100 characters",
        itk="not asked: it ends the process"),
    itk("a field that NRRD has not", "scan.nrrd", nrrd(spcae="x"), "none of NRRD's fields", itk="refuses"),
    itk("a field twice", "scan.nrrd", (nrrd_header() + "sizes: 5 6 7\n\n").encode() + RAW, "stands twice", itk="refuses"),
    itk("a header that does not end", "scan.nrrd", nrrd_header().encode(), "cut short", itk="refuses"),
    itk("a claim of 11 GB", "scan.nrrd", nrrd(sizes="90000 90000 900"), "claims 14580.0 GB", itk=NOT_ASKED),
    itk("a flipped bit in gzip", "scan.nrrd", flipped(PACKED, len(PACKED) - 30), "damaged", itk=NOT_ASKED),
    itk("a wrong checksum", "scan.nrrd", flipped(PACKED, len(PACKED) - 7), "damaged", itk="refuses"),
    itk("gzip cut short", "scan.nrrd", PACKED[:-20], "damaged or cut short", itk=NOT_ASKED),
    itk("a flipped bit in bzip2", "scan.nrrd", flipped(nrrd(encoding="bzip2"), len(nrrd(encoding="bzip2")) - 30), "damaged"
        , itk=NOT_ASKED),
    itk("a byte too few", "scan.nrrd", nrrd(RAW[:-1]), "cut short", itk="refuses"),
    itk("a byte too many", "scan.nrrd", nrrd(RAW + b"\0"), "more bytes", itk="same: reads no further"),
    itk("not an NRRD", "scan.nrrd", b"NRXD0004\n\n", "not an NRRD file", itk="refuses"),
]  # fmt: skip

ZLIB = meta(CompressedData="True")
META_ROWS = [
    itk("raw", "scan.mha", meta()),
    itk("zlib", "scan.mha", ZLIB, itk=NOT_ASKED),
    itk("zlib with its size", "scan.mha", meta(CompressedData="True", CompressedDataSize=str(len(zlib.compress(RAW))))),
    itk("a gzip stream", "scan.mha", meta(gzip.compress(RAW), CompressedData="True",
                                          CompressedDataSize=str(len(gzip.compress(RAW))))),
    itk("capital suffix", "SCAN.MHA", meta(), itk=NOT_ASKED),
    itk("big-endian", "scan.mha", meta(HU.astype(">i2").tobytes(), BinaryDataByteOrderMSB="True")),
    itk("double", "scan.mha", meta(HU.astype("f8").tobytes(), ElementType="MET_DOUBLE")),
    itk("long is four bytes", "scan.mha", meta(HU.astype("i4").tobytes(), ElementType="MET_LONG")),
    itk("older names", "scan.mha", meta(TransformMatrix=None, Offset=None, Position="-31 7 55", ElementByteOrderMSB="False",
        BinaryDataByteOrderMSB=None, Orientation=meta_header().split("TransformMatrix = ")[1].split("\n")[0])),
    itk("fields that nobody knows", "scan.mha", meta(ITK_InputFilterName="NrrdImageIO", Comment="x" * 3000), itk=NOT_ASKED),
    itk("detached", "scan.mhd", files("scan.mhd", scan__mhd=meta(b"", ElementDataFile="scan.raw"), scan__raw=RAW)),
    itk("detached, in a folder below", "scan.mhd",
        files("scan.mhd", scan__mhd=meta(b"", ElementDataFile="below/scan.raw"), below___scan__raw=RAW)),
    itk("detached, zlib", "scan.mhd", files("scan.mhd", scan__mhd=meta(
        b"", ElementDataFile="scan.zraw", CompressedData="True", CompressedDataSize=str(len(zlib.compress(RAW)))),
        scan__zraw=zlib.compress(RAW))),
    itk("detached, a name with blanks", "scan.mhd",
        files("scan.mhd", **{"scan__mhd": meta(b"", ElementDataFile="my scan.raw"), "my scan__raw": RAW})),
    itk("bytes before the voxels", "scan.mhd", files(
        "scan.mhd", scan__mhd=meta(b"", HeaderSize="9", ElementDataFile="scan.raw"), scan__raw=b"preceding" + RAW)),
    itk("voxels that end the file", "scan.mhd", files(
        "scan.mhd", scan__mhd=meta(b"", HeaderSize="-1", ElementDataFile="scan.raw"), scan__raw=b"preceding" + RAW)),
    itk("detached, missing", "scan.mhd", meta(b"", ElementDataFile="scan.raw"), r"scan\.mhd: .*scan\.raw, is missing", itk="refuses"),
    itk("detached, above", "scan.mhd", meta(b"", ElementDataFile="../scan.raw"), "not in its own folder", itk=NOT_ASKED),
    itk("detached, absolute", "scan.mhd", meta(b"", ElementDataFile="/dev/zero"), "not in its own folder", itk=NOT_ASKED),
    itk("detached, a format string", "scan.mhd", meta(b"", ElementDataFile="%s%s%n 1 66 1"), "not in its own folder",
        itk="not asked: it ends the process"),
    itk("detached, a pipe", "scan.mhd", piped("scan.mhd", meta_header(ElementDataFile="voxels.raw")), "is not a file",
        itk="not asked: it waits for ever"),
    itk("detached, a link out of the folder", "scan.mhd", linked_out, "leads out of its folder", itk=NOT_ASKED),
    itk("detached, a list", "scan.mhd", meta(b"", ElementDataFile="LIST"), "several files", itk=NOT_ASKED),
    itk("no spacing", "scan.mha", meta(ElementSpacing=None), "states no spacing", itk="differs: 1 mm without a word"),
    itk("ElementSize instead", "scan.mha", meta(ElementSpacing=None, ElementSize="0.8 0.9 2.5"), warned="ElementSize is taken",
        itk="same: without a word"),
    itk("no directions", "scan.mha", meta(TransformMatrix=None, Offset=None), warned="no TransformMatrix", affine=STRAIGHT),
    itk("no directions, another orientation", "scan.mha", meta(TransformMatrix=None, AnatomicalOrientation="LPS"),
        "AnatomicalOrientation, but no TransformMatrix", itk="differs: ignores it"),
    itk("identity", "scan.mha", meta(TransformMatrix="1 0 0 0 1 0 0 0 1", Offset="0 0 0", ElementSpacing="1 1 1"),
        "exactly the identity", itk="differs: takes it"),
    itk("micron", "scan.mha", meta(ElementSpacing="800 900 2500", Offset="-31000 7000 55000", DistanceUnits="um"),
        itk="differs: ignores the unit"),
    itk("a unit that is none", "scan.mha", meta(DistanceUnits="furlong"), "no unit that is known", itk=NOT_ASKED),
    itk("negative spacing", "scan.mha", meta(ElementSpacing="0.8 0.9 -2.5"), "not positive", itk=NOT_ASKED),
    itk("directions of length 2", "scan.mha", meta(TransformMatrix="2 0 0 0 1 0 0 0 1"), "holds no directions", itk=NOT_ASKED),
    itk("spacing of metres", "scan.mha", meta(ElementSpacing="0.0008 0.0009 0.0025"), r"0\.1 to 20 mm", itk=NOT_ASKED),
    itk("66 dimensions", "scan.mha", meta(NDims="66"), "has 66 dimensions", itk="not asked: it ends the process"),
    itk("-1 dimensions", "scan.mha", meta(NDims="-1"), "has -1 dimensions", itk="not asked: it ends the process"),
    itk("three channels", "scan.mha", meta(ElementNumberOfChannels="3"), "3 values a voxel", itk=NOT_ASKED),
    itk("no DimSize", "scan.mha", meta(DimSize=None), "'DimSize' of its header is missing", itk=NOT_ASKED),
    itk("a field twice", "scan.mha", b"DimSize = 5 6 6\n" + meta(), "stands twice", itk=NOT_ASKED),
    itk("a field of 5,000 characters", "scan.mha", meta(Offset="0 " * 2500), "has 4999 characters", itk=NOT_ASKED),
    itk("text", "scan.mha", meta(BinaryData="False"), "written as text", itk=NOT_ASKED),
    itk("an unknown type", "scan.mha", meta(ElementType="MET_SHORT_ARRAY"), "no type that a CT has", itk=NOT_ASKED),
    itk("a claim of 15 TB", "scan.mha", meta(DimSize="90000 90000 900"), "claims 14580.0 GB", itk=NOT_ASKED),
    itk("a flipped bit in zlib", "scan.mha", flipped(ZLIB, len(ZLIB) - 30), "damaged", itk=NOT_ASKED),
    itk("a wrong checksum", "scan.mha", flipped(ZLIB, len(ZLIB) - 2), "damaged", itk=NOT_ASKED),
    itk("zlib cut short", "scan.mha", ZLIB[:-20], "damaged or cut short", itk=NOT_ASKED),
    itk("bytes after the zlib stream", "scan.mha", ZLIB + b"junk", warned="bytes follow the end", itk=NOT_ASKED),
    itk("a byte too few", "scan.mha", meta(RAW[:-1]), "cut short", itk="refuses"),
    itk("a byte too many", "scan.mha", meta(RAW + b"\0"), "more bytes", itk="same: reads no further"),
    itk("a header that does not end", "scan.mha", meta()[:100], "not a MetaImage file", itk="refuses"),
]  # fmt: skip

DETACHED = {"study/scan.mhd": meta(b"", ElementDataFile="scan.raw"), "study/scan.raw": RAW}
ARCHIVE_ROWS = [
    Row("zip of NIfTI", "scan.zip", zipped({"scan.nii.gz": GZ})),
    Row("zip by content", "scan", zipped({"scan.nii.gz": GZ})),
    Row("zip of NRRD", "scan.zip", zipped({"a/b/SCAN.NRRD": nrrd()})),
    Row("zip with macOS's files", "scan.zip", zipped({"s/scan.nii.gz": GZ, "__MACOSX/s/._scan.nii.gz": b"\0\5\x16\7", ".DS_Store": b"x"})),
    Row("zip of a detached header", "scan.zip", zipped(DETACHED)),
    Row("zip of a pair", "scan.zip", zipped({"scan.hdr": HEADER, "scan.img": VOXELS})),
    Row("zip in a zip", "scan.zip", zipped({"inner.zip": zipped({"scan.nii.gz": GZ}), "readme.txt": b"x"})),
    Row("zip in zips without end", "scan.zip", zipped({"a.zip": zipped({"b.zip": zipped({"c.zip": zipped({"scan.nii": NIFTI})})})}),
        "archives in archives"),
    Row("tar.gz", "scan.tar.gz", tarred({"s/scan.nii.gz": GZ})),
    Row("tgz of a detached header", "scan.tgz", tarred(DETACHED)),
    Row("tar", "scan.tar", tarred({"scan.nii": NIFTI}, "w")),
    Row("tar.bz2 by content", "scan", tarred({"scan.nii": NIFTI}, "w:bz2")),
    Row("tar with a name of 300 letters", "scan.tar", tarred({"n" * 300 + "/scan.nii": NIFTI}, "w")),
    Row("zip with names that lead out", "scan.zip", zipped({"../../scan.nii": NIFTI})),
    Row("tar with names that lead out", "scan.tar", tarred({"/tmp/../../scan.nii": NIFTI}, "w")),
    Row("two volumes", "scan.zip", zipped({"a.nii": NIFTI, "b.nii": NIFTI}), "holds 2 volumes"),
    Row("one name twice", "scan.tar", lambda folder: written(folder, "scan.tar", tarred({"./a.nii": NIFTI, "a.nii": GZ}, "w")),
        "not a readable archive"),
    Row("encrypted", "scan.zip", flipped(flipped(zipped({"a.nii": NIFTI}), 6), zipped({"a.nii": NIFTI}).index(b"PK\1\2") + 8),
        "encrypted"),
    Row("zip of nothing", "scan.zip", zipped({"readme.txt": b"x"}), "no DICOM slices"),
    Row("zip with a wrong checksum", "scan.zip", flipped(zipped({"a.nii": NIFTI}), 60), "not a readable archive"),
    Row("zip cut short", "scan.zip", zipped({"a.nii": NIFTI})[:-30], "not a readable archive"),
    Row("tar.gz cut short", "scan.tar.gz", tarred({"a.nii": NIFTI})[:-30], "not a readable archive"),
    Row("the volume in it is damaged", "scan.zip", zipped({"a.nii": NIFTI[:-1]}), r"scan\.zip: cut short"),
]  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(r, id=f"{k}: {r.what}") for k, rows in (
    ("nifti", NIFTI_ROWS), ("nrrd", NRRD_ROWS), ("meta", META_ROWS), ("archive", ARCHIVE_ROWS)) for r in rows])  # fmt: skip
def test_situation(row: Row, tmp_path: Path) -> None:
    path = row.content(tmp_path) if callable(row.content) else written(tmp_path, row.name, row.content)
    if row.refused:
        with pytest.raises(PreprocessingError, match=row.refused) as refused:
            settle(read(path, geometry=row.geometry), None, row.geometry)
        assert str(refused.value).startswith(f"{path}: ")
        assert "\n" not in str(refused.value)
    else:
        volume = settle(read(path, geometry=row.geometry), None, row.geometry)
        assert same(volume, row), "other voxels, or at another place"
        assert row.warned in " ".join(volume.warnings)
        assert bool(row.warned) == bool(volume.warnings), volume.warnings
    for name, said, ask in (("nibabel", row.nibabel, by_nibabel), ("itk", row.itk, by_itk)):
        if not said.startswith(NOT_ASKED):
            assert (name, answer(ask, path, row)) == (name, said.partition(":")[0])


def same(volume: Volume, row: Row) -> bool:
    """Whether every voxel has its value where the truth has it; arrays may lie any way round."""
    hu, affine = HU if row.hu is None else row.hu, AFFINE if row.affine is None else row.affine
    index = np.indices(volume.array.shape).reshape(3, -1)
    place = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    there = np.linalg.inv(affine[:3, :3]) @ (place - affine[:3, 3:])
    near = there.round().astype(int)
    inside = volume.array.size == hu.size and np.abs(there - near).max() < 1e-2 and near.min() >= 0
    if not inside or (near.max(axis=1) >= np.array(hu.shape)).any():
        return False
    return bool(np.array_equal(volume.array.reshape(-1), hu[tuple(near)]))


def answer(ask: Callable[[Path], Volume], path: Path, row: Row) -> str:
    try:
        volume = ask(path)
    except Exception:
        return "refuses"
    return "same" if same(volume, row) else "differs"


def by_nibabel(path: Path) -> Volume:
    image = nib.load(path)
    array = np.asarray(image.dataobj)
    return Volume(array.reshape(array.shape[:3]), RAS @ image.affine, "")


def by_itk(path: Path) -> Volume:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image), affine, "")
