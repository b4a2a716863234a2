"""Read labels from many reports, and write them with the sentences that state them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip import plugins
from ctclip.errors import DataError
from ctclip.labels import LabelSet
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import check_file, claimed_file, file_holds
from ctclip.preprocessing.parquet import write_parquet
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.workers import worker_pool
from ctclip.report_reading.reader import NOTHING, Options, Reader, Reading, Statement, Status
from ctclip.report_reading.reports import Reports

CHUNK, FEW = 200, 1000
COMMAND, SOURCE = "ctclip read-reports", "label_source"


@dataclass(frozen=True)
class Values:
    """The table values of uncertain labels and of labels not mentioned: 0, 1, or None for an empty cell."""

    uncertain: int | None = None
    not_mentioned: int | None = 0

    def of(self, status: Status) -> int | None:
        return {
            Status.present: 1, Status.absent: 0, Status.uncertain: self.uncertain, Status.not_mentioned: self.not_mentioned
        }[status]  # fmt: skip


@dataclass
class Readings:
    """The readings of reports; None for a report that was not read (empty, or in another language)."""

    reader: str
    labels: LabelSet
    reports: Reports
    readings: list[Reading | None]
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, Counter[Status]]:
        """The number of reports by status for each label."""
        return {
            name: Counter(reading.get(name, NOTHING).status for reading in self.readings if reading is not None)
            for name in self.labels.names
        }

    def table(self, values: Values) -> pd.DataFrame:
        """One row per report: its id, the labels as nullable Int8, and ``label_source``, which names the reader."""
        columns: dict[str, Any] = {self.reports.id_column: self.reports.ids}
        for name in self.labels.names:
            cells = [None if r is None else values.of(r.get(name, NOTHING).status) for r in self.readings]
            columns[name] = pd.array(cells, dtype="Int8")
        return pd.DataFrame(columns).assign(**{SOURCE: f"read from reports by {self.reader}"})


def read_all(reports: Reports, labels: LabelSet, kind: str, options: Options, workers: int = 1) -> Readings:
    """Read all reports with the reader ``kind`` (rules, classifier, language-model or ``module:Name``). Equal texts are
    read once."""
    reader = build_reader(kind, labels, options)
    texts = reports.texts()
    foreign = {text for text in set(texts) if reader.is_foreign(text)}
    due = [text for text in dict.fromkeys(texts) if text and text not in foreign]
    chunks = [due[start : start + CHUNK] for start in range(0, len(due), CHUNK)]
    read: dict[str, Reading] = {}
    for chunk, readings in zip(chunks, _read(reader, chunks, kind, labels, options, workers), strict=True):
        read |= zip(chunk, readings, strict=True)
    result = Readings(reader.identity, labels, reports, [read.get(text) for text in texts])
    result.notes += unread_notes(reports, foreign, options.language, "labels are left empty")
    return result


def unread_notes(reports: Reports, foreign: Collection[str], language: str, consequence: str) -> list[str]:
    """A note on empty reports and one on reports with a text in ``foreign``; ``consequence``: what follows for them."""
    texts, notes = reports.texts(), []
    empty = [name for name, text in zip(reports.ids, texts, strict=True) if not text]
    strange = [name for name, text in zip(reports.ids, texts, strict=True) if text in foreign]
    if empty:
        notes.append(_note(empty, "is empty", "are empty", consequence))
    if strange:
        which = f"not in {language}, judging by {'its' if len(strange) == 1 else 'their'} words"
        notes.append(_note(strange, f"is {which}", f"are {which}", consequence) + "; name the language with --language")
    return notes


def build_reader(kind: str, labels: LabelSet, options: Options) -> Reader:
    """Build the reader with a name."""
    reader: Reader = plugins.find("reader", kind).build(labels, options)
    return reader


def write_readings(result: Readings, output: Path, values: Values, *, force: bool = False) -> tuple[Path, Path]:
    """Write the labels to ``output``, and the statements of each report to ``<stem of output>.statements.jsonl``.

    Raises PreprocessingError if a file of another kind is in the way, and DataError if the file holds labels of another
    reader or of other reports. ``force`` replaces both.
    """
    statements = statements_file(output)
    header = {
        "command": COMMAND, "reader": result.reader, "labels": result.labels.identity, "reports": _digest(result),
        "uncertain": values.uncertain, "not_mentioned": values.not_mentioned,
    }  # fmt: skip
    with claimed_file(output):
        check_output(output, force=force)
        kept = _header(statements)
        if kept and kept != header and not force:
            raise DataError(
                f"{output}: holds labels of another reader, of other reports or with other values; give another --output, or "
                f"replace them with --force"
            )
        table = result.table(values)
        with written_beside(output) as partial:
            if output.suffix == ".parquet":
                write_parquet(partial, table)
            else:
                write_csv(partial, table)
        with written_beside(statements) as partial:
            lines = (json.dumps(line, ensure_ascii=False) for line in (header, *_lines(result)))
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output, statements


def check_output(output: Path, *, compared: bool = False, force: bool = False) -> None:
    """Raise unless labels may be written to ``output``, and, if they are ``compared``, the comparison beside it."""
    if output.suffix not in (".csv", ".parquet"):
        raise DataError(f"{output}: end the name in .csv or .parquet")
    check_file(output, lambda path: bool(_header(statements_file(path))), force=force)
    check_file(statements_file(output), lambda path: bool(_header(path)), force=force)
    if compared:
        check_file(comparison_file(output), file_holds(b'"disagreements"'), force=force)


def comparison_file(labels: Path) -> Path:
    """The file with the comparison of a table of labels with another."""
    return labels.with_name(f"{labels.stem}.comparison.json")


def statements_file(labels: Path) -> Path:
    """The file with the sentences behind a table of labels."""
    return labels.with_name(f"{labels.stem}.statements.jsonl")


def load_statements(path: Path) -> dict[str, dict[str, Statement]]:
    """The statements of each report, as ``write_readings`` wrote them. Raises DataError if the file is damaged."""
    statements = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            record = plain_json.loads(line)
            statements[str(record["id"])] = {
                name: Statement(Status(entry["status"]), entry.get("sentence", ""), entry.get("probability"))
                for name, entry in record["labels"].items()
            }
    except UNFIT as error:
        raise DataError(f"{path}: damaged; write it again with `ctclip read-reports`, or delete it") from error
    return statements


def _lines(result: Readings) -> Iterator[dict[str, Any]]:
    for name, reading in zip(result.reports.ids, result.readings, strict=True):
        entry = {
            label: {key: value for key, value in vars(statement).items() if value not in ("", None)}
            for label, statement in (reading or {}).items()
        }
        yield {"id": name, "read": reading is not None, "labels": entry}


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as stream:
            values = plain_json.loads(stream.readline(1 << 16))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and values.get("command") == COMMAND else {}


def _digest(result: Readings) -> str:
    text = json.dumps([result.reports.ids, result.reports.sections])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _note(names: Sequence[str], one: str, several: str, consequence: str) -> str:
    if len(names) == 1:
        return f"report {names[0]!r} {one}: its {consequence}"
    return f"{len(names)} reports {several} (the first: {names[0]!r}): their {consequence}"


def _read(
    reader: Reader, chunks: list[list[str]], kind: str, labels: LabelSet, options: Options, workers: int
) -> Iterator[list[Reading]]:
    if workers == 1 or not reader.shared or len(chunks) * CHUNK <= FEW:
        for chunk in track(chunks, len(chunks), "reading", "chunks"):
            yield reader.read(chunk)
        return
    with worker_pool(workers) as pool:
        futures = [pool.submit(_in_worker, kind, labels.model_dump_json(), options, chunk) for chunk in chunks]
        for future in track(futures, len(futures), "reading", "chunks"):
            yield future.result()


def _in_worker(kind: str, labels: str, options: Options, texts: list[str]) -> list[Reading]:
    return _worker_reader(kind, labels, options).read(texts)


@lru_cache(maxsize=1)
def _worker_reader(kind: str, labels: str, options: Options) -> Reader:
    return build_reader(kind, LabelSet.model_validate_json(labels), options)
