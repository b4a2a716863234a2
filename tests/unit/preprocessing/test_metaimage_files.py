"""MetaImage files from unknown sources: one row per situation."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.unit.preprocessing.file_situations import NOT_ASKED, RAW, STRAIGHT, Row, check, files, itk, linked_out, piped
from tests.unit.preprocessing.scan_files import AFFINE, HU, flipped, meta, meta_header

ZLIB = meta(CompressedData="True")
TURN = np.eye(4)
TURN[:3, :3] = (AFFINE[:3, 2::-1] / [0.8, 0.9, 2.5]).T
FOUR = " ".join(f"{v:.9g}" for v in TURN.ravel())

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
    itk("detached, a path of Windows", "scan.mhd",
        files("scan.mhd", scan__mhd=meta(b"", ElementDataFile="below\\scan.raw"), below___scan__raw=RAW), itk=NOT_ASKED),
    itk("detached, a name in other letters", "scan.mhd",
        files("scan.mhd", scan__mhd=meta(b"", ElementDataFile="Scan.raw"), scan__RAW=RAW), itk="refuses"),
    itk("named by its voxels", "scan.raw", RAW, "holds only voxels; give its header", itk=NOT_ASKED),
    itk("one volume of four axes", "scan.mha", meta(
        NDims="4", DimSize="5 6 7 1", ElementSpacing="0.8 0.9 2.5 1", Offset="-31 7 55 0", TransformMatrix=FOUR), itk=NOT_ASKED),
    itk("two volumes", "scan.mha", meta(
        2 * RAW, NDims="4", DimSize="5 6 7 2", ElementSpacing="0.8 0.9 2.5 1", Offset="-31 7 55 0", TransformMatrix=FOUR),
        "has 4 dimensions", itk=NOT_ASKED),
    itk("called .nii.gz", "scan.nii.gz", meta(), itk=NOT_ASKED),
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
    itk("ElementSize instead", "scan.mha", meta(ElementSpacing=None, ElementSize="0.8 0.9 2.5"), warned="ElementSize is used",
        itk="same: without a word"),
    itk("no directions", "scan.mha", meta(TransformMatrix=None, Offset=None), warned="no TransformMatrix", affine=STRAIGHT),
    itk("no directions, another orientation", "scan.mha", meta(TransformMatrix=None, AnatomicalOrientation="LPS"),
        "AnatomicalOrientation, but no TransformMatrix", itk="differs: ignores it"),
    itk("identity", "scan.mha", meta(TransformMatrix="1 0 0 0 1 0 0 0 1", Offset="0 0 0", ElementSpacing="1 1 1"),
        "exactly the identity", itk="differs: takes it"),
    itk("micron", "scan.mha", meta(ElementSpacing="800 900 2500", Offset="-31000 7000 55000", DistanceUnits="um"),
        itk="differs: ignores the unit"),
    itk("a unit that is none", "scan.mha", meta(DistanceUnits="furlong"), "names an unknown unit", itk=NOT_ASKED),
    itk("negative spacing", "scan.mha", meta(ElementSpacing="0.8 0.9 -2.5"), "not positive", itk=NOT_ASKED),
    itk("directions of length 2", "scan.mha", meta(TransformMatrix="2 0 0 0 1 0 0 0 1"), "holds no directions", itk=NOT_ASKED),
    itk("spacing of metres", "scan.mha", meta(ElementSpacing="0.0008 0.0009 0.0025"), r"0\.1 to 20 mm", itk=NOT_ASKED),
    itk("66 dimensions", "scan.mha", meta(NDims="66"), "has 66 dimensions", itk="not asked: it ends the process"),
    itk("-1 dimensions", "scan.mha", meta(NDims="-1"), "has -1 dimensions", itk="not asked: it ends the process"),
    itk("three channels", "scan.mha", meta(ElementNumberOfChannels="3"), "3 values per voxel", itk=NOT_ASKED),
    itk("no DimSize", "scan.mha", meta(DimSize=None), "'DimSize' of its header is missing", itk=NOT_ASKED),
    itk("a field twice", "scan.mha", b"DimSize = 5 6 6\n" + meta(), "appears twice", itk=NOT_ASKED),
    itk("a field of 5,000 characters", "scan.mha", meta(Offset="0 " * 2500), "has 4999 characters", itk=NOT_ASKED),
    itk("text", "scan.mha", meta(BinaryData="False"), "written as text", itk=NOT_ASKED),
    itk("an unknown type", "scan.mha", meta(ElementType="MET_SHORT_ARRAY"), "a type that no CT has", itk=NOT_ASKED),
    itk("a claim of 15 TB", "scan.mha", meta(DimSize="90000 90000 900"), "claims 14580.0 GB", itk=NOT_ASKED),
    itk("a control character for a sign", "scan.mha", meta(Offset="\r31 7 55"), "'Offset' of its header holds a control", itk=NOT_ASKED),
    itk("a flipped bit in zlib", "scan.mha", flipped(ZLIB, len(ZLIB) - 30), "damaged", itk=NOT_ASKED),
    itk("a wrong checksum", "scan.mha", flipped(ZLIB, len(ZLIB) - 2), "damaged", itk=NOT_ASKED),
    itk("zlib cut short", "scan.mha", ZLIB[:-20], "damaged or cut short", itk=NOT_ASKED),
    itk("bytes after the zlib stream", "scan.mha", ZLIB + b"junk", warned="bytes follow the end", itk=NOT_ASKED),
    itk("a byte too few", "scan.mha", meta(RAW[:-1]), "cut short", itk="refuses"),
    itk("a byte too many", "scan.mha", meta(RAW + b"\0"), "more bytes", itk="same: reads no further"),
    itk("a header that does not end", "scan.mha", meta()[:100], "not a MetaImage file", itk="refuses"),
]  # fmt: skip


@pytest.mark.parametrize("row", META_ROWS, ids=lambda row: row.what)
def test_situation(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)
