"""Predictions, labels and a protocol to one dictionary of metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.controls import shuffled_aurocs
from ctclip.evaluation.protocol import Protocol, align


def evaluate(
    predictions: pd.DataFrame,
    labels: pd.DataFrame,
    protocol: Protocol,
    *,
    calibration: Calibration | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC and the rest, per label and mean, with bootstrap intervals by patient; and the shuffled control.

    predictions as ``tables.read_predictions`` gives them, labels as ``tables.read_labels``. Undefined values are
    None; means are over the labels that are defined.
    """
    rows, truth, scores = align(predictions, labels, protocol)
    patients = rows["patient"].to_numpy(dtype=str)
    resamples = resamples or protocol.bootstrap
    thresholds, said = _thresholds(truth, scores, protocol, calibration)
    drawn = metrics.bootstrap_metrics(truth, scores, patients, thresholds, resamples=resamples, seed=seed)
    per_label: dict[str, Any] = {}
    points: dict[str, list[float]] = {}
    for index, name in enumerate(protocol.labels):
        known = ~np.isnan(truth[:, index])
        label, score = truth[known, index], scores[known, index]
        found = metrics.every(label, score, float(thresholds[index]))
        for metric, value in found.items():
            points.setdefault(metric, []).append(value)
        limits = metrics.interval(found["auroc"], drawn["auroc"][:, index])
        per_label[name] = {
            "value": found.pop("auroc"), "lower": limits.lower, "upper": limits.upper,
            "positives": int(label.sum()), "n": int(known.sum()), "threshold": float(thresholds[index]), **found,
            "intervals": {metric: _limits(value, drawn[metric][:, index], metric) for metric, value in found.items()},
        }  # fmt: skip
    mean = metrics.mean_defined(points["auroc"])
    shuffled = shuffled_aurocs(truth, scores, patients, seed=seed)
    result = {
        "protocol": protocol.model_dump(mode="json"),
        "volumes": len(rows),
        "whole_set": protocol.size is None or len(rows) == protocol.size,
        "patients": len(np.unique(patients)),
        "zero_shot": {
            "mean_auroc": mean,
            "mean_auroc_interval": _limits(mean, _means(drawn["auroc"])),
            "labels_defined": int(np.isfinite(points["auroc"]).sum()),
            "labels_undefined": [n for n, v in zip(protocol.labels, points["auroc"], strict=True) if not np.isfinite(v)],
            "means": {
                metric: {
                    "value": metrics.mean_defined(points[metric]),
                    "interval": _limits(metrics.mean_defined(points[metric]), _means(drawn[metric]), metric),
                    "labels": int(np.isfinite(points[metric]).sum()),
                }
                for metric in metrics.METRICS[1:]
            },
            "pooled_calibration_error": _pooled_calibration_error(truth, scores),
            "f1": metrics.f1_averages(truth, scores >= thresholds),
            "thresholds": said,
            "auroc": per_label,
        },
        "controls": {
            "shuffled_mean_auroc": float(shuffled.mean()),
            "shuffled_mean_auroc_range": [float(shuffled.min()), float(shuffled.max())],
        },
        "bootstrap": {"resamples": resamples, "unit": "patient", "level": 0.95, "seed": seed},
    }  # fmt: skip
    return plain(result)


def _pooled_calibration_error(truth: np.ndarray, scores: np.ndarray) -> float:
    """Of all labels together: bins of thousands of calls, where a label of few volumes has bins of a handful."""
    known = ~np.isnan(truth)
    return metrics.calibration_error(truth[known], scores[known]) if known.any() else float("nan")


def _thresholds(
    truth: np.ndarray, scores: np.ndarray, protocol: Protocol, calibration: Calibration | None
) -> tuple[np.ndarray, str]:
    """(labels,) and where they come from."""
    if protocol.thresholds == "published":
        known = ~np.isnan(truth)
        picked = [metrics.published_threshold(truth[k, i], scores[k, i]) for i, k in enumerate(known.T)]
        return np.array(picked), "picked on these very volumes, as published: F1, accuracy and the like are optimistic"
    if calibration is None:
        return np.full(truth.shape[1], 0.5), "0.5 for every label: no calibration split was given"
    lines = [calibration.lines.get(name) for name in protocol.labels]
    without = [name for name, line in zip(protocol.labels, lines, strict=True) if line is None]
    said = f"from the calibration split ({calibration.fitted_on}); none was picked on these volumes"
    if without:
        said += f"; 0.5 for {', '.join(without)}, of which that split has too few"
    return np.array([0.5 if line is None else line.threshold for line in lines]), said


def _limits(value: float, drawn: np.ndarray, metric: str = "") -> list[float]:
    limits = metrics.interval(value, drawn)
    if metric == "calibration_error" and np.isfinite(drawn).any():
        # A sum of distances: resampling adds noise to each and so raises it. That bias, the mean of the resamples above
        # the value (Efron and Tibshirani 1993, section 10.2), is taken off the limits.
        bias = float(np.nanmean(drawn)) - value
        return [max(0.0, limits.lower - bias), max(0.0, limits.upper - bias)]
    return [limits.lower, limits.upper]


def _means(drawn: np.ndarray) -> np.ndarray:
    """(resamples,) mean over the labels that are defined in each."""
    return np.array([metrics.mean_defined(row) for row in drawn])


def plain(value: Any) -> Any:
    """For JSON: NaN becomes None, numpy scalars become Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
