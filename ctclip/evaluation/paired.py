"""Test whether one set of predictions is better than another on the same volumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ctclip.errors import EvaluationError
from ctclip.evaluation import metrics
from ctclip.evaluation.intervals import enough_patients, percentile_interval
from ctclip.evaluation.protocol import Protocol, align
from ctclip.evaluation.ranking import ranking_scores

TEST = "exchange of the two models' ranks, patient by patient (Bandos et al. 2005)"


def paired_test(
    first: pd.DataFrame,
    second: pd.DataFrame,
    labels: pd.DataFrame,
    protocol: Protocol,
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC of ``first`` minus that of ``second``, for each label and on average, both ranked by uncalibrated scores.

    Intervals: percentiles of the difference in the same resamples of patients. p, two-sided: the fraction of exchanges
    with a difference at least as large (one is added to numerator and denominator, Davison & Hinkley 1997, eq. 4.11);
    in each exchange, a random half of the patients swap the two models' ranks. With few positives, its false positive
    rate is nominal, unlike the bootstrap's, if the scores of both models have similar distributions; otherwise a small
    p shows that the models differ, but not which has the higher AUROC (``python -m tests.benchmarks.coverage``;
    dividing by the standard deviation in each exchange does not change that). Both tables must score the same volumes.
    """
    unpaired = set(first["volume"]) ^ set(second["volume"])
    if unpaired:
        raise EvaluationError(
            f"the two prediction files score different volumes ({len(unpaired)} are in only one of them, such as "
            f"{sorted(unpaired)[0]!r}); run both models on the same volumes"
        )
    volumes, truth, _ = align(first, labels, protocol)
    beside = protocol.scored(second).set_index("volume").loc[volumes["volume"]].reset_index()
    scores = [ranking_scores(table, protocol) for table in (volumes, beside)]
    patients = volumes["patient"].to_numpy(dtype=str)
    names, member = np.unique(patients, return_inverse=True)
    resamples = resamples or protocol.bootstrap
    drawn = [metrics.bootstrap_auroc(truth, side, patients, resamples=resamples, seed=seed) for side in scores]
    spread = drawn[0] - drawn[1]
    signs = np.random.default_rng(seed).integers(0, 2, (resamples, len(names))) * 2 - 1
    shares = np.zeros((len(names), len(protocol.labels)))
    result: dict[str, Any] = {}
    defined = []
    for index, name in enumerate(protocol.labels):
        known = ~np.isnan(truth[:, index])
        label = truth[known, index]
        values = [metrics.auroc(label, side[known, index]) for side in scores]
        if np.isfinite(values).all():
            pair = [side[known, index] for side in scores]
            shares[:, index] = exchange_shares(label, pair[0], pair[1], member[known], len(names))
            defined.append(index)
        result[name] = _comparison(values, spread[:, index], shares[:, index], signs)
        result[name]["interval_trusted"] = enough_patients(label, patients[known])
    means = [metrics.mean_defined([result[name][side] for name in protocol.labels]) for side in ("first", "second")]
    mean_spread = np.array([metrics.mean_defined(values) for values in spread])
    mean_share = shares[:, defined].mean(axis=1) if defined else np.zeros(len(names))
    mean = _comparison(means, mean_spread, mean_share, signs)
    return {"mean": mean, "labels": result, "resamples": resamples, "unit": "patient", "test": TEST}


def exchange_shares(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, member: np.ndarray, patients: int
) -> np.ndarray:
    """The contribution (patients,) of each patient to the difference of two AUROCs. If a patient's scores are exchanged
    between the models, the contribution changes sign. The sum is the difference.

    ``labels`` (n,) 0/1; ``first`` and ``second`` scores (n,); ``member`` (n,): index of each volume's patient. Scores
    are compared by their ranks within each model. The difference after any exchange is a sum over patients, because the
    cross terms of two patients cancel (Bandos, Rockette & Gur 2005).
    """
    ranks = [rankdata(first), rankdata(second)]
    shares = np.zeros(patients)
    for kind, direction in ((labels == 1, 1.0), (labels == 0, -1.0)):
        others = np.sort(np.concatenate([rank[~kind] for rank in ranks]))
        for rank, side in zip(ranks, (1.0, -1.0), strict=True):
            # Fraction of the other class ranked below by each model; ties count half.
            below = np.searchsorted(others, rank[kind], "left") + np.searchsorted(others, rank[kind], "right")
            weights = direction * side * below / (2 * len(others)) / kind.sum()
            shares += np.bincount(member[kind], weights, patients)
    return shares


def _comparison(pair: list[float], spread: np.ndarray, shares: np.ndarray, signs: np.ndarray) -> dict[str, Any]:
    first, second = pair
    difference = first - second
    limits = percentile_interval(difference, spread)
    # A small tolerance, so that an exchange without effect counts as equally large despite rounding.
    larger = int((np.abs(signs @ shares) >= abs(difference) - 1e-12).sum())
    p = (larger + 1) / (len(signs) + 1) if np.isfinite(difference) else float("nan")
    return {
        "first": first, "second": second, "difference": difference, "lower": limits.lower, "upper": limits.upper, "p": p,
    }  # fmt: skip
