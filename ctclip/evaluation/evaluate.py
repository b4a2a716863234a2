"""Compute all metrics from predictions, labels and a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.controls import shuffled_aurocs
from ctclip.evaluation.intervals import (
    FEWEST_PATIENTS,
    LEVEL,
    auroc_interval,
    patients_by_class,
    percentile_interval,
)
from ctclip.evaluation.protocol import Protocol, align
from ctclip.evaluation.ranking import ranking_scores

INTERVALS = {
    "auroc": "|observed - area| = t sd(area), with the larger of the variances of two normals and of Obuchowski (1997)",
    "others": "percentiles of a bootstrap by patient, which are too narrow with few positives",
}


def evaluate(
    predictions: pd.DataFrame,
    labels: pd.DataFrame,
    protocol: Protocol,
    *,
    calibration: Calibration | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics, per label and mean, with intervals by patient, and the control with shuffled labels.

    ``predictions`` come from ``tables.read_predictions``, ``labels`` from ``tables.read_labels``. AUROC and average
    precision are computed from the uncalibrated margins, the other metrics from the probabilities. Undefined values and
    limits are None; means are over the labels whose value is defined.
    """
    volumes, truth, probabilities = align(predictions, labels, protocol)
    ranking = ranking_scores(volumes, protocol)
    patients = volumes["patient"].to_numpy(dtype=str)
    resamples = resamples or protocol.bootstrap
    thresholds, thresholds_source = _thresholds(truth, probabilities, protocol, calibration)
    resampled = metrics.bootstrap_metrics(
        truth, ranking, probabilities, patients, thresholds, resamples=resamples, seed=seed
    )
    per_label, points = _by_label(truth, ranking, probabilities, patients, thresholds, resampled, protocol.labels)
    shuffled = shuffled_aurocs(truth, ranking, patients, seed=seed)
    result = {
        "protocol": protocol.model_dump(mode="json"),
        "volumes": len(volumes),
        "whole_set": protocol.size is None or len(volumes) == protocol.size,
        "patients": len(np.unique(patients)),
        "zero_shot": _zero_shot(per_label, points, resampled) | {
            "pooled_calibration_error": _pooled_calibration_error(truth, probabilities),
            "f1": metrics.f1_averages(truth, probabilities >= thresholds),
            "thresholds": thresholds_source,
        },
        "controls": {
            "shuffled_mean_auroc": float(shuffled.mean()),
            "shuffled_mean_auroc_range": [float(shuffled.min()), float(shuffled.max())],
        },
        "bootstrap": {"resamples": resamples, "unit": "patient", "level": LEVEL, "seed": seed},
        "intervals": {**INTERVALS, "level": LEVEL, "trusted_from_patients": FEWEST_PATIENTS},
    }  # fmt: skip
    return plain(result)


def _by_label(
    truth: np.ndarray,
    ranking: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    thresholds: np.ndarray,
    resampled: dict[str, np.ndarray],
    names: Sequence[str],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The metrics of each label with their intervals, and the values of each metric for all labels."""
    per_label: dict[str, Any] = {}
    points: dict[str, list[float]] = {metric: [] for metric in metrics.METRICS}
    for index, name in enumerate(names):
        known = ~np.isnan(truth[:, index])
        label, people, threshold = truth[known, index], patients[known], float(thresholds[index])
        values = metrics.label_metrics(label, ranking[known, index], probabilities[known, index], threshold)
        for metric, value in values.items():
            points[metric].append(value)
        limits = auroc_interval(label, ranking[known, index], people)
        positive_patients, negative_patients = patients_by_class(label, people)
        per_label[name] = {
            "value": values.pop("auroc"), "lower": limits.lower, "upper": limits.upper, "interval_trusted": limits.trusted,
            "positives": int(label.sum()), "n": int(known.sum()), "threshold": threshold,
            "positive_patients": positive_patients, "negative_patients": negative_patients, **values,
            "intervals": {metric: _limits(value, resampled[metric][:, index], metric) for metric, value in values.items()},
        }  # fmt: skip
    return per_label, points


def _zero_shot(
    per_label: dict[str, Any], points: dict[str, list[float]], resampled: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Means over the labels with a defined value, with their intervals, and the values of the labels, as ``auroc``."""
    means = {
        metric: {
            "value": metrics.mean_defined(values),
            "interval": _limits(metrics.mean_defined(values), _means(resampled[metric]), metric),
            "labels": int(np.isfinite(values).sum()),
        }
        for metric, values in points.items()
    }
    auroc = means.pop("auroc")
    return {
        "mean_auroc": auroc["value"],
        "mean_auroc_interval": auroc["interval"],
        "labels_defined": auroc["labels"],
        "labels_undefined": [name for name, entry in per_label.items() if not np.isfinite(entry["value"])],
        "intervals_not_trusted": [name for name, entry in per_label.items() if not entry["interval_trusted"]],
        "means": means,
        "auroc": per_label,
    }


def _pooled_calibration_error(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Calibration error over all labels together: its bins hold thousands of predictions, those of a single label may
    hold a handful."""
    known = ~np.isnan(truth)
    return metrics.calibration_error(truth[known], probabilities[known]) if known.any() else float("nan")


def _thresholds(
    truth: np.ndarray, probabilities: np.ndarray, protocol: Protocol, calibration: Calibration | None
) -> tuple[np.ndarray, str]:
    """Thresholds (labels,), and a description of their origin."""
    if protocol.thresholds == "published":
        known = ~np.isnan(truth)
        picked = [metrics.published_threshold(truth[k, i], probabilities[k, i]) for i, k in enumerate(known.T)]
        return np.array(
            picked
        ), "chosen on the evaluated volumes, as published: F1, accuracy and similar metrics are optimistic"
    if calibration is None:
        return np.full(truth.shape[1], 0.5), "0.5 for every label: no calibration split was given"
    lines = [calibration.lines.get(name) for name in protocol.labels]
    without = [name for name, line in zip(protocol.labels, lines, strict=True) if line is None]
    source = f"from the calibration split ({calibration.fitted_on}); none was chosen on these volumes"
    if without:
        reasons = [f"{name} ({calibration.uncalibrated.get(name, 'not fitted')})" for name in without]
        source += f"; not calibrated, with a threshold of 0.5: {', '.join(reasons)}"
    return np.array([0.5 if line is None else line.threshold for line in lines]), source


def _limits(value: float, resampled: np.ndarray, metric: str = "") -> list[float]:
    limits = percentile_interval(value, resampled)
    if metric == "calibration_error" and np.isfinite(resampled).any():
        # Calibration error is a sum of distances, which noise from resampling increases. The bias, estimated as the
        # mean of the resamples minus the value (Efron and Tibshirani 1993, section 10.2), is subtracted from the
        # limits.
        bias = float(np.nanmean(resampled)) - value
        return [max(0.0, limits.lower - bias), max(0.0, limits.upper - bias)]
    return [limits.lower, limits.upper]


def _means(resampled: np.ndarray) -> np.ndarray:
    """Mean (resamples,) over the labels that are defined in each resample."""
    return np.array([metrics.mean_defined(values) for values in resampled])


def plain(value: Any) -> Any:
    """Convert to plain Python values for JSON: NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
