"""Intervals of the AUROC: DeLong's variance, a brute-force bootstrap, a bivariate normal, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ctclip.evaluation.intervals import (
    auroc_interval,
    auroc_variance,
    enough_patients,
    patients_by_class,
    percentile_interval,
    placements,
    two_normals_variance,
)


def draw(seed: int, positive: int, negative: int, *, shift: float = 1.0, most: int = 4) -> tuple[np.ndarray, ...]:
    """Labels, scores and patients: 1 to ``most`` volumes per patient, whose scores correlate at 0.9."""
    random = np.random.default_rng(seed)
    patient = np.repeat(np.arange(positive + negative), random.integers(1, most + 1, positive + negative))
    labels = (patient < positive).astype(float)
    own, scan = random.normal(size=positive + negative), random.normal(size=len(patient))
    return labels, shift * labels + np.sqrt(0.9) * own[patient] + np.sqrt(0.1) * scan, patient


def delong_variance(labels: np.ndarray, scores: np.ndarray) -> float:
    """DeLong et al. (1988), as published: covariances of the structural components of all pairs."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)
    return float(np.var(wins.mean(axis=1), ddof=1) / len(positive) + np.var(wins.mean(axis=0), ddof=1) / len(negative))


@pytest.mark.parametrize("decimals", [1, 9])
def test_one_volume_a_patient_is_delongs_variance(decimals: int) -> None:
    for seed in range(5):
        labels, scores, patients = draw(seed, 12, 30, most=1)
        scores = scores.round(decimals)
        assert auroc_variance(labels, scores, patients) == pytest.approx(delong_variance(labels, scores), rel=1e-12)


def test_the_variance_is_that_of_a_bootstrap_of_patients_drawn_one_by_one() -> None:
    """Patients with several volumes, some of whom have both positives and negatives."""
    labels, scores, patients = draw(0, 150, 250)
    random = np.random.default_rng(1)
    labels = np.where(random.random(len(labels)) < 0.2, 1 - labels, labels)
    volumes_of = [np.flatnonzero(patients == patient) for patient in range(400)]
    values = []
    for _ in range(1200):
        chosen = np.concatenate([volumes_of[patient] for patient in random.integers(0, 400, 400)])
        positive = labels[chosen] == 1
        count = positive.sum()
        surplus = stats.rankdata(scores[chosen])[positive].sum() - count * (count + 1) / 2
        values.append(surplus / count / (len(chosen) - count))
    assert np.sqrt(auroc_variance(labels, scores, patients)) == pytest.approx(np.std(values), rel=0.06)
    assert np.sqrt(delong_variance(labels, scores)) < 0.85 * np.std(values)


def test_the_variance_is_obuchowskis_by_hand() -> None:
    """Three patients, of whom one has both classes; the formula of 1997 written out with sums over patients."""
    labels, patients = np.array([1.0, 0, 1, 0, 0, 1]), np.array(["a", "a", "b", "c", "c", "b"])
    scores = np.array([0.6, 0.5, 0.3, 0.2, 0.4, 0.9])
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    wins = (scores[positive][:, None] > scores[negative]).astype(float)
    area = wins.mean()
    sums = {p: [0.0, 0.0] for p in "abc"}
    for row, index in enumerate(positive):
        sums[patients[index]][0] += wins[row].mean() - area
    for column, index in enumerate(negative):
        sums[patients[index]][1] += wins[:, column].mean() - area
    x, y = np.array(list(sums.values())).T
    s10, s01 = 2 / (1 * 3) * np.sum(x**2), 2 / (1 * 3) * np.sum(y**2)
    s11 = 3 / 2 * np.sum(x * y)
    expected = s10 / 3 + s01 / 3 + 2 / 9 * s11
    assert auroc_variance(labels, scores, patients) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(auroc_variance(labels[:2], scores[:2], patients[:2]))


def test_placements_are_shares_of_pairs() -> None:
    labels, scores = np.array([1.0, 0, 1, 0, 0]), np.array([2.0, 2, 3, 1, 3])
    assert placements(labels, scores) == pytest.approx([0.5, 0.75, 2.5 / 3, 1, 0.25])


@pytest.mark.parametrize("area", [0.3, 0.5, 0.76, 0.96, 0.999])
def test_the_variance_of_two_normals_is_bambers_with_a_bivariate_normal(area: float) -> None:
    point = stats.norm.ppf(area)
    both = stats.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]]).cdf([point, point]) - area**2
    expected = (area * (1 - area) + (7 - 1) * both + (40 - 1) * both) / (7 * 40)
    assert two_normals_variance(area, 7, 40) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert two_normals_variance(1 - area, 7, 40) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_variance_of_two_normals_is_that_of_samples() -> None:
    random = np.random.default_rng(0)
    values = []
    for _ in range(3000):
        positive, negative = random.normal(1.5, 1, 8), random.normal(0, 1, 25)
        values.append(np.mean(positive[:, None] > negative))
    area = stats.norm.cdf(1.5 / np.sqrt(2))
    assert np.sqrt(two_normals_variance(area, 8, 25)) == pytest.approx(np.std(values), rel=0.05)


