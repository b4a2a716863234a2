"""Cohorts from unknown sources: folders with links, copies and unrelated files, and tables from any program."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from typer.testing import CliRunner

from ctclip.cli import app
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, cohort_run
from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.cohorts import label_names, read_cohort, scan_id
from ctclip.preprocessing.label_columns import label_columns
from ctclip.preprocessing.no_report import is_no_report
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.store import SAFE_NAME, VolumeStore
from ctclip.preprocessing.tables import numbers, read_table, volume_name
from tests.unit.preprocessing.scan_files import HU, meta, nifti, nrrd, tarred, written, zipped
from tests.unit.preprocessing.test_dicom import write_series

AFFINE = np.diag([-4.0, -4.0, 5.0, 1.0])
SPEC = PreprocessingSpec("test", (5.0, 4.0, 4.0), (12, 16, 20))


def scan(path: Path, seed: int = 0) -> Path:
    """A small volume whose bytes differ from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(-1000, 400, (6, 6, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    return path


def series(folder: Path, slices: int = 5) -> Path:
    return write_series(folder, np.zeros((slices, 4, 4), np.int16))


def localizer(folder: Path) -> None:
    path = next(series(folder / "tmp", 1).iterdir())
    data = pydicom.dcmread(path)
    data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    data.save_as(folder / "LOC", enforce_file_format=True)
    shutil.rmtree(folder / "tmp")


def same_study(*folders: Path) -> None:
    for path in (path for folder in folders for path in folder.iterdir()):
        data = pydicom.dcmread(path)
        data.StudyInstanceUID = "1.2.3"
        data.save_as(path, enforce_file_format=True)


def linked_folder(root: Path) -> None:
    scan(root.parent / "elsewhere" / "a.nii.gz")
    root.mkdir()
    (root / "link").symlink_to(root.parent / "elsewhere")


def linked_file(root: Path) -> None:
    root.mkdir()
    (root / "a.nii.gz").symlink_to(scan(root.parent / "blobs" / "0123" / "x.nii.gz"))


def circle(root: Path) -> None:
    scan(root / "one" / "a.nii.gz")
    (root / "one" / "again").symlink_to(root)
    (root / "self").symlink_to(root / "self")


def up(root: Path) -> None:
    scan(root / "a.nii.gz")
    scan(root.parent / "private" / "b.nii.gz", 1)
    (root / "up").symlink_to(root.parent)


def led_on(root: Path) -> None:
    scan(root.parent / "out" / "a.nii.gz")
    scan(root.parent / "further" / "b.nii.gz", 1)
    (root.parent / "out" / "on").symlink_to(root.parent / "further")
    root.mkdir()
    (root / "link").symlink_to(root.parent / "out")


def twice_linked(root: Path) -> None:
    scan(root.parent / "out" / "a.nii.gz")
    root.mkdir()
    for name in ("one", "two"):
        (root / name).symlink_to(root.parent / "out")


def rubbish(root: Path) -> None:
    scan(root / "a.nii.gz")
    for name in ("._a.nii.gz", ".DS_Store", "Thumbs.db", "notes.txt", "__MACOSX/._b.nii.gz", ".cache/c.nii.gz"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    (root / "gone.nii.gz").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.nii.gz")


def copies(root: Path) -> None:
    scan(root / "a.nii")
    shutil.copy(root / "a.nii", root / "b.nii")
    scan(root / "c.nii", 1)


def spread(root: Path) -> None:
    series(root / "all", 9)
    for index, path in enumerate(sorted((root / "all").iterdir())):
        (root / f"DIR{index // 3:03d}").mkdir(exist_ok=True)
        path.rename(root / f"DIR{index // 3:03d}" / path.name)
    (root / "all").rmdir()


def last_in_another(root: Path) -> None:
    """The folders of a CD hold a limited number of files: the last two slices are in the next folder."""
    series(root / "DIR000", 9)
    (root / "DIR001").mkdir()
    for path in sorted((root / "DIR000").iterdir())[7:]:
        path.rename(root / "DIR001" / path.name)


def last_beside_another(root: Path) -> None:
    last_in_another(root)
    for path in series(root / "next", 6).iterdir():
        path.rename(root / "DIR001" / f"B{path.name}")
    (root / "next").rmdir()


def one_a_folder(root: Path) -> None:
    scan(root / "a.nii")
    for index, path in enumerate(sorted(series(root / "all", 6).iterdir())):
        (root / f"DIR{index:03d}").mkdir()
        path.rename(root / f"DIR{index:03d}" / path.name)
    (root / "all").rmdir()


def screenshot_copied(root: Path) -> None:
    series(root / "CT")
    picture = next(series(root / "tmp", 1).iterdir())
    for name in ("A", "B", "C"):
        (root / name).mkdir()
        shutil.copy(picture, root / name)
    shutil.rmtree(root / "tmp")


def two_in_a_folder(root: Path) -> None:
    series(root / "CT", 9)
    for path in series(root / "CT" / "tmp", 5).iterdir():
        path.rename(root / "CT" / f"B{path.name}")
    (root / "CT" / "tmp").rmdir()


def pairs(root: Path) -> None:
    """NIfTI pairs, compressed or not, by small or capital letters; a header and voxels without the other."""
    for name, end in (("p1/a", ".img"), ("p2/a", ".img.gz"), ("p3/a", ".img"), ("p4/a", ".img"), ("p5/a", ".img")):
        (root / name).parent.mkdir(parents=True)
        values = np.random.default_rng(ord(name[1])).integers(-1000, 400, (6, 6, 6)).astype(np.int16)
        nib.save(nib.Nifti1Pair(values, AFFINE), root / f"{name}{end}")
    (root / "p3/a.hdr").rename(root / "p3/A.HDR")
    (root / "p3/a.img").rename(root / "p3/A.IMG")
    (root / "p4/a.img").unlink()
    (root / "p5/a.hdr").unlink()


def archives(root: Path) -> None:
    root.mkdir()
    for index, (name, mode) in enumerate(
        (("a.tar", "w"), ("b.tgz", "w:gz"), ("c.tar.gz", "w:gz"), ("d.tar.bz2", "w:bz2"))
    ):
        (root / name).write_bytes(tarred({"scan.nii": nifti(HU + index)}, mode))
    (root / "e.zip").write_bytes(zipped({"scan.nii": nifti(HU + 9)}))
    (root / "f.7z").write_bytes(b"7z")


def copied_series(root: Path) -> None:
    series(root / "CT")
    shutil.copytree(root / "CT", root / "CT copy")


def part_copied(root: Path) -> None:
    series(root / "CT", 6)
    (root / "A").mkdir()
    for path in sorted((root / "CT").iterdir())[:4]:
        shutil.copy(path, root / "A")


def loose_localizer(root: Path) -> None:
    series(root / "CT")
    localizer(root)


def localizer_apart(root: Path) -> None:
    series(root / "CT")
    (root / "SCOUT").mkdir()
    localizer(root / "SCOUT")


def loose_series(root: Path) -> None:
    series(root, 4)
    series(root / "B", 9)


def one_study(root: Path) -> None:
    same_study(series(root / "B30"), series(root / "B70"))


def zip_beside(root: Path) -> None:
    series(root / "CT")
    shutil.make_archive(str(root / "CT"), "zip", root / "CT")


def raw_beside(root: Path) -> None:
    import SimpleITK as sitk

    root.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4), np.int16)), root / "a.mhd")


