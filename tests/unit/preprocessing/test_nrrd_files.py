"""NRRD files from unknown sources: one row per situation."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.unit.preprocessing.file_situations import NOT_ASKED, RAW, STRAIGHT, Row, check, files, itk, piped
from tests.unit.preprocessing.scan_files import AFFINE, HU, flipped, nrrd, nrrd_header

DIRECTIONS = "(1,0,0) (0,1,0) (0,0,1)"
PACKED = nrrd(encoding="gzip")
BODY = len(nrrd_header(encoding="gzip")) + 1
ALONG = " ".join("({:.9g},{:.9g},{:.9g})".format(*c) for c in AFFINE[:3, 2::-1].T)
RASPED = " ".join(f"({-c[0]:.9g},{-c[1]:.9g},{c[2]:.9g})" for c in AFFINE[:3, 2::-1].T)
MICRON = " ".join("({:.9g},{:.9g},{:.9g})".format(*(1000 * c)) for c in AFFINE[:3, 2::-1].T)


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
    itk("detached, a path of Windows", "scan.nhdr", files(
        "scan.nhdr", scan__nhdr=nrrd(b"", data_file="below\\scan.raw"), below___scan__raw=RAW), itk=NOT_ASKED),
    itk("detached, above by a path of Windows", "scan.nhdr", nrrd(b"", data_file="..\\scan.raw"), "not in its own folder",
        itk=NOT_ASKED),
    itk("one volume of a list", "scan.nrrd", nrrd(dimension="4", sizes="1 5 6 7", kinds="list domain domain domain",
        space_directions=f"none {ALONG}"), itk="same"),
    itk("one volume in time", "scan.nrrd", nrrd(dimension="4", sizes="5 6 7 1", kinds="domain domain domain time",
        space_directions=f"{ALONG} none"), itk="refuses"),
    itk("two volumes", "scan.nrrd", nrrd(2 * RAW, dimension="4", sizes="5 6 7 2", kinds="domain domain domain list",
        space_directions=f"{ALONG} none"), "several volumes, or several values", itk=NOT_ASKED),
    itk("colours", "scan.nrrd", nrrd(3 * RAW, dimension="4", sizes="3 5 6 7", kinds="RGB-color domain domain domain",
        space_directions=f"none {ALONG}"), "several volumes, or several values", itk=NOT_ASKED),
    itk("four axes, described as three", "scan.nrrd", nrrd(dimension="4", sizes="5 6 7 1", kinds=None), "is not of 4 axes",
        itk=NOT_ASKED),
    itk("microns", "scan.nrrd", nrrd(space_directions=MICRON, space_origin="(-31000,7000,55000)",
        space_units=" ".join(['"microns"'] * 3)), itk=NOT_ASKED),
    itk("gzip outside of its own", "scan.nrrd.gz", gzip.compress(nrrd()), "compressed .gzip.*decompress it first", itk=NOT_ASKED),
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
    itk("a vector in each voxel", "scan.nrrd", nrrd(kinds="vector domain domain"), "not all of its axes are spatial", itk=NOT_ASKED),
    itk("a field of 1,100 characters", "scan.nrrd", nrrd(kinds="A" * 1100), "'kinds' of its header has 1100 characters",
        itk="not asked: it ends the process"),
    itk("a field that NRRD has not", "scan.nrrd", nrrd(spcae="x"), "not an NRRD field", itk="refuses"),
    itk("a field twice", "scan.nrrd", (nrrd_header() + "sizes: 5 6 7\n\n").encode() + RAW, "appears twice", itk="refuses"),
    itk("a header that does not end", "scan.nrrd", nrrd_header().encode(), "cut short", itk="refuses"),
    itk("a claim of 11 GB", "scan.nrrd", nrrd(sizes="90000 90000 900"), "claims 14580.0 GB", itk=NOT_ASKED),
    itk("a control character for a sign", "scan.nrrd", nrrd(space_origin="(-31,\r7,55)"), "'space origin' of its header holds a control",
        itk="refuses"),
    itk("a flipped bit in gzip", "scan.nrrd", flipped(PACKED, len(PACKED) - 30), "damaged", itk=NOT_ASKED),
    itk("a wrong checksum", "scan.nrrd", flipped(PACKED, len(PACKED) - 7), "damaged", itk="refuses"),
    itk("gzip cut short", "scan.nrrd", PACKED[:-20], "damaged or cut short", itk=NOT_ASKED),
    itk("a flipped bit in bzip2", "scan.nrrd", flipped(nrrd(encoding="bzip2"), len(nrrd(encoding="bzip2")) - 30), "damaged"
        , itk=NOT_ASKED),
    itk("a byte too few", "scan.nrrd", nrrd(RAW[:-1]), "cut short", itk="refuses"),
    itk("a byte too many", "scan.nrrd", nrrd(RAW + b"\0"), "more bytes", itk="same: reads no further"),
    itk("not an NRRD", "scan.nrrd", b"NRXD0004\n\n", "not an NRRD file", itk="refuses"),
]  # fmt: skip


@pytest.mark.parametrize("row", NRRD_ROWS, ids=lambda row: row.what)
def test_situation(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)
