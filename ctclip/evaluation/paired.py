"""Whether one set of predictions is better than another on the same volumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ctclip.errors import EvaluationError
from ctclip.evaluation import metrics
from ctclip.evaluation.protocol import Protocol, align


def paired_test(
    first: pd.DataFrame,
    second: pd.DataFrame,
    labels: pd.DataFrame,
    protocol: Protocol,
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC of ``first`` minus that of ``second``, label by label and mean, in the same resamples of patients.

    p: twice the smaller share of resamples on either side of zero (with one added to both, Davison & Hinkley 1997,
    eq. 4.11), so never 0. Both tables must score the same volumes.
    """
    missing = set(first["volume"]) ^ set(second["volume"])
    if missing:
        raise EvaluationError(
            f"the two prediction files score different volumes ({len(missing)} are in one only, such as "
            f"{sorted(missing)[0]!r}): predict the same ones with both models"
        )
    rows, truth, ours = align(first, labels, protocol)
    aligned = second.set_index("volume").loc[rows["volume"]].reset_index()
    theirs = aligned[list(protocol.labels)].to_numpy(dtype=float)
    patients = rows["patient"].to_numpy(dtype=str)
    resamples = resamples or protocol.bootstrap
    drawn = [
        metrics.bootstrap_auroc(truth, scores, patients, resamples=resamples, seed=seed) for scores in (ours, theirs)
    ]
    result: dict[str, Any] = {}
    points = []
    for index, name in enumerate(protocol.labels):
        known = ~np.isnan(truth[:, index])
        values = [metrics.auroc(truth[known, index], scores[known, index]) for scores in (ours, theirs)]
        points.append(values)
        result[name] = _compared(values, drawn[0][:, index] - drawn[1][:, index])
    means = [metrics.mean_defined([pair[side] for pair in points]) for side in (0, 1)]
    with np.errstate(all="ignore"):
        spread = np.array([metrics.mean_defined(row) for row in drawn[0] - drawn[1]])
    return {"mean": _compared(means, spread), "labels": result, "resamples": resamples, "unit": "patient"}


def _compared(pair: list[float], differences: np.ndarray) -> dict[str, float]:
    first, second = pair
    limits = metrics.interval(first - second, differences)
    defined = differences[np.isfinite(differences)]
    below, above = int((defined <= 0).sum()), int((defined >= 0).sum())
    return {
        "first": first, "second": second, "difference": first - second, "lower": limits.lower, "upper": limits.upper,
        "p": min(1.0, 2 * (min(below, above) + 1) / (len(defined) + 1)) if len(defined) else float("nan"),
    }  # fmt: skip
