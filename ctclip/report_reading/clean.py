"""A table of the sentences of reports, and of the findings in each sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pyarrow import ArrowException

from ctclip.errors import DataError
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import check_file, check_same, claimed_file, file_holds
from ctclip.preprocessing.parquet import open_parquet, write_parquet
from ctclip.report_reading.findings import Cleaner, CleanSentence, Finding
from ctclip.report_reading.reports import Reports
from ctclip.report_reading.sections import REST, split_sections

COLUMNS = (
    "section",
    "sentence_number",
    "sentence",
    "label",
    "status",
    "side",
    "lobe",
    "size_mm",
    "comparison",
    "boilerplate",
)
HEADER = ",".join(COLUMNS[:4]).encode()


def clean_reports(reports: Reports, cleaner: Cleaner) -> pd.DataFrame:
    """One row for each finding, and one for each sentence without a finding: the report's id, then ``COLUMNS``.

    Sections are the columns of the table; a text in one column is split at its headings.
    """
    rows = [
        {reports.id_column: name, **row}
        for number, name in enumerate(reports.ids)
        for row in _rows({section: texts[number] for section, texts in reports.sections.items()}, cleaner)
    ]
    if not rows:
        raise DataError(f"{reports.source}: holds no report")
    return pd.DataFrame(rows, columns=[reports.id_column, *COLUMNS])


def write_findings(table: pd.DataFrame, output: Path, *, force: bool = False) -> None:
    """Write the table as CSV or Parquet, by its suffix. Raises PreprocessingError if ``output`` is a file of another
    kind, or holds other findings; ``force`` replaces both."""
    with claimed_file(output):
        check_findings(output, force=force)
        with written_beside(output) as partial:
            if output.suffix == ".parquet":
                write_parquet(partial, table)
            else:
                write_csv(partial, table)
            check_same(output, partial.read_bytes(), "findings", force=force)


def check_findings(output: Path, *, force: bool = False) -> None:
    """Raise unless the table may be written to ``output``."""
    if output.suffix not in (".csv", ".parquet"):
        raise DataError(f"{output}: end the name in .csv or .parquet")
    check_file(output, _is_findings if output.suffix == ".parquet" else file_holds(HEADER), force=force)


def _is_findings(path: Path) -> bool:
    """Whether a Parquet file has the columns of a table of findings."""
    try:
        return tuple(open_parquet(path).schema_arrow.names[1:]) == COLUMNS
    except (OSError, ArrowException):
        return False


def _rows(sections: dict[str, str], cleaner: Cleaner) -> Iterator[dict[str, object]]:
    if set(sections) == {REST}:
        sections = split_sections(sections[REST], cleaner.language.wording.headings)
    for section, text in sections.items():
        for number, sentence in enumerate(cleaner.clean(text), start=1):
            for finding in sentence.findings or (None,):
                yield {"section": section, "sentence_number": number, **_row(sentence, finding)}


def _row(sentence: CleanSentence, finding: Finding | None) -> dict[str, object]:
    statement = {"label": "", "status": "", "side": "", "lobe": "", "size_mm": None}
    if finding is not None:
        statement = {**vars(finding), "status": finding.status.value}
    return {
        "sentence": sentence.text, **statement, "comparison": int(sentence.comparison), "boilerplate": int(sentence.boilerplate)
    }  # fmt: skip
