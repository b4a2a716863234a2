"""Tables of reports: an id, and a text or sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ctclip.errors import DataError
from ctclip.preprocessing.cohorts.ct_rate import SECTIONS as CT_RATE
from ctclip.preprocessing.cohorts.table import SECTIONS, WHOLE_REPORTS
from ctclip.preprocessing.no_report import report_text
from ctclip.preprocessing.tables import read_table, without_suffix

# Column names of ids, the most likely first. These and those of reports may have capitals, and spaces instead of underscores.
IDS = ("volume", "volumename", "accessionno", "accession", "accession_number", "note_acc_deid", "noteacc_deid", "study", "study_id",
       "report_id", "id", "name", "scan", "patient")  # fmt: skip
# The table of a store.
COHORT = "cohort.parquet"
# Sections that describe the scan. The clinical question and the technique hold no findings.
READ = ("findings", "impression")


@dataclass(frozen=True)
class Reports:
    """Reports in the order of their table: ``ids``, from the column ``id_column``; ``sections`` by name, with one text
    for each report ("" if it lacks the section)."""

    source: Path
    id_column: str
    ids: list[str]
    sections: dict[str, list[str]]

    def texts(self) -> list[str]:
        """Each report as one text, with each section on its own line."""
        return ["\n".join(part for part in parts if part) for parts in zip(*self.sections.values(), strict=True)]


def load_reports(source: Path) -> Reports:
    """The reports of a CSV, TSV or Parquet table, of a store, or of a text file with one report per line.

    Raises DataError if the table has no column of text, or columns of which only some could be read, or an id with two
    different texts.
    """
    if source.is_dir():
        if not (source / COHORT).is_file():
            raise DataError(f"{source}: is a folder, but not a store (it has no {COHORT}); give a table of reports")
        source = source / COHORT
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    if source.suffix.lower() == ".txt":
        lines = [line.strip() for line in _text(source).splitlines()]
        return Reports(source, "report", [str(number) for number in range(1, len(lines) + 1)], {"text": lines})
    table = read_table(source)
    names = {_key(column): column for column in table.columns}
    chosen = _columns(names, source)
    if not chosen:
        raise DataError(
            f"{source}: has no column of reports (it has {', '.join(table.columns[:6])}); name it 'text', or 'findings' and "
            f"'impression'"
        )
    if table.empty:
        raise DataError(f"{source}: holds no report")
    id_column = next((names[key] for key in IDS if key in names), "")
    ids = table[id_column].tolist() if id_column else [str(line) for line in table.index]
    if "" in ids:
        raise DataError(f"{source}: {table.index.name} {table.index[ids.index('')]} has no {id_column}")
    sections = {name: [report_text(cell) for cell in table[column]] for name, column in chosen.items()}
    reports = Reports(source, id_column or str(table.index.name), ids, sections)
    _check_ids(reports)
    return reports


def _columns(names: dict[str, str], source: Path) -> dict[str, str]:
    """The columns to read, by the name of the section, or by "text" for whole reports; ``names``: columns by key."""
    known = {**{_key(theirs): ours for theirs, ours in CT_RATE.items()}, **{ours: ours for ours in SECTIONS}}
    known |= {"impressions": "impression", "conclusion": "impression", "finding": "findings"}
    there: dict[str, list[str]] = {name: [] for name in (*READ, "text")}
    for key, section in (*known.items(), *((key, "text") for key in WHOLE_REPORTS)):
        if key in names and section in there:
            there[section].append(names[key])
    for section, columns in there.items():
        if len(columns) > 1:
            what = "whole reports" if section == "text" else section
            raise DataError(f"{source}: has {len(columns)} columns of {what} ({', '.join(columns)}); keep one of them")
    present = {section: columns[0] for section, columns in there.items() if columns}
    if "text" in present and len(present) > 1:
        sections = ", ".join(column for section, column in present.items() if section != "text")
        raise DataError(
            f"{source}: has whole reports ({present['text']}) and sections ({sections}); remove one or the other, so that "
            f"nothing is read twice or left out"
        )
    return present


def _key(column: str) -> str:
    return "_".join(column.strip().casefold().split())


def _check_ids(reports: Reports) -> None:
    texts: dict[str, str] = {}
    for name, text in zip(reports.ids, reports.texts(), strict=True):
        if texts.setdefault(without_suffix(name), text) != text:
            raise DataError(
                f"{reports.source}: {reports.id_column} {name!r} has two different reports; keep one row for each"
            )


def _text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read ({' '.join(str(error).split())[:160]})") from error
