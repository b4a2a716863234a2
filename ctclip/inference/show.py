"""Detections on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def table_of(table: pd.DataFrame, abnormalities: Sequence[str], most: int = 20) -> None:
    """Print a table of probabilities: a row an abnormality, a column a scan (the first few of many)."""
    from rich.console import Console
    from rich.table import Table

    shown = table.head(6)
    grid = Table(title="Zero-shot probabilities (not calibrated, not for diagnosis)")
    grid.add_column("abnormality")
    for name in shown["volume"]:
        grid.add_column(str(name), justify="right")
    order = sorted(abnormalities, key=lambda name: -float(shown[name].to_numpy()[0]))[:most]
    for name in order:
        grid.add_row(name, *[f"{value:.2f}" for value in shown[name]])
    Console().print(grid)
    for row in table.itertuples():
        if getattr(row, "warnings", ""):
            print(f"{row.volume}: {row.warnings}")
