"""Tables from spreadsheets, libraries and people: tables that are read, and the messages of refusals."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

import pandas as pd
import pytest

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.cohorts import label_names, read_cohort
from ctclip.preprocessing.csv_files import read_csv
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.label_columns import label_columns, zeros_and_ones
from ctclip.preprocessing.no_report import is_no_report
from ctclip.preprocessing.tables import numbers, read_table

# Bytes of a table; its columns and the first record, or the words of the refusal.
READ: dict[str, tuple[bytes, dict[str, str] | str]] = {
    "Excel in Europe: a mark, semicolons, decimal commas": (b"\xef\xbb\xbfname;spacing\na;0,7\n", {"name": "a", "spacing": "0,7"}),
    "Excel's separator in quotes": (b'"sep=;"\nname;x\na;1\n', {"name": "a", "x": "1"}),
    "blank lines before the header": (b"\n \n\nname;x\na;1\n", {"name": "a", "x": "1"}),
    "a header over two lines": (b'"name\nof, it";x\na;1\n', {"name\nof, it": "a", "x": "1"}),
    "a header with commas in quotes": (b'name|"a, b, c"\na|1\n', {"name": "a", "a, b, c": "1"}),
    "a record over lines": (b'name,x\na,"1\n\n2"\n', {"name": "a", "x": "1\n\n2"}),
    "old Macintosh lines": (b"name,x\ra,1\r", {"name": "a", "x": "1"}),
    "a separator at every end": (b"name,x,\na,1,\n", {"name": "a", "x": "1"}),
    "pandas' index, saved twice": (b"Unnamed: 0.1,Unnamed: 0,name\n0,0,a\n", {"name": "a"}),
    "files appended to each other": (b"name,x\na,1\n\xef\xbb\xbfname,x\nb,2\n", {"name": "a", "x": "1"}),
    "marks that cannot be seen": ("\u200ename,x\n\u200b a\u00a0,\u20601\n".encode(), {"name": "a", "x": "1"}),
    "a quote in a cell": (b'name,x\na,5" nodule\n', {"name": "a", "x": '5" nodule'}),
    "UTF-16 with its mark": ("name\na\n".encode("utf-16"), "is UTF-16"),
    "UTF-16 without": ("name,x\na,1\n".encode("utf-16-le"), "is UTF-16"),
    "UTF-32": (codecs.BOM_UTF32_LE + "name\n".encode("utf-32-le"), "is UTF-32"),
    "GB18030": ("name,x\na,肺结节\n".encode("gb18030"), "line 2 is not UTF-8 .*GB18030"),
    "compressed": (gzip.compress(b"name\na\n"), r"is compressed \(gzip\)"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "the same column twice": (b"name,x,x\na,1,2\n", "two columns called 'x'"),
    "a comma that was not quoted": (b"name,x\na,1,5\n", "line 2 has 3 cells, the header 2"),
    "text behind a quote": (b'name,x\na,"1" 2\n', "line 2"),
    "other bytes": (b"name,x\na,\0" + bytes(range(1, 9)) * 40, "holds binary data"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_table_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, right = READ[name]
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    if isinstance(right, dict):
        table = read_table(path)
        assert table.iloc[0].to_dict() == right
        assert "name" not in table.iloc[:, 0].tolist()
        return
    with pytest.raises(PreprocessingError, match=rf"t\.csv.*{right}") as refused:
        read_table(path)
    assert "\n" not in str(refused.value)


def test_names_that_are_the_index_of_a_parquet_table_are_a_column(tmp_path: Path) -> None:
    pd.DataFrame({"volume": ["a"], "nodule": [1]}).set_index("volume").to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").iloc[0].to_dict() == {"volume": "a", "nodule": "1"}
    pd.DataFrame({"volume": ["a", "b"]}).iloc[1:].to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").to_dict("list") == {"volume": ["b"]}


def test_a_folder_called_as_a_home_is_called_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not expand --output=~/x; pandas and pyarrow would write into the home of this user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with written_beside(Path("~") / "t.parquet") as partial:
        pd.DataFrame({"volume": ["a"]}).to_parquet(partial)
    assert (tmp_path / "~" / "t.parquet").is_file()
    assert read_table(Path("~") / "t.parquet")["volume"].tolist() == ["a"]
    with written_beside(Path("~") / "t.csv") as partial:
        pd.DataFrame({"volume": ["a"]}).to_csv(partial)
    assert read_csv(Path("~") / "t.csv", dtype=str)["volume"].tolist() == ["a"]
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize(
    ("text", "count", "right"),
    [
        ("0,7", 1, [0.7]), ("-1024,5", 1, [-1024.5]), ("0,75; 0,8", 2, [0.75, 0.8]), ("[0,75; 0,8]", 2, [0.75, 0.8]), ("0,7 0,8", 2, [0.7, 0.8]),
        ("(0,7|0,8)", 2, [0.7, 0.8]), ("0.7,0.8", 2, [0.7, 0.8]), ("[1,2]", 2, [1, 2]), ("1,1", 2, [1, 1]), ("1,0,0,0,1,0", 6, [1, 0, 0, 0, 1, 0]),
        ("1,0;0;0;0;1,0;0", 6, [1, 0, 0, 0, 1, 0]), ("0,75", 2, None), ("-1,024", 1, None), ("1.024,5", 1, None), ("1e400", 1, None), ("–", 1, None),
    ],
)  # fmt: skip
def test_numbers_with_decimal_commas(text: str, count: int, right: list[float] | None) -> None:
    """An ambiguous number is not read: a thousand, or one and a fraction; two numbers, or one."""
    assert numbers(text, count) == right


NO_REPORT = [
    "nan", "None", "N/A", "n.a", "N. A.", "n / a", "–", "...", "nan nan", "None. None.", "<NA>", "#REF!", "0", "0.0", "\ufeff", "[Not given]",
    "No report", "no impression.", "Findings: none", "IMPRESSION: Not given.", "Clinical information not given.", "Report is not available",
    "none was provided", "Not dictated", "See above.", "See findings above", "Please see the report.", "see impression below for details",
    "Refer to body of report", "as described above", "same as above", "ditto", "[REDACTED]", "Report to follow", "dictation pending", "TBD",
    "k.A.", "keine Angabe", "siehe oben", "non renseigné", "sin datos", "belirtilmemiş", "无", "暂无", "同上。",
]  # fmt: skip
SAYS_SOMETHING = [
    "No findings.", "Nothing abnormal.", "None of the lobes is spared.", "See above: nodule.", "Not well seen.", "No report of pain.", "Same nodule.",
    "As above, effusion.", "Nodule not described in the report.", "Unremarkable", "Normal", "No.", "未见异常", "X-ray normal.", "Na 140.", "No impression on the bowel.",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_REPORT)
def test_no_report(text: str) -> None:
    assert is_no_report(text)


@pytest.mark.parametrize("text", SAYS_SOMETHING)
def test_a_report_however_short(text: str) -> None:
    assert not is_no_report(text)


DESCRIBE = [
    "sex", "PatientSex", "patient_sex", "sex (m=1)", "Gender_male", "IsFemale", "age>65", "AgeOver65", "Age Group", "is_smoker", "Smoking status",
    "Geschlecht", "icu", "Deceased", "hasContrast", "iv contrast?", "contrast_agent", "split", "is_test", "dataset", "batch", "exclude?", "follow-up",
    "timepoint", "reader1", "reviewed", "patient id", "BMI", "weight_kg",
]  # fmt: skip
FINDINGS = [
    "Nodule", "Age-indeterminate fracture", "Contrast extravasation", "Male breast mass", "Medical material", "Image artefact", "Modelling", "Sexagenarian",
    "Weighted opacity", "结节",
]  # fmt: skip


def test_a_column_of_0_and_1_that_describes_the_patient_or_the_study_is_no_label() -> None:
    columns = label_columns(pd.DataFrame({name: ["0", "1"] for name in [*DESCRIBE, *FINDINGS]}))
    assert list(columns.metadata) == DESCRIBE
    assert columns.labels == FINDINGS


def test_labels_with_decimal_commas_and_others_quoted() -> None:
    column = pd.Series(["1,0", "0,0", "TRUE", " no ", "N/A", "1e0"], index=pd.Index(range(2, 8), name="line"))
    assert zeros_and_ones(column, "x").astype("float").tolist()[:4] == [1, 0, 1, 0]
    for bad in ("0,5", "-1", "2", "positive", "1/0"):
        with pytest.raises(PreprocessingError, match=rf"'{bad}' \(line 2\)"):
            zeros_and_ones(pd.Series([bad], index=pd.Index([2], name="line")), "x")


def test_columns_of_a_label_table_that_are_no_labels_are_kept(cohort: Path, tmp_path: Path) -> None:
    """CT-RATE's own table with an added column of words, one of the patient and an empty label; a label with a 2 is
    refused."""
    import shutil

    shutil.copytree(cohort / "dataset", tmp_path / "dataset")
    path = next((tmp_path / "dataset").rglob("train*labels.csv"))
    table = pd.read_csv(path)
    names = [name for name in label_names(read_cohort(tmp_path).table)]
    table.assign(comment="looked at twice", PatientSex=1, **{names[0]: ""}).to_csv(path, index=False)
    found = read_cohort(tmp_path)
    assert label_names(found.table) == names
    assert {"looked at twice", ""} == set(found.table["comment"])
    assert any("comment, PatientSex" in note for note in found.notes)
    table.loc[0, names[1]] = 2
    table.to_csv(path, index=False)
    with pytest.raises(PreprocessingError, match=r"'2' .*labels\.csv, line 2"):
        read_cohort(tmp_path)
