"""Permutation tests of differences between two groups of patients.

The largest statistic of all comparisons in each permutation gives the null distribution (Westfall & Young 1993,
"Resampling-based multiple testing", single-step max-T). This controls the family-wise error rate for any distribution
of the values and any dependence between comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ctclip.audit.associations import FEWEST_PATIENTS, LEVEL, Difference

# The smallest p value of 999 permutations is 0.001; more permutations take longer and find hardly more.
PERMUTATIONS = 999
# Permutations computed at a time, to bound memory: 16 MB of weights for 10,000 patients.
TOGETHER = 200


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of squares of the known values, (assignments, columns) each."""

    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, members: np.ndarray, values: np.ndarray) -> Moments:
        """members (assignments, n) of 0 and 1; values (n, columns), NaN where unknown."""
        known = ~np.isnan(values)
        # Most columns are known in the same rows, which are counted once; rows without any are left out.
        _, first, of_column = np.unique(np.packbits(known, axis=0), axis=1, return_index=True, return_inverse=True)
        used = known.any(axis=1)
        zeroed = np.nan_to_num(values[used])
        columns = np.concatenate([known[np.ix_(used, first)], zeroed, zeroed**2], axis=1)
        together = members[:, used].astype(float) @ columns
        count, total, squares = np.split(together, [len(first), len(first) + values.shape[1]], axis=1)
        return cls(count[:, of_column.ravel()], total, squares)


@dataclass(frozen=True)
class Standardised:
    """Differences of means in pooled standard deviations, with standard errors and degrees of freedom, (assignments,
    columns) each; NaN if a group has fewer than ``FEWEST_PATIENTS`` patients or the column is constant. ``counts``: the
    size of each group."""

    value: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    counts: tuple[np.ndarray, np.ndarray]

    @classmethod
    def between(cls, one: Moments, other: Moments) -> Standardised:
        """Student's t test with pooled variance, which is valid under the null hypothesis of equal groups."""
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
        """These differences minus those of ``other``, which come from other patients (Welch 1947)."""
        squares = [side.error**2 for side in (self, other)]
        error = np.sqrt(squares[0] + squares[1])
        freedom = error**4 / (squares[0] ** 2 / self.freedom + squares[1] ** 2 / other.freedom)
        counts = (self.counts[0] + self.counts[1], other.counts[0] + other.counts[1])
        return Standardised(self.value - other.value, error, freedom, counts)

    def normal(self) -> np.ndarray:
        """|t| as the equivalent quantile of a normal distribution (Wallace 1959), so that small groups are not
        overrated; 0 where NaN."""
        squared = (self.value / self.error) ** 2
        scores = (
            (8 * self.freedom + 1) / (8 * self.freedom + 3) * np.sqrt(self.freedom * np.log1p(squared / self.freedom))
        )
        return np.nan_to_num(scores)

    def differences(self, row: int = 0) -> list[Difference | None]:
        """The comparisons of one assignment, with intervals and uncorrected p values."""
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
    """Family-wise p values (n,) of the statistics (n,), from the largest statistic in each permutation; one is added to
    numerator and denominator (Phipson & Smyth 2010)."""
    ordered = np.sort(largest)
    larger = len(ordered) - np.searchsorted(ordered, observed - 1e-9, "left")
    return np.asarray((larger + 1) / (len(ordered) + 1))


def compare(
    assignments: np.ndarray, differ: Callable[[np.ndarray], Standardised]
) -> tuple[list[Difference | None], np.ndarray, np.ndarray]:
    """The comparisons of the first row of ``assignments`` (1 + permutations, n), their statistics (columns,), and the
    largest statistic in each permutation. ``differ`` computes the differences for given assignments."""
    first = differ(assignments[:1])
    parts = [differ(assignments[start : start + TOGETHER]).normal() for start in range(1, len(assignments), TOGETHER)]
    return first.differences(), first.normal()[0], np.concatenate(parts).max(axis=1, initial=0)


def shuffled(member: np.ndarray, random: np.random.Generator, permutations: int = PERMUTATIONS) -> np.ndarray:
    """The assignment (n,) followed by its permutations: (1 + permutations, n)."""
    return np.concatenate([member[None], random.permuted(np.tile(member, (permutations, 1)), axis=1)])
