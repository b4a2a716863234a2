"""Patient identifiers of headers are masked in texts, in any spelling."""

from __future__ import annotations

import gzip
import shutil
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ctclip.preprocessing.cohorts import read_cohort, scan_id
from ctclip.preprocessing.cohorts.folder import scan_ids
from ctclip.preprocessing.identifiers import Mask, all_headers, anonymous_id, first_header, masked
from tests.unit.preprocessing.dicom_builder import series, truth, write
from tests.unit.preprocessing.scan_files import nifti, tarred, written, zipped

PATIENT = {
    "PatientName": "Müller-Lüdenscheidt^Änne^Maria",
    "PatientID": "PID-0778899",
    "PatientBirthDate": "19410207",
    "StudyDate": "20230305",
    "StudyID": "ST-4711",
    "AccessionNumber": "ACC.424242",
    "OperatorsName": "Björk^Søren",
    "PerformingPhysicianName": "Łukasiewicz^Zoë",
    "ReferringPhysicianName": "Frankenstein^Victor",
    "NameOfPhysiciansReadingStudy": "Weiß^Jo",
    "StationName": "CTAWP12345",
    "DeviceSerialNumber": "SN-90817",
    "PatientTelephoneNumbers": "+49 30 5550123",
    "InstitutionName": "St. Elsewhere Hospital",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.777",
}


def header(**tags: object) -> pydicom.Dataset:
    data = pydicom.Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in {**PATIENT, **tags}.items():
        setattr(data, keyword, value)
    return data


@pytest.mark.parametrize(
    "spelling",
    [
        "Müller-Lüdenscheidt", "MÜLLER", unicodedata.normalize("NFD", "Müller"), unicodedata.normalize("NFD", "ÄNNE"),
        "Mueller", "Muller", "luedenscheidt", "Aenne_Mueller", "AnneMuller", "MuellerAenne", "annemaria", "maria-änne",
        "pid0778899", "PID 0778899", "778899", "1941-02-07", "07.02.1941", "02/07/1941", "7.2.1941", "7_2_1941",
        "410207", "070241", "07-02-41", "1941-2-7", "7 Feb 1941", "07-FEBRUAR-1941", "February 7, 1941", "7fev1941",
        "1941feb07", "20230305", "05.03.2023", "2023-3-5", "5 Mar 2023", "230305", "st4711", "ST_4711",
        "424242", "acc-424242", "Bjork", "Bjoerk", "soren", "Soeren", "lukasiewicz", "ŁUKASIEWICZ", "Zoe",
        "frankenstein", "weiss", "Weiß", "WEISS_JO", "ctawp12345", "SN90817", "90817", "+49-30-5550123", "49305550123",
        "5550123", "Elsewhere", "st_elsewhere_hospital", "1.2.826.0.1.3680043.8.498.777",
        "5th March 2023", "March 5th, 2023", "5 de marzo de 2023", "5.III.2023", "2023年3月5日", "2023年03月05日", "2023y3m5d",
        "５．３．２０２３", "7.2.41", "41/2/7", "2-7-41", "7-Feb-41", "07feb41",
    ],
)  # fmt: skip
def test_a_spelling_is_masked(spelling: str) -> None:
    for text in (f"/data/{spelling}/chest", f"{spelling}_ct.nii.gz", f"/x/a {spelling} b"):
        shown = masked(text, header())
        assert spelling not in shown
        assert "***" in shown
        letters = "".join(c for c in spelling if c.isalnum())
        rest = "".join(c for c in shown if c.isalnum() or c == "*")
        assert not any(letters[i : i + 5] in rest for i in range(len(letters) - 4)), shown


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        ({"PatientName": "Иванов^Пётр"}, "/data/Ivanov_Petr/1"),
        ({"PatientName": "Ivanov^Petr"}, "/data/Иванов/1"),
        ({"PatientName": "Wang^XiaoDong=王^小东"}, "/data/王小东/1"),
        ({"PatientName": "MUELLER^HANS"}, "/data/Müller Hans/1"),
        ({"PatientName": "Li^Wei"}, "/data/LiWei/1"),
        ({"PatientName": "Li^Wei"}, "/data/weili/1"),
        ({"PatientName": "O'Brien^Pat"}, "/data/OBrien_Pat/1"),
        ({"PatientName": "Παπαδόπουλος^Νίκος"}, "/data/ΠΑΠΑΔΟΠΟΥΛΟΣ/1"),
        ({"PatientID": "00012345"}, "/data/12345/1"),
        ({"OtherPatientIDs": ["AB-1234567", "X9988776"]}, "/data/x9988776/1"),
        ({"AcquisitionDateTime": "20211231235959.1"}, "/data/31.12.2021/1"),
        ({"StudyDate": "2021.12.31"}, "/data/31 Dec 2021/1"),
    ],
)
def test_other_scripts_and_values(tags: dict[str, object], text: str) -> None:
    shown = masked(text, header(**tags))
    assert shown.startswith("/data/***")
    assert shown.endswith("/1")


@pytest.mark.parametrize(
    "text",
    [
        "/data/chest_5mm/IM_0001",
        "/scans/CT-2/series 12",
        "lung_window.nii.gz",
        "/Daten/größe/Lunge",
        "/a/200/3",
        "/data/5 mm slices/3",
        "/data/2023/CT 12",
        "version 7.2.4",
        "chest 5 3 mm",
        "2023-03/ct",
    ],
)
def test_what_names_nobody_stays(text: str) -> None:
    assert masked(text, header()) == text


