"""Detections on a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

NOTE = "zero-shot, not for diagnosis"


@dataclass(frozen=True)
class Detection:
    """What a model sees in one scan: ``probabilities`` and ``margins`` by abnormality, graded ``values``, warnings.

    Prints as a table, and shows as one in a notebook.
    """

    scan: str
    probabilities: dict[str, float]
    margins: dict[str, float]
    values: dict[str, float]
    calibrated: bool
    model: str
    spec: str
    warnings: tuple[str, ...] = ()

    def ranked(self) -> list[tuple[str, float]]:
        """Abnormalities, the likeliest first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])

    def frame(self) -> pd.DataFrame:
        """probability and margin, a row an abnormality, the likeliest first."""
        names = [name for name, _ in self.ranked()]
        columns = {name: [self.probabilities[name], self.margins[name]] for name in names}
        return pd.DataFrame.from_dict(columns, orient="index", columns=["probability", "margin"])

    def __str__(self) -> str:
        width = max(len(name) for name in self.probabilities)
        lines = [self._title()]
        lines += [f"{name:<{width}}  {p:6.1%}  {'#' * round(20 * p)}" for name, p in self.ranked()]
        lines += [f"{name}: {value:.1f}" for name, value in self.values.items()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(name)}</td><td>{p:.1%}</td><td>{self.margins[name]:+.2f}</td></tr>"
            for name, p in self.ranked()
        )
        notes = "".join(f"<p>{escape(text)}</p>" for text in self.warnings)
        return (
            f"<b>{escape(self._title())}</b><table><tr><th>abnormality</th><th>probability</th><th>margin</th></tr>"
            f"{rows}</table>{notes}"
        )

    def _title(self) -> str:
        return f"{self.scan} ({'calibrated' if self.calibrated else 'not calibrated'}; {NOTE})"


def table_of(table: pd.DataFrame, abnormalities: Sequence[str], calibrated: bool, most: int = 20) -> None:
    """Print a table of probabilities: a row an abnormality, a column a scan (the first few of many)."""
    from rich.console import Console
    from rich.table import Table

    shown = table.head(6)
    grid = Table(title=f"Probabilities ({'calibrated' if calibrated else 'not calibrated'}; {NOTE})")
    grid.add_column("abnormality")
    for name in shown["volume"]:
        grid.add_column(str(name), justify="right")
    order = sorted(abnormalities, key=lambda name: -float(shown[name].to_numpy()[0]))[:most]
    for name in order:
        grid.add_row(name, *[f"{value:.2f}" for value in shown[name]])
    for name in [name for name in shown.columns if name.startswith("value:")]:
        grid.add_row(name.removeprefix("value:"), *[f"{value:.1f}" for value in shown[name]])
    Console().print(grid)
    if len(table) > len(shown):
        print(f"({len(table) - len(shown)} more in the file)")
    for row in shown.itertuples():
        if isinstance(row.warnings, str) and row.warnings:
            print(f"{row.volume}: {row.warnings}")


def neighbours(title: str, hits: pd.DataFrame) -> None:
    """Print the hits of an index: how near, which scan, what its report concluded."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    grid.add_column("similarity", justify="right")
    grid.add_column("volume")
    grid.add_column("impression (findings where there is none)")
    for hit in hits.itertuples():
        said = str(hit.impression) or str(hit.findings)
        grid.add_row(f"{hit.similarity:.3f}", str(hit.volume), said if len(said) <= 160 else said[:157] + "...")
    Console().print(grid)
