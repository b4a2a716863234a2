"""The private table of ids, paths and studies: correct, readable only by its owner, and written only on request."""

from __future__ import annotations

import csv
import os
import stat
from pathlib import Path

import pandas as pd
import pydicom
import pytest

from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.linkage import COLUMNS, check_linkage, write_linkage
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.preprocessing.dicom_builder import SERIES, STUDY, series, truth, write

SPEC = PreprocessingSpec("test", spacing=(5.0, 2.0, 2.0), shape=(12, 16, 16))


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A folder as an archive exports it, named after its patients; the second contains two series."""
    root = tmp_path / "export"
    first = series(truth(), PatientName="Zebrowski^Ottilie", PatientID="P-1234567", AccessionNumber="A77", StudyDate="20200131")  # fmt: skip
    write(root / "Zebrowski_Ottilie 31.01.2020", first)
    for number in (5, 6):
        other = series(truth(move=number), PatientName="Quast^Kurt", PatientID="P-7654321", AccessionNumber="A88",
                       SeriesInstanceUID=f"{SERIES}.{number}", StudyInstanceUID=f"{STUDY}.2", SeriesNumber=number)  # fmt: skip
        write(root / "Quast" / f"s{number}", other)
    return root


def test_it_leads_from_each_stored_volume_to_its_study(hospital: Path, tmp_path: Path) -> None:
    os.umask(0o022)
    report = preprocess_cohort(hospital, tmp_path / "store", SPEC, workers=1, linkage=tmp_path / "private.csv")
    assert {outcome.word for outcome in report.outcomes} == {"done"}
    assert stat.S_IMODE((tmp_path / "private.csv").stat().st_mode) == 0o600
    table = pd.read_csv(tmp_path / "private.csv", dtype=str, keep_default_na=False)
    stored = pd.read_parquet(tmp_path / "store" / "cohort.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert sorted(table["volume"]) == sorted(stored["volume"])
    for row in table.itertuples():
        header = pydicom.dcmread(next(path for path in sorted(Path(row.path).rglob("*")) if path.is_file()))
        assert (row.StudyInstanceUID, row.SeriesInstanceUID, row.AccessionNumber) == (
            header.StudyInstanceUID, header.SeriesInstanceUID, header.AccessionNumber,
        )  # fmt: skip
    # Published files name nobody.
    for path in (tmp_path / "store").rglob("*"):
        content = path.read_bytes().lower() if path.is_file() else b""
        assert not any(
            name in content + path.name.lower().encode() for name in (b"zebrowski", b"quast", b"a77", b"2020")
        )


def test_nothing_is_written_unasked(hospital: Path, tmp_path: Path) -> None:
    preprocess_cohort(hospital, tmp_path / "store", SPEC, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "store"]


def test_the_series_of_a_shared_folder_is_named(hospital: Path, tmp_path: Path) -> None:
    folder = hospital / "Quast"
    write_linkage(tmp_path / "l.csv", {"v": folder}, {"v": f"{SERIES}.6"})
    assert pd.read_csv(tmp_path / "l.csv", dtype=str)["SeriesInstanceUID"].tolist() == [f"{SERIES}.6"]


def test_files_that_are_no_dicom_have_a_path_alone(tmp_path: Path) -> None:
    path = Path(os.fsdecode(b'n\xe4me, "one".nii'))
    (tmp_path / path).write_bytes(b"x")
    write_linkage(tmp_path / "l.csv", {"v": tmp_path / path})
    with (tmp_path / "l.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [list(COLUMNS), ["v", str(tmp_path / path), "", "", ""]]


@pytest.mark.parametrize("kind", ["link", "file", "folder", "inside"])
def test_it_is_never_written_over_or_through_what_is_there(kind: str, hospital: Path, tmp_path: Path) -> None:
    path = tmp_path / "private.csv"
    (tmp_path / "mine").write_text("mine")
    if kind == "link":
        path.symlink_to(tmp_path / "mine")
    elif kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path = tmp_path / "store" / "private.csv"
    with pytest.raises(PreprocessingError, match=r"private\.csv: (is|exists|lies)"):
        preprocess_cohort(hospital, tmp_path / "store", SPEC, workers=1, linkage=path)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "store").exists()


def test_one_of_ours_is_replaced(tmp_path: Path) -> None:
    write_linkage(tmp_path / "l.csv", {})
    check_linkage(tmp_path / "l.csv", tmp_path / "store")