def test_a_header_marked_as_de_identified_masks_nothing() -> None:
    assert masked("/data/778899", header(PatientIdentityRemoved="YES")) == "/data/778899"
    assert masked("/data/778899", None) == "/data/778899"


def test_every_header_masks(tmp_path: Path) -> None:
    """A folder with two patients, as slices, as a zip and in a message."""

    def patients(index: int, data: pydicom.Dataset) -> None:
        data.PatientName = "Zebrowski^Ottilie" if index < 20 else "Quastenflosser^Kurt"

    images = series(truth(), patients, AccessionNumber="A1234567")
    folder = write(tmp_path / "Zebrowski and Quastenflosser", images)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    for path in (folder, tmp_path / "zipped.zip"):
        headers = all_headers(path)
        assert len(headers) == 2
        assert masked(folder.name, headers) == "*** and ***"
        assert anonymous_id(headers, "x") == anonymous_id(first_header(path), "x")
    from ctclip.preprocessing.readers import read

    assert read(folder).source == f"{tmp_path}/*** and ***"


def test_masking_a_large_series_is_fast() -> None:
    """A thousand headers of one patient, each with a different UID."""
    headers = [header(SOPInstanceUID=f"1.2.3.4567.{i}") for i in range(1000)]
    start = time.process_time()
    mask = Mask(headers)
    assert mask("/data/1.2.3.4567.999/Muller") == "/data/***/***"
    first = time.process_time() - start
    start = time.process_time()
    for number in range(1000):
        mask(f"/data/chest/{number}")
    assert first < 5
    assert time.process_time() - start < 2


def test_every_header_below_a_path_masks_its_name(tmp_path: Path) -> None:
    """For a study folder named in a table, a tar, and an archive in a zip, the headers are one level deeper."""
    folder = write(tmp_path / "Schmidt_Anna" / "CT" / "S1", series(truth(3), PatientName="Schmidt^Anna"))
    slices = {f"x/{path.name}": path.read_bytes() for path in folder.iterdir()}
    written(tmp_path, "Schmidt_Anna.tar.gz", tarred(slices))
    written(tmp_path, "Schmidt_Anna.tar", tarred(slices, "w"))
    written(tmp_path, "Schmidt_Anna.zip", zipped({"inner.zip": zipped(slices)}))
    places = ["Schmidt_Anna", "Schmidt_Anna.tar.gz", "Schmidt_Anna.tar", "Schmidt_Anna.zip"]
    table = written(tmp_path, "list.csv", "path\n" + "\n".join(places))
    cohort = read_cohort(table).table
    assert list(cohort["path"]) == ["***", "***.tar.gz", "***.tar", "***.zip"]
    for name in [*cohort["volume"], *(scan_id(tmp_path / place) for place in places)]:
        assert name.startswith("scan-")


@pytest.mark.parametrize(
    ("keyword", "kind", "content"),
    [("ImageType", "SS", b"\xff\0"), ("ImageType", "DS", b"1 "), ("NumberOfFrames", "UT", b"\xb2 "), ("NumberOfFrames", "UT", b"9" * 5000)],
)  # fmt: skip
def test_a_value_of_another_type_does_not_end_the_reading_of_its_folder(
    tmp_path: Path, keyword: str, kind: str, content: bytes
) -> None:
    slices = series(truth(4))
    for data in slices:
        tag = pydicom.tag.Tag(keyword)
        data[tag] = pydicom.dataelem.RawDataElement(tag, kind, len(content), content, 0, False, True)
    write(tmp_path / "scan", slices)
    assert len(read_cohort(tmp_path).table) == 1


@pytest.mark.parametrize("name", ["a.zip", "lzma.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.nii.gz"])
def test_a_damaged_file_does_not_end_the_reading_of_its_folder(tmp_path: Path, name: str) -> None:
    """Wherever its damage lies, the file is listed beside the others, and refused when its voxels are read."""
    folder = write(tmp_path / "good", series(truth(4)))
    slices = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = {
        "a.zip": lambda: zipped(slices),
        "lzma.zip": lambda: zipped(slices, zipfile.ZIP_LZMA),
        "a.nii.gz": lambda: gzip.compress(nifti()),
    }.get(name, lambda: tarred(slices, f"w:{name.rpartition('.')[2]}".removesuffix("tar")))()
    random = np.random.default_rng(0)
    for at in range(0, len(content), len(content) // 20):
        damaged = bytearray(content)
        damaged[at : at + 90] = random.bytes(90)
        written(tmp_path, name, bytes(damaged))
        assert len(read_cohort(tmp_path).table) == 2


def test_one_series_exported_twice_names_nobody(tmp_path: Path) -> None:
    """Scans with the same name are distinguished by their folder, unless the folder names the patient."""
    images = series(truth(3), PatientName="Schmidt^Anna")
    exported = [write(tmp_path / place / "S1", images) for place in ("Schmidt_Anna", "again of Schmidt")]
    other = [write(tmp_path / place / "S1", series(truth(3), PatientIdentityRemoved="YES")) for place in ("a", "b\x1b")]
    ids = scan_ids([*exported, *other])
    assert ids == [ids[0], f"{ids[0]}-2", "a/S1", "b\\x1b/S1"]
    assert ids[0].startswith("scan-")
