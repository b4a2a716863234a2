"""Predictions, labels and a protocol to one dictionary of metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics
from ctclip.evaluation.controls import shuffled_aurocs
from ctclip.evaluation.protocol import Protocol, align
from ctclip.evaluation.retrieval import precision_by_labels, retrieval


def evaluate(
    predictions: pd.DataFrame,
    labels: pd.DataFrame,
    protocol: Protocol,
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC and the rest, per label and mean, with bootstrap intervals by patient; and the shuffled control.

    predictions as ``tables.read_predictions`` gives them, labels as ``tables.read_labels``. Undefined values are
    None.
    """
    rows, truth, scores = align(predictions, labels, protocol)
    patients = rows["patient"].to_numpy(dtype=str)
    resamples = resamples or protocol.bootstrap
    resampled = metrics.bootstrap_auroc(truth, scores, patients, resamples=resamples, seed=seed)
    per_label: dict[str, Any] = {}
    points, thresholds = [], []
    for index, name in enumerate(protocol.labels):
        known = ~np.isnan(truth[:, index])
        label, score = truth[known, index], scores[known, index]
        point = metrics.auroc(label, score)
        points.append(point)
        threshold = metrics.best_threshold(label, score)
        thresholds.append(threshold)
        counts = metrics.confusion(label, score, threshold)
        limits = metrics.interval(point, resampled[:, index])
        per_label[name] = {
            "value": point, "lower": limits.lower, "upper": limits.upper, "positives": int(label.sum()), "n": int(known.sum()),
            "average_precision": metrics.average_precision(label, score), "f1": counts.f1, "accuracy": counts.accuracy,
            "precision": counts.precision, "sensitivity": counts.sensitivity, "specificity": counts.specificity,
            "threshold": threshold, "brier": metrics.brier(label, score), "calibration_error": metrics.calibration_error(label, score),
        }  # fmt: skip
    mean = metrics.mean_defined(points)
    limits = metrics.interval(mean, np.array([metrics.mean_defined(row) for row in resampled]))
    shuffled = shuffled_aurocs(truth, scores, patients, seed=seed)
    complete = ~np.isnan(truth).any(axis=1)
    called = scores[complete] >= np.array(thresholds)
    result = {
        "protocol": protocol.model_dump(mode="json"),
        "volumes": len(rows),
        "patients": len(np.unique(patients)),
        "zero_shot": {
            "mean_auroc": mean,
            "mean_auroc_interval": [limits.lower, limits.upper],
            "labels_defined": int(np.isfinite(points).sum()),
            "mean_average_precision": metrics.mean_defined([v["average_precision"] for v in per_label.values()]),
            "f1": metrics.f1_averages(truth[complete], called),
            "thresholds": "picked on these very volumes, as published: F1, accuracy and the like are optimistic",
            "auroc": per_label,
        },
        "controls": {
            "shuffled_mean_auroc": float(shuffled.mean()),
            "shuffled_mean_auroc_range": [float(shuffled.min()), float(shuffled.max())],
        },
        "bootstrap": {"resamples": resamples, "unit": "patient", "level": 0.95, "seed": seed},
    }
    return plain(result)


def evaluate_retrieval(
    predictions: pd.DataFrame, embeddings: dict[str, np.ndarray], truth: np.ndarray | None
) -> dict[str, Any]:
    """Report to volume, volume to report, volume to volume. Embeddings as ``ctclip zero-shot --store`` writes them."""
    scans = predictions["scan"].to_numpy(dtype=str)
    volumes, reports = embeddings["volume_embeddings"], embeddings.get("report_embeddings")
    result: dict[str, Any] = {}
    if reports is not None:
        written = ~np.isnan(reports).any(axis=1)
        first = np.zeros(len(scans), dtype=bool)
        first[np.unique(scans, return_index=True)[1]] = True
        chosen = first & written
        result["report_to_volume"] = retrieval(reports[chosen], volumes, scans[chosen], scans)
        result["volume_to_report"] = retrieval(volumes[written], reports[chosen], scans[written], scans[chosen])
    if truth is not None:
        value = precision_by_labels(volumes, truth, scans)
        result["volume_to_volume"] = {
            "map@10": value,
            "relevant": "Jaccard of labels at least 0.5, other scans only",
        }
    return plain(result)


def plain(value: Any) -> Any:
    """For JSON: NaN becomes None, numpy scalars become Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
