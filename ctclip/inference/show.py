"""Show detections on a terminal and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from ctclip.evaluation.tables import LIMITS
from ctclip.labels import named
from ctclip.preprocessing.errors import printable

if TYPE_CHECKING:
    from ctclip.heads.head import Head

NOTE = "zero-shot, not for diagnosis"
ABOVE = "* at or above the threshold of the calibration split"
INTERVAL = "95% interval"
APART = "not calibrated, not comparable with those above:"
MOST_SCANS = 6


@dataclass(frozen=True)
class Detection:
    """The result for one scan: ``probabilities`` and ``margins`` by abnormality, graded ``values`` (the size of a
    finding if it is present), ``thresholds`` and 95 % ``intervals`` of calibrated findings, warnings, hashes of model and spec, and the
    model's training data (``trained_on``).

    Prints as a table, also in a notebook.
    """

    scan: str
    probabilities: dict[str, float]
    margins: dict[str, float]
    values: dict[str, float]
    calibrated: str
    model: str
    spec: str
    thresholds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    trained_on: str = ""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def ranked(self) -> list[tuple[str, float]]:
        """Abnormalities, the most likely first. Uncalibrated ones follow the calibrated ones, because their
        probabilities are not comparable."""
        return sorted(self.probabilities.items(), key=lambda item: (item[0] not in self.thresholds, -item[1]))

    def frame(self) -> pd.DataFrame:
        """A table of probability, its 95 % interval (``lower``, ``upper``), margin and threshold (NaN if unknown), one row per
        abnormality, the most likely first."""
        unknown = float("nan")
        rows = {
            name: [
                p,
                *self.intervals.get(name, (unknown, unknown)),
                self.margins[name],
                self.thresholds.get(name, unknown),
            ]
            for name, p in self.ranked()
        }
        columns = ["probability", "lower", "upper", "margin", "threshold"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)

    def above(self, name: str) -> bool:
        """Whether an abnormality is calibrated and its probability reaches the threshold. The name may have any case
        and spacing. Raises KeyError for a name that was not scored."""
        known = named(self.probabilities, name)
        return self.probabilities[known] >= self.thresholds.get(known, float("inf"))

    def __str__(self) -> str:
        width = max(len(name) for name in self.probabilities)
        spread = f"{INTERVAL:>16}  " if self.intervals else ""
        lines = [self._title(), f"{'':<{width}}  probability  {spread} margin"]
        for number, (name, p) in enumerate(self.ranked()):
            mark = "*" if self.above(name) else " "
            if number == len(self.thresholds) > 0:
                lines.append(APART)
            lines.append(
                f"{name:<{width}}  {p:>11.1%}{mark} {self._interval(name):>{len(spread)}}{self.margins[name]:>+7.2f}  {'█' * round(20 * p)}".rstrip()
            )
        lines += [f"{name}: {value:.1f} if present" for name, value in self.values.items()]
        lines += [ABOVE] if self.thresholds else []
        lines += [f"the model was trained on: {self.trained_on}"] if self.trained_on else []
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        bar = "<div style='background:#2f6f9f;height:.7em;width:{:.0f}px'></div>"
        apart = f"<tr><td colspan='5' style='text-align:left'><i>{APART}</i></td></tr>"
        rows = "".join(
            f"{apart if number == len(self.thresholds) > 0 else ''}"
            f"<tr><td style='text-align:left'>{escape(name)}</td><td>{p:.1%}{' *' if self.above(name) else ''}</td>"
            f"<td>{self._interval(name)}</td><td>{self.margins[name]:+.2f}</td><td style='text-align:left'>{bar.format(120 * p)}</td></tr>"
            for number, (name, p) in enumerate(self.ranked())
        )
        notes = [f"{name}: {value:.1f} if present" for name, value in self.values.items()]
        notes += [ABOVE] if self.thresholds else []
        notes += [f"The model was trained on: {self.trained_on}"] if self.trained_on else []
        notes += [f"Warning: {text}" for text in self.warnings]
        return (
            f"<b>{escape(self._title())}</b><table><tr><th style='text-align:left'>abnormality</th><th>probability</th>"
            f"<th>{INTERVAL if self.intervals else ''}</th><th>margin</th><th></th></tr>{rows}</table>{''.join(f'<p>{escape(note)}</p>' for note in notes)}"
        )

    def _interval(self, name: str) -> str:
        return interval_words(*self.intervals[name]) if name in self.intervals else ""

    def _title(self) -> str:
        return f"{self.scan} ({self.calibrated}; {NOTE})"


def interval_words(low: float, high: float) -> str:
    """Limits of a probability as text."""
    return f"{low:.1%} to {high:.1%}"


def calibrated(head: Head) -> str:
    """A sentence on whether the probabilities are calibrated."""
    known = head.thresholds()
    without = [name for name in head.names if name not in known]
    if not without:
        return "calibrated"
    if not known:
        return "not calibrated"
    names = ", ".join(without) if len(without) <= 3 else f"{len(without)} of {len(head.names)}"
    return f"calibrated, except {names}"


def table_of(table: pd.DataFrame, head: Head, volumes: int) -> None:
    """Print a table of probabilities with one row per abnormality and one column per scan (the first few of
    ``volumes``)."""
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console()
    # A column needs about fourteen characters.
    scans = table.head(min(MOST_SCANS, max(1, (console.width - 40) // 14)))
    grid = Table(title=plain(f"Probabilities ({calibrated(head)}; {NOTE})"))
    grid.add_column("abnormality", no_wrap=True)
    for name in scans["volume"]:
        grid.add_column(plain(str(name)), justify="right", overflow="fold")
    with_intervals = len(scans) == 1 and any(str(name).startswith(LIMITS) for name in scans.columns)
    if with_intervals:
        grid.add_column(INTERVAL, justify="right")
    if len(scans) == 1:
        grid.add_column("margin", justify="right")
    known = head.thresholds()
    for number, name in enumerate(
        sorted(head.names, key=lambda name: (name not in known, -float(scans[name].to_numpy()[0])))
    ):
        if number == len(known) > 0:
            grid.add_section()
            grid.add_row(f"[italic]{APART}[/italic]")
        cells = [f"{value:.2f}{'*' if value >= known.get(name, 2) else ' '}" for value in scans[name]]
        if with_intervals:
            limits = [f"{limit}{name}" for limit in LIMITS]
            cells.append(interval_words(*scans[limits].iloc[0]) if limits[0] in scans else "")
        if len(scans) == 1:
            cells.append(f"{scans[f'margin:{name}'].iloc[0]:+.2f}")
        grid.add_row(plain(name), *cells)
    for name in [name for name in scans.columns if name.startswith("value:")]:
        grid.add_row(plain(f"{name.removeprefix('value:')}, if present"), *[f"{value:.1f} " for value in scans[name]])
    console.print(grid)
    if known:
        console.print(ABOVE)
    if volumes > len(scans):
        print(f"({volumes - len(scans)} more in the file)")
    for volume, warnings in zip(scans["volume"], scans["warnings"], strict=True):
        if warnings:
            print(f"{volume}: {warnings}")


def neighbours(title: str, hits: pd.DataFrame) -> None:
    """Print the hits of an index: similarity, scan, and the impression of its report."""
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    grid = Table(title=title)
    grid.add_column("similarity", justify="right")
    grid.add_column("volume", overflow="fold")
    grid.add_column("impression (findings where there is none)")
    for hit in hits.itertuples():
        conclusion = str(hit.impression) or str(hit.findings)
        excerpt = conclusion if len(conclusion) <= 160 else conclusion[:157] + "..."
        grid.add_row(f"{hit.similarity:.3f}", *(plain(printable(text)) for text in (str(hit.volume), excerpt)))
    Console().print(grid)
