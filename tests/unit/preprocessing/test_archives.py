"""Volumes in archives: one row per situation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.preprocessing.file_situations import DETACHED, GZ, HEADER, NIFTI, VOXELS, Row, check
from tests.unit.preprocessing.scan_files import flipped, nrrd, tarred, written, zipped

ARCHIVE_ROWS = [
    Row("zip of NIfTI", "scan.zip", zipped({"scan.nii.gz": GZ})),
    Row("zip by content", "scan", zipped({"scan.nii.gz": GZ})),
    Row("zip of NRRD", "scan.zip", zipped({"a/b/SCAN.NRRD": nrrd()})),
    Row("zip with macOS's files", "scan.zip", zipped({"s/scan.nii.gz": GZ, "__MACOSX/s/._scan.nii.gz": b"\0\5\x16\7", ".DS_Store": b"x"})),
    Row("zip of a detached header", "scan.zip", zipped(DETACHED)),
    Row("zip of a pair", "scan.zip", zipped({"scan.hdr": HEADER, "scan.img": VOXELS})),
    Row("zip in a zip", "scan.zip", zipped({"inner.zip": zipped({"scan.nii.gz": GZ}), "readme.txt": b"x"})),
    Row("zip in zips without end", "scan.zip", zipped({"a.zip": zipped({"b.zip": zipped({"c.zip": zipped({"scan.nii": NIFTI})})})}),
        "archives nested"),
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


@pytest.mark.parametrize("row", ARCHIVE_ROWS, ids=lambda row: row.what)
def test_situation(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)
