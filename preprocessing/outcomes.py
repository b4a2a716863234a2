"""The outcome of each volume of a run: ``outcomes.csv`` of a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import read_table

OUTCOME_COLUMNS = ("volume", "outcome", "reason", "source_spacing", "source_shape")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one volume: refused with a reason, left out with a reason, or done."""

    volume: str
    refused: str | None
    warnings: tuple[str, ...] = ()
    source_spacing: str = ""
    source_shape: str = ""
    left_out: str | None = None

    @property
    def word(self) -> str:
        """``done``, ``refused`` or ``left out``."""
        return "refused" if self.refused else "left out" if self.left_out else "done"

    def row(self) -> dict[str, str]:
        """A row of ``outcomes.csv``."""
        reason = self.refused or self.left_out or "; ".join(self.warnings)
        values = (self.volume, self.word, reason, self.source_spacing, self.source_shape)
        return dict(zip(OUTCOME_COLUMNS, values, strict=True))

    @classmethod
    def of_row(cls, row: Mapping[Any, Any]) -> Outcome:
        """The outcome in a row of ``outcomes.csv``."""
        volume, word, reason, spacing, shape = (row[name] for name in OUTCOME_COLUMNS)
        if word == "done":
            return cls(volume, None, tuple(reason.split("; ")) if reason else (), spacing, shape)
        return cls(volume, reason if word == "refused" else None, left_out=None if word == "refused" else reason)


def outcomes_name(shard: tuple[int, int] = (1, 1)) -> str:
    """The name of the file with the outcomes of a run, or of one of its shards."""
    return "outcomes.csv" if shard[1] == 1 else f"outcomes-{shard[0]}-of-{shard[1]}.csv"


def write_outcomes(store: VolumeStore, outcomes: Iterable[Outcome], shard: tuple[int, int]) -> None:
    """Write ``outcomes[-i-of-n].csv``: the outcome and reason for each volume."""
    rows = [outcome.row() for outcome in sorted(outcomes, key=lambda outcome: outcome.volume)]
    with written_beside(store.path / outcomes_name(shard)) as partial:
        write_csv(partial, pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)))
    if shard[1] == 1:
        # All outcomes are now in one table; tables of earlier shards are removed, so that later merges ignore them.
        for part in store.path.glob("outcomes-*-of-*.csv"):
            part.unlink(missing_ok=True)


def read_outcomes(store: VolumeStore) -> dict[str, Outcome]:
    """Read the outcomes of finished volumes of earlier runs and shards."""
    outcomes: dict[str, Outcome] = {}
    for path in sorted(store.path.glob("outcomes*.csv")):
        table = outcome_table(path)
        done = table[table["outcome"] == "done"].to_dict("records")
        outcomes |= {str(row["volume"]): Outcome.of_row(row) for row in done}
    return outcomes


def outcome_table(path: Path) -> pd.DataFrame:
    """The rows of an ``outcomes*.csv`` as strings. Raises PreprocessingError if it is damaged."""
    try:
        table = read_table(path)
    except PreprocessingError as error:
        raise PreprocessingError(f"{error}; or delete it, and run `ctclip preprocess` on this store again") from error
    for name in ("volume", "outcome"):
        if name not in table:
            raise PreprocessingError(
                f"{path}: column {name!r} is missing; delete it, and run `ctclip preprocess` on this store again"
            )
    return table.reindex(columns=list(OUTCOME_COLUMNS), fill_value="")
