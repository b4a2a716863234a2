"""Reports: their sections as one text, and random views of them for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.language import Language
from ctclip.sentences import sentences

NO_REPORT = "No report."
# Number of sentences of a report that objectives on sentences use.
MOST_SENTENCES = 100


@dataclass(frozen=True)
class Report:
    """The sections of a report that describe the volume, by name and in order; a missing section is the empty
    string."""

    sections: Mapping[str, str]

    def text(self) -> str:
        """All sections as one text, as embedded in training, validation and retrieval."""
        return " ".join(text.strip() for text in self.sections.values() if text.strip())


def reports_of(table: pd.DataFrame, sections: Sequence[str]) -> list[Report]:
    """The report of each row of a cohort table; a section without a column is missing."""
    columns = {name: table[name].fillna("").astype(str) for name in sections if name in table.columns}
    return [Report(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)] if columns else [
        Report({}) for _ in range(len(table))
    ]  # fmt: skip


def stated_sentences(reports: Sequence[Report]) -> list[list[str]]:
    """The sentences of each report, each once and in order. A text without a word is one sentence, as in the text
    encoder."""
    texts = [report.text() for report in reports]
    stated = {text: list(dict.fromkeys(sentences(text) or [text])) for text in set(texts)}
    return [stated[text] for text in texts]


def sentence_numbers(stated: Sequence[Sequence[str]], known: Sequence[str]) -> np.ndarray:
    """Where the sentences of each report are in ``known``: (reports, S) int64, filled up with -1. Unknown sentences are
    left out, and those after the first MOST_SENTENCES of a report."""
    places = {sentence: place for place, sentence in enumerate(known)}
    rows = [[places[sentence] for sentence in own if sentence in places][:MOST_SENTENCES] for own in stated]
    numbers = np.full((len(rows), max(1, *map(len, rows))), -1, dtype=np.int64)
    for row, found in zip(numbers, rows, strict=True):
        row[: len(found)] = found
    return numbers


class ReportViews:
    """Draws views of reports by their weights."""

    def __init__(self, weights: Mapping[str, float], language: Language, shuffle: bool = False) -> None:
        """``weights``: weight of each view: ``report``, ``sentence``, ``sentences``, ``positive``, or the name of a
        section."""
        self.shuffle, self.language = shuffle, language
        self.names = [name for name, weight in weights.items() if weight > 0]
        values = np.array([weights[name] for name in self.names], dtype=float)
        self.probabilities = values / values.sum()

    def draw(self, report: Report, random: np.random.Generator) -> str:
        """Draw one view; if it would be empty (such as a missing section), the whole report is used."""
        name = self.names[random.choice(len(self.names), p=self.probabilities)]
        chosen = self._view(name, report, random)
        if not chosen:
            chosen = sentences(report.text()) or [NO_REPORT]
        if self.shuffle and len(chosen) > 1:
            chosen = [chosen[index] for index in random.permutation(len(chosen))]
        return " ".join(chosen)

    def _view(self, name: str, report: Report, random: np.random.Generator) -> list[str]:
        if name in DRAWN:
            return DRAWN[name](sentences(report.text()), random)
        if name == "positive":
            return [sentence for sentence in sentences(report.text()) if not self.language.negates(sentence)]
        return sentences(report.sections.get(name, ""))


def _one(every: list[str], random: np.random.Generator) -> list[str]:
    return [every[random.integers(len(every))]] if every else []


def _some(every: list[str], random: np.random.Generator) -> list[str]:
    if len(every) < 2:
        return every
    count = int(random.integers(1, min(4, len(every)) + 1))
    return [every[index] for index in random.permutation(len(every))[:count]]


DRAWN: dict[str, Callable[[list[str], np.random.Generator], list[str]]] = {
    "report": lambda every, random: every,
    "sentence": _one,
    "sentences": _some,
}
