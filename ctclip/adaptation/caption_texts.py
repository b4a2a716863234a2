"""Training reports for a caption head: sentences, with the findings that each states.

Sizes are removed, because nothing measures them for the decoder. Sides are removed if the finding is prompted without a
side. The decoder thus learns not to invent sizes or sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.heads.caption import ReportTokens, statement
from ctclip.heads.plan import PARTS, SIDES
from ctclip.preprocessing.no_report import report_text
from ctclip.report_reading.findings import BOTH, Cleaner
from ctclip.report_reading.reader import Status
from ctclip.report_reading.reduce import Reducer


@dataclass(frozen=True)
class Sentence:
    """``text``: the sentence without sizes; ``unsided``: also without sides, None if it makes no sense without them;
    ``present``: the findings that it states to be present, with the sides of each."""

    text: str
    unsided: str | None
    present: dict[str, frozenset[str]]


@dataclass(frozen=True)
class TrainingReport:
    """``sections``: sentences by section; ``present``: the findings that the whole report states, each with its side or
    ""; ``doubtful``: the uncertain findings."""

    sections: tuple[tuple[Sentence, ...], ...]
    present: dict[str, str]
    doubtful: frozenset[str]

    def stated(self, names: Sequence[str]) -> np.ndarray:
        """The targets of a plan, (names, PARTS) float32 of 0 and 1; NaN for uncertain findings."""
        values = np.zeros((len(names), PARTS), np.float32)
        for row, name in zip(values, names, strict=True):
            if name in self.present:
                row[:] = [1, *(self.present[name] == side for side in SIDES)]
            elif name in self.doubtful:
                row[:] = np.nan
        return values


class Examples:
    """Draws reports as tokens, with or without a prompt of their findings."""

    def __init__(
        self, tokens: ReportTokens, reports: Sequence[TrainingReport], names: Sequence[str], told: float, quiet: float
    ) -> None:
        """``told``, ``quiet``: the fractions described in ``CaptionConfig``."""
        self.tokens, self.reports, self.names = tokens, reports, tuple(names)
        self.told, self.quiet = told, quiet

    def __len__(self) -> int:
        return len(self.reports)

    def draw(self, row: int, random: np.random.Generator) -> tuple[list[int], int]:
        """The tokens of a report, and the length of the prefix."""
        report = self.reports[row]
        if random.random() >= self.told:
            return self.tokens.whole(_texts(report.sections), None)
        quiet = {name for name in report.present if random.random() < self.quiet}
        shortened = [[_without(one, quiet) for one in part] for part in report.sections]
        sections = [[one for one in part if one is not None] for part in shortened]
        kept = {name for part in sections for one in part for name in one.present}
        told = [statement(name, "" if name in quiet else report.present[name]) for name in self.names if name in kept]
        return self.tokens.whole(_texts(sections), told)


def read_reports(cleaner: Cleaner, table: pd.DataFrame, sections: Sequence[str]) -> list[TrainingReport]:
    """The reports of a table as sentences. Rules read what they state; the labels of the volumes are not used."""
    reducer = Reducer(cleaner)
    known: dict[str, Sentence | None] = {}
    reports = []
    for row in table.to_dict("records"):
        parts, sides, doubtful = [], dict[str, set[str]](), set[str]()
        for section in sections:
            kept = []
            for one in cleaner.clean(report_text(row.get(section, ""))):
                for finding in one.findings:
                    if finding.status is Status.present:
                        sides.setdefault(finding.label, set()).update({finding.side} - {""})
                    elif finding.status is Status.uncertain:
                        doubtful.add(finding.label)
                if one.text not in known:
                    known[one.text] = _sentence(one.text, cleaner, reducer)
                sentence = known[one.text]
                if sentence is not None:
                    kept.append(sentence)
            parts.append(tuple(kept))
        present = {name: BOTH if len(each) > 1 else next(iter(each), "") for name, each in sides.items()}
        reports.append(TrainingReport(tuple(parts), present, frozenset(doubtful)))
    return reports


def _sentence(text: str, cleaner: Cleaner, reducer: Reducer) -> Sentence | None:
    """None for a sentence about a size, or one that compares with an earlier scan."""
    cleaned = cleaner.clean(text)
    if not cleaned or cleaned[0].comparison:
        return None
    one = cleaned[0]
    without = reducer.without_sizes(one)
    if without is None:
        return None
    unsided = reducer.without_sides(without)
    present: dict[str, frozenset[str]] = {}
    for finding in without.findings:
        if finding.status is Status.present:
            present[finding.label] = present.get(finding.label, frozenset()) | ({finding.side} - {""})
    return Sentence(without.text, None if unsided is None else unsided.text, present)


def _without(sentence: Sentence, quiet: set[str]) -> Sentence | None:
    """The sentence, without sides if it states the side of a finding in ``quiet``; None if it makes no sense without
    them."""
    if not any(sides and name in quiet for name, sides in sentence.present.items()):
        return sentence
    if sentence.unsided is None:
        return None
    return Sentence(sentence.unsided, sentence.unsided, {name: frozenset() for name in sentence.present})


def _texts(sections: Sequence[Sequence[Sentence]]) -> list[str]:
    """The text of each section up to the last non-empty one, so that the decoder does not learn to write empty
    sections."""
    texts = [" ".join(one.text for one in part) for part in sections]
    while len(texts) > 1 and not texts[-1]:
        texts.pop()
    return texts
