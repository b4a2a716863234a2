"""Coverage of confidence intervals and false positive rate of paired tests, by simulation:
``python -m tests.benchmarks.coverage``.

Patients have 1 to 4 volumes whose scores correlate at 0.9; 150 patients without the finding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy.integrate import quad
from scipy.special import expit, logit
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from ctclip.evaluation.intervals import auroc_interval, auroc_variance, percentile_interval, placements
from ctclip.evaluation.metrics import average_precision, bootstrap_weights, weighted_ranking
from ctclip.evaluation.paired import exchange_shares
from tests.benchmarks.common import machine, table

AREAS, POSITIVES, NEGATIVES, CORRELATION = (0.76, 0.9, 0.96, 0.98), (5, 10, 20, 60), 150, 0.9
Limits = tuple[float, float]


def patients_of(random: np.random.Generator, count: int) -> np.ndarray:
    """The patient of each volume: 1 to 4 volumes each."""
    return np.repeat(np.arange(count), random.integers(1, 5, count))


def clustered(random: np.random.Generator, patient: np.ndarray) -> np.ndarray:
    """Standard normal scores that correlate within a patient."""
    own, scan = random.normal(size=patient.max() + 1)[patient], random.normal(size=len(patient))
    return np.sqrt(CORRELATION) * own + np.sqrt(1 - CORRELATION) * scan


def scored(
    random: np.random.Generator, noise: np.ndarray, labels: np.ndarray, patient: np.ndarray, area: float, shape: str
) -> np.ndarray:
    """Scores with a given AUROC: two normal distributions; positives with twice the deviation; or part of the positive
    patients at chance."""
    if shape == "wide":
        return np.where(labels == 1, 2 * noise + norm.ppf(area) * np.sqrt(5), noise)
    if shape == "mixed":
        far = random.random(patient.max() + 1)[patient] >= 2 * (1 - area)
        return noise + 8.0 * (far & (labels == 1))
    return noise + np.sqrt(2) * norm.ppf(area) * labels


def obuchowski_logit(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> Limits:
    area = float(placements(labels, scores)[labels == 1].mean())
    if area in (0, 1):
        return float("nan"), float("nan")
    half = 1.96 * np.sqrt(auroc_variance(labels, scores, patients)) / (area * (1 - area))
    return float(expit(logit(area) - half)), float(expit(logit(area) + half))


def bca(value: float, resampled: np.ndarray, without_one: np.ndarray) -> Limits:
    """Bias-corrected and accelerated limits (Efron 1987); without_one: the statistic without each patient."""
    resampled = resampled[np.isfinite(resampled)]
    below = (np.mean(resampled < value) + np.mean(resampled <= value)) / 2
    deviation = without_one.mean() - without_one
    if below in (0, 1) or not deviation.any():
        return float("nan"), float("nan")
    bias, z = norm.ppf(below), norm.ppf([0.025, 0.975])
    acceleration = np.sum(deviation**3) / 6 / np.sum(deviation**2) ** 1.5
    levels = norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
    lower, upper = np.quantile(resampled, levels)
    return float(lower), float(upper)


def logit_of_patients(value: float, positives: int) -> Limits:
    """Logit interval of an average precision with a binomial variance (Boyd et al. 2013) of the positive patients."""
    if not 0 < value < 1:
        return float("nan"), float("nan")
    half = student.ppf(0.975, positives - 1) / np.sqrt(positives * value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def true_average_precision(area: float, positives: int) -> float:
    """For two normal distributions, with the share of positives as drawn."""
    share, shift = positives / (positives + NEGATIVES), np.sqrt(2) * norm.ppf(area)

    def precision(sensitivity: float) -> float:
        false_rate = norm.sf(norm.isf(sensitivity) + shift)
        return float(share * sensitivity / (share * sensitivity + (1 - share) * false_rate))

    return float(quad(precision, 1e-12, 1, limit=200)[0])


def coverage(
    area: float, positives: int, repetitions: int, resamples: int, shape: str
) -> dict[str, tuple[float, float]]:
    """Coverage and mean width of the intervals of each method."""
    random = np.random.default_rng([int(1000 * area), positives])
    precision_area = true_average_precision(area, positives) if shape == "normal" else float("nan")
    intervals: dict[str, list[Limits]] = {}
    for repetition in range(repetitions):
        patient = patients_of(random, positives + NEGATIVES)
        labels = (patient < positives).astype(float)
        scores = scored(random, clustered(random, patient), labels, patient, area, shape)
        ours = auroc_interval(labels, scores, patient)
        of_variances = {
            "Obuchowski, logit": obuchowski_logit(labels, scores, patient),
            "ours": (ours.lower, ours.upper),
        }
        if shape != "normal" or not resamples:
            for name, limits in of_variances.items():
                intervals.setdefault(name, []).append(limits)
            continue
        drawn = weighted_ranking(labels, scores, bootstrap_weights(patient, resamples, repetition))
        one_less = weighted_ranking(labels, scores, 1.0 - (patient == np.arange(patient.max() + 1)[:, None]))
        percentile = percentile_interval(ours.value, drawn["auroc"])
        precision = average_precision(labels, scores)
        precision_percentile = percentile_interval(precision, drawn["average_precision"])
        for name, limits in {
            "percentile": (percentile.lower, percentile.upper),
            "BCa": bca(ours.value, drawn["auroc"], one_less["auroc"]),
            **of_variances,
            "AP percentile": (precision_percentile.lower, precision_percentile.upper),
            "AP logit": logit_of_patients(precision, positives),
        }.items():  # fmt: skip
            intervals.setdefault(name, []).append(limits)
    result = {}
    for name, pairs in intervals.items():
        limits, truth = np.array(pairs), precision_area if name.startswith("AP") else area
        held = (limits[:, 0] <= truth) & (truth <= limits[:, 1])
        result[name] = (float(held.mean()), float(np.nanmean(limits[:, 1] - limits[:, 0])))
    return result


def false_alarms(
    area: float,
    positives: int,
    labels_count: int,
    repetitions: int,
    resamples: int,
    bootstraps: int,
    shape: str = "normal",
) -> Limits:
    """Share of p at or below 0.05 for two equally good models, by the bootstrap (in the first ``bootstraps``
    repetitions, because it is slow) and by the exchange of ranks; of the mean over labels. The models' scores share
    half of their noise; the first model's are two normal distributions, the second's of ``shape``."""
    random = np.random.default_rng([int(1000 * area), positives, labels_count])
    bootstrap, exchange = [], []
    for repetition in range(repetitions):
        count = positives + NEGATIVES
        patient = patients_of(random, count)
        shares, spread = np.zeros(count), np.zeros(resamples)
        for _ in range(labels_count):
            labels = (random.permutation(count)[patient] < positives).astype(float)
            common = clustered(random, patient)
            noise = [np.sqrt(0.5) * (common + clustered(random, patient)) for _ in range(2)]
            shapes = ("normal", shape)
            first, second = (scored(random, one, labels, patient, area, kind) for one, kind in zip(noise, shapes, strict=True))  # fmt: skip
            shares += exchange_shares(labels, first, second, patient, count) / labels_count
            if repetition < bootstraps:
                weights = bootstrap_weights(patient, resamples, repetition)
                areas = [weighted_ranking(labels, side, weights)["auroc"] for side in (first, second)]
                spread = spread + (areas[0] - areas[1]) / labels_count
        if repetition < bootstraps:
            drawn = spread[np.isfinite(spread)]
            bootstrap.append(2 * (min(np.sum(drawn <= 0), np.sum(drawn >= 0)) + 1) / (len(drawn) + 1) <= 0.05)
        exchanged = np.abs((random.integers(0, 2, (resamples, count)) * 2 - 1) @ shares)
        exchange.append((1 + np.sum(exchanged >= abs(shares.sum()) - 1e-12)) / (resamples + 1) <= 0.05)
    return float(np.mean(bootstrap)) if bootstraps else float("nan"), float(np.mean(exchange))


def coverage_table(title: str, shape: str, repetitions: int, resamples: int, positives: tuple[int, ...]) -> str:
    rows = []
    for area in AREAS:
        for count in positives:
            result = coverage(area, count, repetitions, resamples, shape)
            names = list(result)
            rows.append([f"{area}", str(count), *(f"{result[name][0]:.3f} ({result[name][1]:.3f})" for name in names)])
    return table(title, ["AUROC", "positive patients", *names], rows)


def alarm_table(repetitions: int, resamples: int, bootstraps: int, shape: str = "normal") -> str:
    rows, shares = [], []
    for labels_count, count in ((1, 10), (1, 20), (1, 60), *([(8, 20)] if shape == "normal" else [])):
        for area in AREAS:
            bootstrap, exchange = false_alarms(area, count, labels_count, repetitions, resamples, bootstraps, shape)
            shares.append(exchange)
            rows.append([str(labels_count), str(area), str(count), *([f"{bootstrap:.3f}"] if bootstraps else []),
                         f"{exchange:.3f}", binomial(exchange, repetitions)])  # fmt: skip
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    mean = float(np.mean(shares))
    rows.append(["all", "", "", *([""] if bootstraps else []), f"{mean:.3f}", binomial(mean, repetitions * len(shares))])  # fmt: skip
    second = "" if shape == "normal" else f", second model {shape}"
    heads = ["labels", "AUROC", "positive patients", *(["bootstrap"] if bootstraps else []), "exchange of ranks", "95 % interval"]  # fmt: skip
    return table(f"False alarms of paired tests at 5 %{second}, {repetitions} repetitions a row", heads, rows)


def binomial(share: float, repetitions: int) -> str:
    """The exact interval (Clopper & Pearson 1934) of a share of independent repetitions."""
    limits = binomtest(round(share * repetitions), repetitions).proportion_ci()
    return f"{limits.low:.3f} to {limits.high:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=400, help="0: only the methods that need none, in a minute")
    parser.add_argument("--bootstraps", type=int, default=100, help="repetitions of a paired bootstrap; 0: none")
    parser.add_argument("--only", choices=["normal", "shapes", "alarms", "alarm shapes"], default=None)
    chosen = parser.parse_args()
    print(f"{machine()}\n")
    size = (chosen.repetitions, chosen.resamples)
    parts: dict[str, list[Callable[[], str]]] = {
        "normal": [lambda: coverage_table(f"Two normals: share covered of 95 % (mean width), {size[0]} repetitions", "normal", *size, POSITIVES)],
        "shapes": [
            lambda: coverage_table("Positives twice as wide as negatives", "wide", *size, (10, 60)),
            lambda: coverage_table("A share of the positive patients at chance", "mixed", *size, (10, 60)),
        ],
        "alarms": [lambda: alarm_table(*size, chosen.bootstraps)],
        "alarm shapes": [lambda: alarm_table(*size, 0, "wide"), lambda: alarm_table(*size, 0, "mixed")],
    }  # fmt: skip
    for name, tables in parts.items():
        if chosen.only in (None, name):
            for simulate in tables:
                print(simulate(), flush=True)


if __name__ == "__main__":
    main()