def test_the_limits_are_a_quantile_away_from_the_observed_area() -> None:
    labels, scores, patients = draw(3, 15, 40, shift=1.2)
    limits = auroc_interval(labels, scores, patients)
    assert limits.value == pytest.approx(np.mean(placements(labels, scores)[labels == 0]))
    scale = max(1, auroc_variance(labels, scores, patients) / two_normals_variance(limits.value, 15, 40))
    for limit in (limits.lower, limits.upper):
        distance = abs(limits.value - limit) / np.sqrt(scale * two_normals_variance(limit, 15, 40))
        assert distance == pytest.approx(stats.t.ppf(0.975, 14), rel=1e-6)
    assert limits.lower < limits.value < limits.upper
    assert limits.trusted
    wider = auroc_interval(labels, scores, patients, level=0.99)
    assert wider.lower < limits.lower < limits.upper < wider.upper
    # Fewer negatives than positives: the quantile is that of the negatives.
    few = auroc_interval(1 - labels, -scores, patients)
    assert (few.lower, few.upper) == pytest.approx((limits.lower, limits.upper))


def test_a_larger_variance_of_the_scores_widens_the_interval() -> None:
    """A fifth of the positives at chance: the sample's variance is above that of two normals."""
    random = np.random.default_rng(0)
    labels = (np.arange(140) < 40).astype(float)
    scores = random.normal(np.where(np.arange(140) < 32, 8, 0), 1)
    patients = np.arange(140)
    limits = auroc_interval(labels, scores, patients)
    scale = auroc_variance(labels, scores, patients) / two_normals_variance(limits.value, 40, 100)
    assert scale > 1.5
    distance = (limits.value - limits.lower) / np.sqrt(scale * two_normals_variance(limits.lower, 40, 100))
    assert distance == pytest.approx(stats.t.ppf(0.975, 39), rel=1e-6)


def test_areas_of_0_and_1_have_limits_on_one_side() -> None:
    labels, patients = (np.arange(40) < 12).astype(float), np.arange(40)
    perfect = auroc_interval(labels, labels + 0.0, patients)
    assert perfect.value == perfect.upper == 1
    distance = (1 - perfect.lower) / np.sqrt(two_normals_variance(perfect.lower, 12, 28))
    assert distance == pytest.approx(stats.t.ppf(0.975, 11), rel=1e-6)
    worst = auroc_interval(labels, -labels, patients)
    assert worst.value == worst.lower == 0
    assert worst.upper == pytest.approx(1 - perfect.lower)


def test_ten_patients_of_each_class_are_needed_to_be_trusted() -> None:
    for positive, negative, trusted in ((10, 10, True), (9, 50, False), (50, 9, False)):
        labels, scores, patients = draw(1, positive, negative)
        assert patients_by_class(labels, patients) == (positive, negative)
        assert enough_patients(labels, patients) is trusted
        assert auroc_interval(labels, scores, patients).trusted is trusted


def test_too_few_patients_have_no_interval() -> None:
    labels, scores = np.array([1.0, 1, 0, 0]), np.array([0.4, 0.9, 0.5, 0.1])
    for patients in (["a", "a", "b", "c"], ["a", "b", "c", "c"], ["a", "a", "a", "a"]):
        limits = auroc_interval(labels, scores, np.array(patients))
        assert limits.value == 0.75
        assert np.isnan([limits.lower, limits.upper]).all()
        assert not limits.trusted
    two = auroc_interval(labels, scores, np.array(["a", "b", "c", "d"]))
    assert 0 <= two.lower < 0.75 < two.upper <= 1
    for label in (0.0, 1.0):
        limits = auroc_interval(np.full(4, label), scores, np.array(["a", "b", "c", "d"]))
        assert np.isnan([limits.value, limits.lower, limits.upper]).all()
        assert not limits.trusted


@pytest.mark.parametrize("area", [0.76, 0.98])
def test_ten_positive_patients_are_covered(area: float) -> None:
    """The target is 0.93; ``python -m tests.benchmarks.coverage`` prints the whole table."""
    shift = np.sqrt(2) * stats.norm.ppf(area)
    covered = []
    for seed in range(300):
        limits = auroc_interval(*draw(seed, 10, 100, shift=shift))
        covered.append(limits.lower <= area <= limits.upper)
    assert np.mean(covered) >= 0.93


def test_percentiles_leave_out_what_is_undefined() -> None:
    values = np.append(np.arange(101.0), [np.nan, np.inf])
    limits = percentile_interval(50, values)
    assert (limits.value, limits.lower, limits.upper, limits.trusted) == pytest.approx((50, 2.5, 97.5, True))
    assert percentile_interval(50, values, level=0.9).lower == pytest.approx(5)
    assert percentile_interval(50, values, level=0.9).upper == pytest.approx(95)
    for value, drawn in ((np.nan, values), (0.5, np.array([np.nan])), (0.5, np.array([]))):
        limits = percentile_interval(value, drawn)
        assert np.isnan([limits.lower, limits.upper]).all()
        assert not limits.trusted
