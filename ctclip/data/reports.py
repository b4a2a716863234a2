"""Views of a report: which of its sentences a training step shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ctclip.config import ViewConfig
from ctclip.sentences import sentences

# Wording alone decides; no label is looked at. Radiologists negate at the start of a sentence or after "is/are".
NEGATION = re.compile(
    r"\b(no|not|without|neither|nor|normal|unremarkable|absent|free of|clear|negative|open|patent|preserved)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Report:
    """The sections of a report that describe the volume; an absent section is the empty string."""

    findings: str
    impression: str

    def text(self) -> str:
        return " ".join(part for part in (self.findings.strip(), self.impression.strip()) if part)


def negates(sentence: str) -> bool:
    """Whether a sentence states that something is absent or normal, by its wording."""
    return NEGATION.search(sentence) is not None


class ReportViews:
    """Draws views of reports by the weights of a ``ViewConfig``."""

    def __init__(self, config: ViewConfig, shuffle: bool = False) -> None:
        self.shuffle = shuffle
        weights = np.array([getattr(config, name) for name in VIEWS], dtype=float)
        self.names = list(VIEWS)
        self.probabilities = weights / weights.sum()

    def draw(self, report: Report, random: np.random.Generator) -> str:
        """One view; where it would be empty (no impression was written, say) the whole report stands in."""
        name = self.names[random.choice(len(self.names), p=self.probabilities)]
        chosen = VIEWS[name](report, random)
        if not chosen:
            chosen = sentences(report.text()) or ["No report."]
        if self.shuffle and len(chosen) > 1:
            chosen = [chosen[index] for index in random.permutation(len(chosen))]
        return " ".join(chosen)


def _one(report: Report, random: np.random.Generator) -> list[str]:
    every = sentences(report.text())
    return [every[random.integers(len(every))]] if every else []


def _some(report: Report, random: np.random.Generator) -> list[str]:
    every = sentences(report.text())
    if len(every) < 2:
        return every
    count = int(random.integers(1, min(4, len(every)) + 1))
    return [every[index] for index in random.permutation(len(every))[:count]]


VIEWS: dict[str, Callable[[Report, np.random.Generator], list[str]]] = {
    "report": lambda report, random: sentences(report.text()),
    "findings": lambda report, random: sentences(report.findings),
    "impression": lambda report, random: sentences(report.impression),
    "sentence": _one,
    "sentences": _some,
    "positive": lambda report, random: [s for s in sentences(report.text()) if not negates(s)],
}
