"""What goes with what in a cohort: concepts against splits, labels and scanners, the strongest evidence first.

Two families of comparisons, each corrected for its own number: possible shortcuts (what differs between splits, or goes
with a label without being of it), and plain differences between scanners, kernels, sexes and the like. The second are to be
expected, and would bury the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.audit.associations import Difference, differences, false_discovery, interaction, normal_scores
from ctclip.audit.groups import group_columns, is_of_patient, label_columns

SIGNIFICANT = 0.05
SHORTCUT, DIFFERENCE = "shortcut", "difference"
COLUMNS = (
    "family",
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


# Family, concept, its kind, group, where, and the difference.
Line = tuple[str, str, str, str, str, Difference]


@dataclass(frozen=True)
class Sheet:
    """Concepts of volumes: values (n, m) with a name and a kind each (those of ``concepts.Concept``, "technique", "picture",
    "metadata" of the acquisition or "patient"); table: the n rows of the cohort table."""

    table: pd.DataFrame
    values: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    def with_metadata(self) -> Sheet:
        """With an indicator of each value of the table's columns that group volumes, but for the split."""
        columns, names, kinds = [self.values], list(self.names), list(self.kinds)
        for group, values in group_columns(self.table).items():
            if group != "split":
                levels = np.unique(values[values != ""])
                # Of two values, one tells the other.
                for value in levels[:1] if len(levels) == 2 else levels:
                    columns.append(np.where(values == "", np.nan, values == value)[:, None].astype(float))
                    names.append(f"{group}: {value}")
                    kinds.append("patient" if is_of_patient(group) else "metadata")
        return Sheet(self.table, np.concatenate(columns, axis=1), tuple(names), tuple(kinds))


def audit_data(sheet: Sheet, splits: Sequence[str] = ("train", "valid")) -> pd.DataFrame:
    """Every comparison (``COLUMNS``), possible shortcuts first and then the strongest evidence; adjusted by family.

    Shortcuts:

    * Splits: each concept between a split and all others.
    * Labels: what tells of the technique alone (a table, a kernel, metadata of the acquisition) between volumes with and
      without the label. It should not differ; findings, age and sex may, and are not compared.
    * Labels in ``splits``: whether any concept but a finding goes with the label in one split more than in the other. What
      the model confuses, it confuses in both.

    Differences: each concept between a value of the metadata and all others.

    Differences are in standard deviations of the concept's normal scores.
    """
    whole = sheet.with_metadata()
    table, kinds, names = whole.table, np.array(whole.kinds), np.array(whole.names)
    scores = normal_scores(whole.values)
    patients, split = table["patient"].to_numpy(dtype=str), table["split"].to_numpy(dtype=str)
    lines: list[Line] = []

    def compare(family: str, member: np.ndarray, known: np.ndarray, columns: np.ndarray, group: str) -> None:
        results = differences(scores[np.ix_(known, columns)], member[known], patients[known])
        lines.extend(
            (family, str(names[column]), str(kinds[column]), group, "all", result)
            for column, result in zip(columns, results, strict=True)
            if result is not None
        )

    for group, values in group_columns(table).items():
        levels = np.unique(values[values != ""])
        # Metadata are compared between splits, and not with each other.
        columns = np.arange(len(names) if group == "split" else len(sheet.names))
        for value in levels[:1] if len(levels) == 2 else levels:
            against = f"{value} against {levels[1]}" if len(levels) == 2 else f"{value} against others"
            family = SHORTCUT if group == "split" else DIFFERENCE
            compare(family, values == value, values != "", columns, f"{group}: {against}")
    technique = np.flatnonzero(np.isin(kinds, ["technique", "metadata"]))
    shortcuts = np.flatnonzero(kinds != "finding")
    parts = [part for part in splits if (split == part).any()]
    for label, present in label_columns(table).items():
        known = ~np.isnan(present)
        compare(SHORTCUT, present == 1, known, technique, label)
        if len(parts) == 2:
            both = [
                differences(scores[np.ix_(own, shortcuts)], present[own] == 1, patients[own])
                for own in (known & (split == part) for part in parts)
            ]
            for column, one, other in zip(shortcuts, *both, strict=True):
                if one is not None and other is not None:
                    lines.append((SHORTCUT, str(names[column]), str(kinds[column]), label, f"{parts[0]} more than {parts[1]}", interaction(one, other)))  # fmt: skip
    return _table(lines)


def _table(lines: list[Line]) -> pd.DataFrame:
    rows = [
        (*words, d.value, d.lower, d.upper, d.p, np.nan, 0, f"{d.patients[0]} and {d.patients[1]}")
        for *words, d in lines
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for family in (SHORTCUT, DIFFERENCE):
        own = table["family"] == family
        table.loc[own, "adjusted_p"] = false_discovery(table.loc[own, "p"].to_numpy())
    table["significant"] = (table["adjusted_p"] < SIGNIFICANT).astype(int)
    order = np.lexsort((-table["difference"].abs(), table["p"], table["family"] == DIFFERENCE))
    return table.iloc[order].reset_index(drop=True)
