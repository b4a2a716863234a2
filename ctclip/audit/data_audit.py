"""Associations of concepts with splits, labels and scanners in a cohort.

There are two families of comparisons. Possible shortcuts differ between splits, or are associated with a label without
being part of it; their family-wise error rate is controlled. Plain differences between scanners, kernels, sexes and the
like are expected, and are listed apart so that they do not hide the shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.audit.associations import Difference, differences, false_discovery, group_means, normal_scores
from ctclip.audit.groups import group_columns, is_of_patient, label_columns
from ctclip.audit.permutations import PERMUTATIONS, Moments, Standardised, compare, family_wise, shuffled

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


# Family, concept, kind of the concept, group, split, and the difference.
Line = tuple[str, str, str, str, str, Difference]


@dataclass(frozen=True)
class Sheet:
    """Concepts of volumes: ``values`` (n, m), each column with a name and a kind (those of ``concepts.Concept``,
    "technique", "picture", "metadata" of the acquisition, or "patient"); ``table``: the n rows of the cohort table."""

    table: pd.DataFrame
    values: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    def with_metadata(self) -> Sheet:
        """Add an indicator for each value of the table's grouping columns, except the split."""
        columns, names, kinds = [self.values], list(self.names), list(self.kinds)
        for group, values in group_columns(self.table).items():
            if group != "split":
                levels = np.unique(values[values != ""])
                # With two values, one indicator determines the other.
                for value in levels[:1] if len(levels) == 2 else levels:
                    columns.append(np.where(values == "", np.nan, values == value)[:, None].astype(float))
                    names.append(f"{group}: {value}")
                    kinds.append("patient" if is_of_patient(group) else "metadata")
        return Sheet(self.table, np.concatenate(columns, axis=1), tuple(names), tuple(kinds))

    def lines(
        self, family: str, columns: np.ndarray, group: str, where: str, results: Sequence[Difference | None]
    ) -> list[Line]:
        """Lines for the columns that could be compared."""
        return [
            (family, self.names[column], self.kinds[column], group, where, result)
            for column, result in zip(columns, results, strict=True)
            if result is not None
        ]


def audit_data(
    sheet: Sheet, splits: Sequence[str] = ("train", "valid"), *, seed: int = 0, permutations: int = PERMUTATIONS
) -> pd.DataFrame:
    """Every comparison as a table (``COLUMNS``): possible shortcuts first, each family sorted by the strength of the
    evidence.

    Shortcuts have a family-wise error rate of 5 % (``permutations`` of patients, drawn with ``seed``):

    * Splits: each concept is compared between a split and all others. The splits of patients are permuted.
    * Labels: concepts that depend on technique alone (table, kernel, metadata of the acquisition) are compared between
      volumes with and without the label. They should not differ; findings, age and sex may differ and are not compared.
      The label is permuted.
    * Labels in ``splits``: for every concept that is not a finding, its association with the label is compared between
      the two splits. Concepts that the model confuses with a finding are confused in both splits. The splits are
      permuted.

    Differences: each concept is compared between one value of the metadata and all others; p values are adjusted for
    the false discovery rate.

    Differences are in standard deviations of the concept's normal scores. A patient counts once in each group.
    """
    whole = sheet.with_metadata()
    scores = normal_scores(whole.values)
    shortcuts = _Shortcuts(whole, scores, splits, permutations, np.random.default_rng(seed))
    lines = shortcuts.lines()
    patients = whole.table["patient"].to_numpy(dtype=str)
    columns = np.arange(len(sheet.names))
    for group, values in group_columns(whole.table).items():
        if group == "split":
            continue
        known = values != ""
        for level, words in _levels(values):
            results = differences(scores[np.ix_(known, columns)], (values == level)[known], patients[known])
            lines += whole.lines(DIFFERENCE, columns, f"{group}: {words}", "all", results)
    return _table(lines, family_wise(np.array(shortcuts.statistics), shortcuts.largest))


