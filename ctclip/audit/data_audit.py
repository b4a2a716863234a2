"""What goes with what in a cohort: concepts against splits, scanners and labels, the strongest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.audit.associations import Difference, differences, false_discovery, interaction, normal_scores
from ctclip.audit.groups import group_columns, label_columns

SIGNIFICANT = 0.05
COLUMNS = (
    "concept",
    "kind",
    "group",
    "where",
    "difference",
    "lower",
    "upper",
    "p",
    "adjusted_p",
    "significant",
    "patients",
)


@dataclass(frozen=True)
class Sheet:
    """Concepts of volumes: values (n, m) with a name and a kind each (those of ``concepts.Concept``, "technique", "picture"
    or "metadata"); table: the n rows of the cohort table."""

    table: pd.DataFrame
    values: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    def with_metadata(self) -> Sheet:
        """With an indicator of each value of the table's columns that group volumes, but for the split."""
        columns, names = [self.values], list(self.names)
        for group, values in group_columns(self.table).items():
            if group != "split":
                for value in np.unique(values[values != ""]):
                    columns.append(np.where(values == "", np.nan, values == value)[:, None].astype(float))
                    names.append(f"{group}: {value}")
        return Sheet(self.table, np.concatenate(columns, axis=1), tuple(names), (*self.kinds, *["metadata"] * (len(names) - len(self.names))))  # fmt: skip


def audit_data(sheet: Sheet, splits: Sequence[str] = ("train", "valid")) -> pd.DataFrame:
    """Every comparison (``COLUMNS``), the strongest evidence first; adjusted for all of them together.

    * Splits and metadata: each concept between a value and all others.
    * Labels: what tells of the technique alone (a table, a kernel, metadata) between volumes with and without the label. It
      should not differ; findings may, and are not compared.
    * Labels in ``splits``: whether any concept but a finding goes with the label in one split more than in the other. What
      the model confuses, it confuses in both.

    Differences are in standard deviations of the concept's normal scores.
    """
    whole = sheet.with_metadata()
    table, kinds, names = whole.table, np.array(whole.kinds), np.array(whole.names)
    scores = normal_scores(whole.values)
    patients, split = table["patient"].to_numpy(dtype=str), table["split"].to_numpy(dtype=str)
    lines: list[tuple[str, str, str, str, Difference]] = []

    def compare(
        member: np.ndarray, known: np.ndarray, columns: np.ndarray, group: str, where: str
    ) -> list[Difference | None]:
        results = differences(scores[np.ix_(known, columns)], member[known], patients[known])
        lines.extend(
            (str(names[column]), str(kinds[column]), group, where, result)
            for column, result in zip(columns, results, strict=True)
            if result is not None
        )
        return results

    for group, values in group_columns(table).items():
        levels = np.unique(values[values != ""])
        others = np.array(
            [
                c
                for c in range(len(names))
                if not names[c].startswith(f"{group}: ") and (kinds[c] != "metadata" or group == "split")
            ]
        )
        for value in levels[:1] if len(levels) == 2 else levels:
            against = f"{value} against {levels[1]}" if len(levels) == 2 else f"{value} against others"
            compare(values == value, values != "", others, f"{group}: {against}", "all")
    technique = np.flatnonzero(np.isin(kinds, ["technique", "metadata"]))
    shortcuts = np.flatnonzero(kinds != "finding")
    parts = [part for part in splits if (split == part).any()]
    for label, present in label_columns(table).items():
        known = ~np.isnan(present)
        compare(present == 1, known, technique, label, "all")
        if len(parts) == 2:
            both = [
                differences(scores[np.ix_(own, shortcuts)], present[own] == 1, patients[own])
                for own in (known & (split == part) for part in parts)
            ]
            for column, one, other in zip(shortcuts, *both, strict=True):
                if one is not None and other is not None:
                    lines.append((str(names[column]), str(kinds[column]), label, f"{parts[0]} more than {parts[1]}", interaction(one, other)))  # fmt: skip
    return _table(lines)


def _table(lines: list[tuple[str, str, str, str, Difference]]) -> pd.DataFrame:
    rows = [
        (concept, kind, group, where, d.value, d.lower, d.upper, d.p, np.nan, 0, f"{d.patients[0]} and {d.patients[1]}")
        for concept, kind, group, where, d in lines
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["adjusted_p"] = false_discovery(table["p"].to_numpy())
    table["significant"] = (table["adjusted_p"] < SIGNIFICANT).astype(int)
    strength = -table["difference"].abs()
    return table.iloc[np.lexsort((strength, table["p"]))].reset_index(drop=True)
