"""Coverage of the intervals of calibrated probabilities, by simulation: ``python -m tests.benchmarks.calibration_coverage``.

Margins are normal in each class, so the log odds are a linear function of the margin, and the probability is known.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import logit
from scipy.stats import norm

from ctclip.evaluation.calibration import FEWEST, fit_line
from ctclip.evaluation.calibration_interval import line_covariance, probability_limits
from ctclip.evaluation.intervals import patients_by_class
from tests.benchmarks.common import machine, table
from tests.unit.evaluation.test_calibration_interval import SHARES, drawn

# Patients, prevalence, distance of the classes in standard deviations, largest number of volumes of a patient, their
# correlation.
SETTINGS = [
    (60, 0.1, 1.5, 1, 0.0), (60, 0.5, 2.0, 1, 0.0), (200, 0.03, 1.5, 1, 0.0), (200, 0.05, 2.0, 3, 0.8), (220, 0.2, 0.5, 3, 0.8),
    (220, 0.2, 1.5, 3, 0.8), (220, 0.2, 3.0, 3, 0.9), (400, 0.1, 3.0, 1, 0.0), (800, 0.2, 2.0, 3, 0.8),
]  # fmt: skip


def coverage(setting: tuple[int, float, float, int, float], repetitions: int) -> tuple[np.ndarray, np.ndarray]:
    """(SHARES,): the share of intervals that contain each true probability, and their mean width."""
    random = np.random.default_rng(0)
    _, prevalence, distance, _, _ = setting
    at = (logit(SHARES) - logit(prevalence)) / distance
    held, widths = [], []
    while len(held) < repetitions:
        margin, truth, patients = drawn(random, *setting)
        slope, intercept = fit_line(margin, truth, intercept=True)
        # As in `ctclip calibrate`: such a label is not calibrated.
        if min(patients_by_class(truth, patients)) < FEWEST or slope <= 0:
            continue
        lower, upper = probability_limits(
            at, slope, intercept, line_covariance(margin, truth, patients, slope, intercept)
        ).T
        held.append((lower <= SHARES) & (upper >= SHARES))
        widths.append(upper - lower)
    return np.mean(held, axis=0), np.mean(widths, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=500)
    repetitions = parser.parse_args().repetitions
    rows = []
    for setting in SETTINGS:
        patients, prevalence, distance, most, alike = setting
        held, widths = coverage(setting, repetitions)
        area = norm.cdf(distance / np.sqrt(2))
        rows.append([f"{patients} of 1 to {most}" if most > 1 else f"{patients} of 1", f"{alike:g}", f"{prevalence * patients:.0f}", f"{area:.2f}",
                     f"{held.mean():.3f}", *(f"{share:.2f} ({width:.2f})" for share, width in zip(held, widths, strict=True))])  # fmt: skip
    heads = ["patients, volumes", "correlation", "positive patients", "AUROC", "covered", *(f"at {share:g} (width)" for share in SHARES)]  # fmt: skip
    print(f"{machine()}\n")
    print(table(f"Share covered of 95 %, {repetitions} repetitions", heads, rows))


if __name__ == "__main__":
    main()
