"""Differences between two groups of patients, for one assignment to groups and for many permuted ones.

The largest statistic of all comparisons in each permutation tells how large one must be to be more than chance anywhere
(Westfall & Young 1993, "Resampling-based multiple testing", single-step max-T): the family-wise error rate is kept, whatever
the distributions of the values and however the comparisons depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ctclip.audit.associations import FEWEST_PATIENTS, LEVEL, Difference

# 999 would show no p value below 0.001; more take longer and call hardly more.
PERMUTATIONS = 999
# Permutations at a time, which bounds memory: 16 MB of weights for 10,000 patients.
TOGETHER = 200


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of squares of known values: (assignments, columns) each."""

    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, members: np.ndarray, values: np.ndarray) -> Moments:
        """members (assignments, n) of 0 and 1; values (n, columns), NaN where unknown."""
        zeroed = np.nan_to_num(values)
        together = members.astype(float) @ np.concatenate([~np.isnan(values), zeroed, zeroed**2], axis=1)
        return cls(*np.split(together, 3, axis=1))


@dataclass(frozen=True)
class Standardised:
    """Differences of means in pooled standard deviations with their standard error and degrees of freedom, (assignments,
    columns) each; NaN where a side has fewer than ``FEWEST_PATIENTS``, or nothing varies. counts: the numbers of both sides."""

    value: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    counts: tuple[np.ndarray, np.ndarray]

    @classmethod
    def between(cls, one: Moments, other: Moments) -> Standardised:
        """Student's t test with pooled variance, which is right where the groups do not differ."""
        with np.errstate(divide="ignore", invalid="ignore"):
            within = sum(side.squares - side.total**2 / side.count for side in (one, other))
            freedom = one.count + other.count - 2
            pooled = np.sqrt(within / freedom)
            enough = (np.minimum(one.count, other.count) >= FEWEST_PATIENTS) & (pooled > 1e-6)
            value = (one.total / one.count - other.total / other.count) / pooled
            error = np.sqrt(1 / one.count + 1 / other.count)
        value, error, freedom = (np.where(enough, values, np.nan) for values in (value, error, freedom))
        return cls(value, error, freedom, (one.count, other.count))

    def less(self, other: Standardised) -> Standardised:
        """How much larger these differences are than ``other``, of other patients (Welch 1947)."""
        squares = [side.error**2 for side in (self, other)]
        error = np.sqrt(squares[0] + squares[1])
        freedom = error**4 / (squares[0] ** 2 / self.freedom + squares[1] ** 2 / other.freedom)
        counts = (self.counts[0] + self.counts[1], other.counts[0] + other.counts[1])
        return Standardised(self.value - other.value, error, freedom, counts)

    def normal(self) -> np.ndarray:
        """|t| as the quantile of a normal distribution (Wallace 1959), so that small groups do not stand out; 0 where NaN."""
        squared = (self.value / self.error) ** 2
        scores = (
            (8 * self.freedom + 1) / (8 * self.freedom + 3) * np.sqrt(self.freedom * np.log1p(squared / self.freedom))
        )
        return np.nan_to_num(scores)

    def differences(self, row: int = 0) -> list[Difference | None]:
        """One assignment's comparisons, with intervals and uncorrected p values."""
        from scipy.stats import t as student

        value, error, freedom = self.value[row], self.error[row], self.freedom[row]
        p = np.maximum(2 * student.sf(np.abs(value) / error, freedom), 1e-300)
        half = student.ppf((1 + LEVEL) / 2, freedom) * error
        numbers = [side[row] for side in self.counts]
        return [
            Difference(float(value[n]), float(value[n] - half[n]), float(value[n] + half[n]), float(p[n]),
                       (int(numbers[0][n]), int(numbers[1][n]))) if np.isfinite(value[n]) else None
            for n in range(len(value))
        ]  # fmt: skip


def family_wise(observed: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """(n,) p values of the statistics (n,) from the largest statistic in each permutation, one added to both (Phipson & Smyth
    2010)."""
    ordered = np.sort(largest)
    larger = len(ordered) - np.searchsorted(ordered, observed - 1e-9, "left")
    return np.asarray((larger + 1) / (len(ordered) + 1))


def compare(
    assignments: np.ndarray, differ: Callable[[np.ndarray], Standardised]
) -> tuple[list[Difference | None], np.ndarray, np.ndarray]:
    """The comparisons of the first of the ``assignments`` (1 + permutations, n), their statistics (columns,), and the largest
    statistic in each permutation. ``differ``: the differences of some assignments."""
    first = differ(assignments[:1])
    parts = [differ(assignments[start : start + TOGETHER]).normal() for start in range(1, len(assignments), TOGETHER)]
    return first.differences(), first.normal()[0], np.concatenate(parts).max(axis=1, initial=0)


def shuffled(member: np.ndarray, random: np.random.Generator, permutations: int = PERMUTATIONS) -> np.ndarray:
    """(1 + permutations, n): the assignment (n,), as it is and permuted."""
    return np.concatenate([member[None], random.permuted(np.tile(member, (permutations, 1)), axis=1)])