class _Shortcuts:
    """The comparisons of possible shortcuts, with the statistic of each line and the largest statistic in each
    permutation."""

    def __init__(
        self, whole: Sheet, scores: np.ndarray, splits: Sequence[str], permutations: int, random: np.random.Generator
    ) -> None:
        self.whole, self.scores, self.random = whole, scores, random
        split = whole.table["split"].to_numpy(dtype=str)
        # A patient in two splits counts as two patients.
        of_split = np.char.add(np.char.add(whole.table["patient"].to_numpy(dtype=str), "\n"), split)
        names, first, self.patient = np.unique(of_split, return_index=True, return_inverse=True)
        self.patients = len(names)
        self.splits = shuffled(split[first], random, permutations)
        self.parts = [part for part in splits if (split == part).any()]
        self.statistics: list[float] = []
        self.largest = np.zeros(permutations)

    def lines(self) -> list[Line]:
        kinds = np.array(self.whole.kinds)
        technique = np.flatnonzero(np.isin(kinds, ["technique", "metadata"]))
        not_findings = np.flatnonzero(kinds != "finding")
        lines = self._of_splits()
        for label, present in label_columns(self.whole.table).items():
            lines += self._of_label(label, present, technique)
            if len(self.parts) == 2:
                lines += self._of_label_by_split(label, present, not_findings)
        return lines

    def _of_splits(self) -> list[Line]:
        values = group_columns(self.whole.table).get("split", np.array([]))
        columns = np.arange(len(self.whole.names))
        means = self._means(np.ones(len(self.patient), bool), columns)
        usual = np.unique(values[values != ""])
        lines: list[Line] = []
        for level, words in _levels(values):
            others = usual[usual != level]

            def differ(splits: np.ndarray, level: str = level, others: np.ndarray = others) -> Standardised:
                return Standardised.between(
                    Moments.of(splits == level, means), Moments.of(np.isin(splits, others), means)
                )

            lines += self._tested(columns, f"split: {words}", "all", self.splits, differ)
        return lines

    def _of_label(self, label: str, present: np.ndarray, columns: np.ndarray) -> list[Line]:
        sides = [self._means(present == value, columns) for value in (1, 0)]
        values = np.concatenate([side[~np.isnan(side).all(axis=1)] for side in sides])
        has_label = np.arange(len(values)) < int((~np.isnan(sides[0]).all(axis=1)).sum())
        return self._tested(
            columns, label, "all", shuffled(has_label, self.random, len(self.largest)),
            lambda member: Standardised.between(Moments.of(member, values), Moments.of(~member, values)),
        )  # fmt: skip

    def _of_label_by_split(self, label: str, present: np.ndarray, columns: np.ndarray) -> list[Line]:
        sides = [self._means(present == value, columns) for value in (1, 0)]

        def differ(splits: np.ndarray) -> Standardised:
            one, other = (
                Standardised.between(*(Moments.of(splits == part, side) for side in sides)) for part in self.parts
            )
            return one.less(other)

        return self._tested(columns, label, f"{self.parts[0]} more than {self.parts[1]}", self.splits, differ)

    def _tested(
        self, columns: np.ndarray, group: str, where: str, assignments: np.ndarray, differ: Callable[[np.ndarray], Standardised]
    ) -> list[Line]:  # fmt: skip
        results, statistics, largest = compare(assignments, differ)
        self.statistics += [statistic for statistic, result in zip(statistics, results, strict=True) if result]
        self.largest = np.maximum(self.largest, largest)
        return self.whole.lines(SHORTCUT, columns, group, where, results)

    def _means(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Means (patients, columns) over each patient's volumes among ``rows``; NaN for a patient without any."""
        return group_means(self.scores[np.ix_(rows, columns)], self.patient[rows], self.patients)


def _levels(values: np.ndarray) -> list[tuple[str, str]]:
    """Each value to compare, with a description of the comparison. With two values, one comparison is enough."""
    levels = np.unique(values[values != ""])
    if len(levels) == 2:
        return [(str(levels[0]), f"{levels[0]} against {levels[1]}")]
    return [(str(level), f"{level} against others") for level in levels]


def _table(lines: list[Line], family_wise_p: np.ndarray) -> pd.DataFrame:
    """The lines as a table. ``family_wise_p``: p values of the shortcuts, which are the first lines."""
    rows = [
        (*words, d.value, d.lower, d.upper, d.p, np.nan, 0, f"{d.patients[0]} and {d.patients[1]}")
        for *words, d in lines
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    others = table["family"] == DIFFERENCE
    table.loc[~others, "adjusted_p"] = family_wise_p
    table.loc[others, "adjusted_p"] = false_discovery(table.loc[others, "p"].to_numpy())
    table["significant"] = (table["adjusted_p"] < SIGNIFICANT).astype(int)
    order = np.lexsort((-table["difference"].abs(), table["p"], others))
    return table.iloc[order].reset_index(drop=True)