def foreign_letters(root: Path) -> None:
    for index, name in enumerate(("ä.nii", "ö.nii", "肺.nii", "Müller 1.nii", "Muller 1.nii")):
        scan(root / name, index)


def alike(root: Path) -> None:
    for index, name in enumerate(("a b.nii", "a_b.nii", "A_b.nii")):
        scan(root / name, index)


def other_reports(root: Path) -> None:
    scan(root / "p1.nii.gz")
    (root / "my_reports.csv").write_text("id,text\np1,normal\n")


def other_reports_with_our_columns(root: Path) -> None:
    scan(root / "p1.nii.gz")
    (root / "reports.csv").write_text("VolumeName,Findings_EN\np1.nii.gz,normal\n")


def no_reports(root: Path) -> None:
    for index, name in enumerate(("train_1_a_1", "train_1_a_2", "valid_2_b_1")):
        scan(root / f"{name}.nii.gz", index)


# How the folder is built; the expected numbers of scans and patients; words of the count of unused files, and their
# number.
FOLDERS: dict[str, tuple[Callable[[Path], None], int, int, dict[str, int]]] = {
    "a folder by a link": (linked_folder, 1, 1, {}),
    "a file by a link": (linked_file, 1, 1, {}),
    "a link to the top and one to itself": (circle, 1, 1, {"read anyway": 1, "broken": 1}),
    "a link upwards": (up, 1, 1, {"read anyway": 1}),
    "a link that leads on": (led_on, 1, 1, {"lead on": 1}),
    "one folder by two links": (twice_linked, 1, 1, {"read anyway": 1}),
    "files of macOS and others": (
        rubbish,
        1,
        1,
        {"._": 1, "system files": 2, "system folders": 2, ".txt": 1, "broken": 1, "neither": 1},
    ),
    "a copied volume": (copies, 3, 2, {}),
    "a series over three folders": (spread, 1, 1, {}),
    "a copied series": (copied_series, 1, 1, {"copies": 5}),
    "the last slices in another folder": (last_in_another, 1, 1, {}),
    "the last slices beside another series": (last_beside_another, 2, 2, {}),
    "a slice a folder, beside a volume": (one_a_folder, 2, 2, {}),
    "a screenshot, copied": (screenshot_copied, 1, 1, {"too few": 3}),
    "two series in a folder": (two_in_a_folder, 1, 1, {"other series": 5}),
    "NIfTI pairs": (pairs, 3, 3, {".hdr": 1, ".img": 1}),
    "archives": (archives, 5, 5, {".7z": 1}),
    "a series copied in part": (part_copied, 1, 1, {"copies": 4}),
    "a localizer above": (loose_localizer, 1, 1, {"localizers": 1}),
    "a localizer beside": (localizer_apart, 1, 1, {"localizers": 1}),
    "a series above another": (loose_series, 2, 2, {}),
    "two kernels of one study": (one_study, 2, 1, {}),
    "a series and its zip": (zip_beside, 2, 1, {}),
    "voxels beside their header": (raw_beside, 1, 1, {}),
    "names that are not ASCII": (foreign_letters, 5, 5, {}),
    "names that become one": (alike, 3, 3, {}),
    "reports that are not CT-RATE's": (other_reports, 1, 1, {".csv": 1}),
    "reports with CT-RATE's columns alone": (other_reports_with_our_columns, 1, 1, {".csv": 1}),
    "CT-RATE without its reports": (no_reports, 3, 2, {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_its_scans(tmp_path: Path, name: str) -> None:
    build, scans, patients, unused = FOLDERS[name]
    root = tmp_path / "root"
    build(root)
    cohort = read_cohort(root)
    assert len(cohort.table) == len(set(cohort.table["volume"].str.casefold())) == scans
    assert cohort.table["patient"].nunique() == patients
    assert all(SAFE_NAME.fullmatch(volume) for volume in cohort.table["volume"])
    for kind, count in unused.items():
        assert sum(number for told, number in cohort.unused.items() if kind in told) == count, cohort.unused
    assert sum(cohort.unused.values()) == sum(unused.values())


def test_series_of_nested_folders_are_read_apart_and_spread_ones_whole(tmp_path: Path) -> None:
    """Reading a folder includes the folders below it: each scan still has only its own slices, by SimpleITK's count."""
    from ctclip.preprocessing.readers import read

    for name, build, counts in (
        ("a", loose_series, [4, 9]),
        ("b", spread, [9]),
        ("c", part_copied, [6]),
        ("d", last_in_another, [9]),
        ("e", last_beside_another, [6, 9]),
        ("f", one_a_folder, [6, 6]),
        ("g", two_in_a_folder, [9]),
    ):
        build(tmp_path / name)
        cohort = read_cohort(tmp_path / name)
        found = [read(path, cohort.series.get(volume)).array.shape[0] for volume, path in cohort.files.items()]
        assert sorted(found) == counts


def test_a_lone_localizer_is_refused_by_name_instead_of_passed_over(tmp_path: Path) -> None:
    localizer(tmp_path)
    assert len(read_cohort(tmp_path).table) == 1


# A table's bytes; its labels; its metadata, or the words of the refusal.
TABLES: dict[str, tuple[bytes, list[str], list[str] | str]] = {
    "commas": (b"path,nodule\na.nii,1\n", ["nodule"], []),
    "semicolons": (b"path;nodule\na.nii;1\n", ["nodule"], []),
    "tabs": (b"path\tnodule\na.nii\t0\n", ["nodule"], []),
    "Excel's own": (b"sep=;\r\npath;nodule\r\na.nii;0\r\n", ["nodule"], []),
    "byte order mark": (b"\xef\xbb\xbfpath,nodule\na.nii,1\n", ["nodule"], []),
    "blanks": (b" path , nodule \n a.nii , 1 \n", ["nodule"], []),
    "an index without a name": (b",path,nodule,Unnamed: 3\n0,a.nii,1,7\n", ["nodule"], []),
    "words": (b"path,a,b,c\na.nii,True,no,n/a\nb.nii,false,YES,1.0\n", ["a", "b", "c"], []),
    "sex and age": (b"path,sex,Age,nodule,contrast?\na.nii,1,61,0,0\n", ["nodule"], ["sex", "Age", "contrast?"]),
    "empty columns": (b"path,nodule,comment\na.nii,1,\n", ["nodule"], ["comment"]),
    "grades": (b"path,nodule,grade\na.nii,1,1\nb.nii,0,2\n", ["nodule"], ["grade"]),
    "commas in quotes over lines": (b'path,findings,nodule\na.nii,"clear,\nlungs",1\n', ["nodule"], []),
    "Latin-1": ("path,findings\na.nii,Lungenödem\n".encode("latin-1"), [], "line 2 is not UTF-8"),
    "UTF-16": ("path\na.nii\n".encode("utf-16"), [], "is UTF-16"),
    "a spreadsheet": (b"PK\x03\x04....", [], "spreadsheet"),
    "an open quote": (b'path,findings\na.nii,"clear\n', [], "cannot be read as CSV"),
    "too many cells": (b"path,nodule\na.nii,1\nb.nii,0,5\n", [], "line 3 has 3 cells, the header 2"),
    "two of one name": (b"path,nodule,nodule\na.nii,1,0\n", [], "two columns called 'nodule'"),
    "empty": (b"", [], "it is empty"),
    "a slope in words": (b"path,rescale_slope\na.nii,one\n", [], "holds 'one', not a number .line 2"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_or_refused_with_the_line(tmp_path: Path, name: str) -> None:
    content, labels, rest = TABLES[name]
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    if isinstance(rest, str):
        with pytest.raises(PreprocessingError, match=rest) as refused:
            read_cohort(path)
        assert "\n" not in str(refused.value)
        assert "list.csv" in str(refused.value)
        return
    cohort = read_cohort(path)
    assert label_names(cohort.table) == labels
    for column in rest:
        assert column in cohort.table.columns
        assert any(column in note for note in cohort.notes if "metadata" in note)
    assert all(any(label in note for note in cohort.notes if "label columns" in note) for label in labels)


def test_named_labels_are_taken_or_their_first_bad_value_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,sex,grade\na.nii,1,1\nb.nii,0,2\n")
    assert label_names(read_cohort(path, labels=["sex"]).table) == ["sex"]
    with pytest.raises(PreprocessingError, match=r"'grade' holds values other than 0 and 1: '2' \(line 3\)"):
        read_cohort(path, labels=["grade"])
    with pytest.raises(PreprocessingError, match="no label column 'nodule'"):
        label_columns(read_table(path), ["nodule"])


def test_parquet_and_csv_are_one_table(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"path": ["a.nii", "b.nii"], "nodule": [True, None], "age": [61, 7], "findings": ["nan", "ok"]}
    )
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    frame.to_csv(tmp_path / "t.csv", index=False)
    one, other = (read_cohort(tmp_path / f"t.{end}").table for end in ("parquet", "csv"))
    pd.testing.assert_frame_equal(one, other)
    assert one["findings"].tolist() == ["", "ok"]


def test_rows_that_contradict_each_other_are_refused_and_repeated_ones_are_one(tmp_path: Path, cohort: Path) -> None:
    shutil.copytree(cohort / "dataset", tmp_path / "dataset")
    labels = next((tmp_path / "dataset").rglob("train*labels.csv"))
    copy = labels.with_name("copy_labels.csv")
    shutil.copy(labels, copy)
    assert len(read_cohort(tmp_path).table) == 24
    table = pd.read_csv(labels)
    table.iloc[0, 1] = 1 - table.iloc[0, 1]
    table.to_csv(copy, index=False)
    with pytest.raises(PreprocessingError, match=r"copy_labels\.csv, line 2: train_\w+ has another"):
        read_cohort(tmp_path)


@pytest.mark.parametrize(
    "text", ["nan", "None", "N/A", "-", " --- ", "Not given.", "NOT GIVEN", "see above", "(see above)", "", "."]
)
def test_words_for_no_report(text: str) -> None:
    assert is_no_report(text)


@pytest.mark.parametrize(
    "text", ["Normal.", "No nodule.", "None of the lobes is spared.", "Nodule, see above.", "正常"]
)
def test_reports_that_say_something(text: str) -> None:
    assert not is_no_report(text)


def test_names_and_numbers_of_strangers() -> None:
    assert {volume_name(t) for t in (" a.nii.gz", "x/y/a.NII.GZ ", "C:\\d\\a.nii", "a")} == {"a"}
    assert numbers("[0.7; '0.8']", 2) == [0.7, 0.8]
    assert (
        numbers("[np.float64(0.7), np.float32(8e-1)]", 2)
        == numbers("array([0.7, 0.8], dtype=float32)", 2)
        == [0.7, 0.8]
    )
    assert numbers("0.7 mm x 0.8mm", 2) == numbers("0.7x0.8", 2) == numbers("tensor([0.7, 0.8])", 2) == [0.7, 0.8]
    assert [numbers(text, 1) for text in ("0.7 cm", "float64", "x", "0.7 x", "np.float64(nan)")] == [None] * 5
    assert [numbers(text, 1) for text in ("nan", "inf", "", "1 2", "x", "3")] == [None] * 5 + [[3.0]]


def test_a_killed_run_and_its_rerun_tell_what_one_run_tells(cohort: Path, tmp_path: Path, monkeypatch) -> None:
    mine = tmp_path / "cohort"
    shutil.copytree(cohort, mine)
    damaged = sorted(mine.rglob("*.nii.gz"))[3]
    damaged.write_bytes(b"nothing")
    spec = PreprocessingSpec.load("phantom")
    preprocess_cohort(mine, tmp_path / "whole", spec, workers=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cohort_run, "write_outcomes", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess_cohort(mine, tmp_path / "cut", spec, workers=1)
    store = VolumeStore(tmp_path / "cut")
    for name in store.volumes[:7]:
        store.file(name).unlink()
    preprocess_cohort(mine, tmp_path / "cut", spec, workers=1)
    whole, cut = ((tmp_path / name / "outcomes.csv").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert whole.count(b" x ") >= 4 * 23


def test_the_last_lines_of_a_run_in_words(tmp_path: Path) -> None:
    root = tmp_path / "root"
    values = np.random.default_rng(0).integers(0, 40, (6, 6, 6)).astype(np.int16)
    root.mkdir()
    nib.save(nib.Nifti1Image(values, AFFINE), root / "a.nii")
    (root / "notes.txt").write_text("x")
    command = ["preprocess", str(root), "-o", str(tmp_path / "s"), "--workers", "1"]
    result = CliRunner().invoke(app, [*command, "--hu", "trust-table"])
    assert result.exit_code == 3
    assert "no table lists a slope" in result.output
    result = CliRunner().invoke(app, command)
    assert "trust-table" not in result.output
    assert result.output.strip().endswith("files not used: 1 (other files (.txt): 1)")


def test_of_two_series_dealt_over_folders_the_original_is_read(tmp_path: Path) -> None:
    """As patient CDs are written: each folder contains files of both; a localizer is separate, below the same
    folder."""
    from tests.unit.preprocessing import dicom_builder

    axial = dicom_builder.series(dicom_builder.truth(12))
    mip = dicom_builder.series(dicom_builder.truth(20), SeriesInstanceUID="1.2.3", SeriesDescription="Thick MIP")
    for number in range(2):
        images = axial[number * 6 : number * 6 + 6] + mip[number * 10 : number * 10 + 10]
        dicom_builder.write(tmp_path / f"DIR00{number}", images)
    for build in (lambda: None, lambda: localizer(tmp_path / "DIR002")):
        build()
        cohort = read_cohort(tmp_path)
        (name,) = cohort.files
        volume = read(cohort.files[name], cohort.series.get(name))
        np.testing.assert_array_equal(volume.array, dicom_builder.truth(12))


def test_a_series_spread_over_a_linked_folder_is_read_whole(tmp_path: Path) -> None:
    from tests.unit.preprocessing import dicom_builder

    images = dicom_builder.series(dicom_builder.truth(12))
    dicom_builder.write(tmp_path / "cohort" / "DIR000", images[:6])
    dicom_builder.write(tmp_path / "elsewhere", images[6:])
    (tmp_path / "cohort" / "DIR001").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cohort" / "again").symlink_to(tmp_path)
    cohort = read_cohort(tmp_path / "cohort")
    (name,) = cohort.files
    for chosen in (None, cohort.series.get(name)):
        np.testing.assert_array_equal(read(cohort.files[name], chosen).array, dicom_builder.truth(12))


def test_a_link_to_another_patient_does_not_lend_a_patient_the_other_scan(tmp_path: Path) -> None:
    from tests.unit.preprocessing import dicom_builder

    dicom_builder.write(tmp_path / "A", dicom_builder.series(dicom_builder.truth(12)))
    dicom_builder.write(tmp_path / "B", dicom_builder.series(dicom_builder.truth(20), SeriesInstanceUID="1.2.3"))
    (tmp_path / "A" / "other").symlink_to(tmp_path / "B")
    cohort = read_cohort(tmp_path)
    lengths = [len(read(path, cohort.series.get(name)).array) for name, path in sorted(cohort.files.items())]
    assert lengths == [12, 20]


def test_names_of_files_that_are_no_text_are_told_in_one_printable_line(tmp_path: Path) -> None:
    """A refused file whose name was not UTF-8 lost outcomes.csv; one with a line feed in its name took two lines of
    it."""
    folder = tmp_path / "cohort"
    folder.mkdir()
    for name in (b"\xff.nii.gz", b"a\nb\x1b[2J.nii.gz"):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"x")
    report = preprocess_cohort(folder, tmp_path / "store", SPEC, workers=1)
    assert sorted(str(outcome.refused).rpartition("/")[2].partition(":")[0] for outcome in report.outcomes) == [
        "\\xff.nii.gz", "a\\nb\\x1b[2J.nii.gz",
    ]  # fmt: skip
    lines = (tmp_path / "store" / "outcomes.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    for text in [*lines, *read_cohort(folder).table["path"]]:
        assert text.isprintable()
    assert scan_id(folder / "a\nb.nii.gz") == "a\\nb"


@pytest.mark.parametrize(("header", "voxels"), [
    ("a.hdr", "a.img"), ("A.HDR", "A.IMG"), ("a.Hdr", "a.IMG"), ("a.hdr.gz", "a.img"), ("a.hdr", "a.img.gz"),
    ("a.mhd", "a.raw"), ("A.MHD", "A.RAW"), ("a.mhd", "data/voxels.bin"), ("a.nhdr", "data/voxels.bin"),
])  # fmt: skip
def test_a_header_and_the_file_of_its_voxels_are_one_scan(tmp_path: Path, header: str, voxels: str) -> None:
    """Two of them that differ only in their voxels are two patients, although their headers are identical."""
    for number, folder in enumerate(("one", "two")):
        hu = HU + np.int16(number)
        plain = nifti(hu)
        pair = plain[:108] + bytes(4) + plain[112:344] + b"ni1\0"
        headers = {"hdr": pair, "mhd": meta(b"", ElementDataFile=voxels), "nhdr": nrrd(b"", data_file=voxels)}
        content = headers[header.lower().removesuffix(".gz").rpartition(".")[2]]
        raw = plain[352:] if ".img" in voxels.lower() else hu.tobytes()
        for name, data in ((header, content), (voxels, raw)):
            written(tmp_path / folder, name, gzip.compress(data) if name.endswith(".gz") else data)
    cohort = read_cohort(tmp_path)
    assert cohort.table["patient"].nunique() == len(cohort.table) == 2
    assert not cohort.unused
    assert not cohort.warnings
    for number, name in enumerate(cohort.table["volume"]):
        assert np.array_equal(np.sort(read(cohort.files[name]).array, axis=None), np.sort(HU + number, axis=None))


def test_a_run_says_what_it_was_warned_of(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).normal(0, 60, (24, 32, 40)).round().astype(np.int16) - 900
    hu[:, :, :20] = 0
    written(tmp_path / "c", "filled.nii", nifti(hu))
    command = [
        "preprocess",
        str(tmp_path / "c"),
        "--output",
        str(tmp_path / "s"),
        "--spec",
        "phantom",
        "--workers",
        "1",
    ]
    told = CliRunner().invoke(app, command).output
    assert "warning filled: masked or filled: 50% of the voxels hold exactly 0 HU" in told
    assert "1 done, 0 refused, 1 with warnings; reasons and warnings are in" in told
