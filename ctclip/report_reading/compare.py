"""Agreement of a reader with another reader or a table: by label, with the sentences on which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from sklearn.metrics import cohen_kappa_score

from ctclip.errors import DataError
from ctclip.preprocessing.label_columns import zeros_and_ones
from ctclip.preprocessing.tables import one_row_each, read_table, volume_name
from ctclip.report_reading.reader import Statement
from ctclip.report_reading.reports import IDS
from ctclip.report_reading.run import Readings, Values, load_statements, statements_file


@dataclass(frozen=True)
class Agreement:
    """Agreement on one label, over the reports for which both tables have 0 or 1. ``theirs`` is the reference for F1.

    ``kappa``: Cohen's (1960); None if both tables hold the same single value throughout. ``f1``: None if neither table
    has a positive.
    """

    label: str
    reports: int
    agreement: float | None
    kappa: float | None
    f1: float | None
    ours: int
    theirs: int


@dataclass(frozen=True)
class Disagreement:
    """A report and label on which two tables differ, with the sentence behind each value."""

    report: str
    label: str
    ours: int
    theirs: int
    our_sentence: str
    their_sentence: str


def compare(result: Readings, other: Path, values: Values) -> tuple[list[Agreement], list[Disagreement]]:
    """Compare ``result`` with the table of labels ``other``, whose sentences are included if it has any.

    Raises DataError if the tables have no report or no label in common.
    """
    ours = result.table(values).set_index(result.reports.id_column)
    ours.index = ours.index.map(volume_name)
    theirs = _labels(other, result)
    names = [name for name in result.labels.names if name in theirs.columns]
    common = ours.index[~ours.index.duplicated()].intersection(theirs.index)
    if not names or common.empty:
        raise DataError(f"{other}: shares no {'label' if not names else 'report'} with {result.reports.source}")
    ours = ours[~ours.index.duplicated()]
    readings = {volume_name(name): r or {} for name, r in zip(result.reports.ids, result.readings, strict=True)}
    beside = statements_file(other)
    stated = {volume_name(k): v for k, v in load_statements(beside).items()} if beside.is_file() else {}
    agreements, disagreements = [], []
    for name in names:
        pair = pd.DataFrame({"ours": ours.loc[common, name], "theirs": theirs.loc[common, name]}).dropna().astype(int)
        agreements.append(_agreement(name, pair))
        for report, row in pair[pair["ours"] != pair["theirs"]].iterrows():
            sentence_pair = [_sentence(statements, str(report), name) for statements in (readings, stated)]
            disagreements.append(Disagreement(str(report), name, int(row["ours"]), int(row["theirs"]), *sentence_pair))
    return agreements, disagreements


def mean_of(agreements: list[Agreement], figure: str) -> float | None:
    """The mean of a figure over the labels for which it is defined."""
    values = [asdict(agreement)[figure] for agreement in agreements]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _agreement(name: str, pair: pd.DataFrame) -> Agreement:
    ours, theirs = pair["ours"], pair["theirs"]
    positives = int(ours.sum() + theirs.sum())
    one_value = len(pair) == 0 or (ours.nunique() == 1 and theirs.nunique() == 1 and ours.iloc[0] == theirs.iloc[0])
    return Agreement(
        name,
        len(pair),
        float((ours == theirs).mean()) if len(pair) else None,
        None if one_value else float(cohen_kappa_score(ours, theirs)),
        float(2 * (ours & theirs).sum() / positives) if positives else None,
        int(ours.sum()),
        int(theirs.sum()),
    )


def _labels(path: Path, result: Readings) -> pd.DataFrame:
    """The labels of a table, indexed by report id."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    table = read_table(path)
    keys = {column.casefold(): column for column in table.columns}
    id_column = keys.get(result.reports.id_column.casefold()) or next((keys[k] for k in IDS if k in keys), None)
    if id_column is None:
        raise DataError(f"{path}: has no column {result.reports.id_column!r} that names the report")
    columns = {name: parts[0] for name, parts in result.labels.columns(table.columns).items()}
    for column in columns.values():
        # Here and not by report: the error names the line of the file.
        zeros_and_ones(table[column], f"{path}: label column {column!r}")
    whole = one_row_each([(path, table[[id_column, *columns.values()]])], id_column)
    return pd.DataFrame(
        {name: zeros_and_ones(whole[column], f"{path}: {column!r}") for name, column in columns.items()}
    )


def _sentence(statements: Mapping[str, Mapping[str, Statement]], report: str, label: str) -> str:
    statement = statements.get(report, {}).get(label)
    return statement.sentence if statement is not None else ""
