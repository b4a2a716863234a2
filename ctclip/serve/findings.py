"""The answers of a service, as JSON."""

from __future__ import annotations

import math
from typing import Any

from ctclip.inference.model import Model
from ctclip.inference.show import Detection

NOTICE = "Research software, not a medical device. Not for diagnosis."


def of_detection(detection: Detection) -> dict[str, Any]:
    """A detection as JSON. Findings are sorted by the distance from their threshold; those without one come last."""
    return {
        "findings": [_finding(detection, name) for name in _by_distance(detection)],
        "calibrated": detection.calibrated,
        "warnings": list(detection.warnings),
        "model": detection.model,
        "spec": detection.spec,
        "notice": NOTICE,
    }


def of_model(model: Model) -> dict[str, Any]:
    """A model and the data it was trained and calibrated on, without its path."""
    trained_on, calibration = model.folder.trained_on, model.head().calibration
    return {
        "model": model.folder.hash,
        "name": model.folder.path.name,
        "encoder": model.dual.config.volume.kind,
        "spec": {"name": model.spec.name, "hash": model.spec.hash, "spacing": model.spec.spacing, "shape": model.spec.shape},
        "labels": {"name": model.labels.name, "names": model.labels.names},
        "heads": [{"name": head.name, "kind": head.kind, "supervision": head.supervision} for head in model.heads],
        "trained_on": trained_on.model_dump(mode="json") | {"words": trained_on.words()},
        # The rest of the line may be a path.
        "calibrated_on": None if calibration is None else calibration.fitted_on.partition(",")[0],
        "caveats": trained_on.caveats(),
        "notice": NOTICE,
    }  # fmt: skip


def _by_distance(detection: Detection) -> list[str]:
    def key(name: str) -> tuple[bool, float]:
        distance = _distance(detection, name)
        return (distance is None, -detection.margins[name] if distance is None else -distance)

    return sorted(detection.probabilities, key=key)


def _finding(detection: Detection, name: str) -> dict[str, Any]:
    values = {key: value for key, value in detection.values.items() if key.partition(" [")[0] == name}
    return {
        "name": name,
        "probability": detection.probabilities[name],
        "interval": detection.intervals.get(name),
        "margin": detection.margins[name],
        "threshold": detection.thresholds.get(name),
        "distance": _distance(detection, name),
        "above": detection.above(name),
        "values": values,
    }


def _distance(detection: Detection, name: str) -> float | None:
    """The difference between the log odds of a probability and of its threshold; None without a threshold."""
    threshold = detection.thresholds.get(name)
    return None if threshold is None else _log_odds(detection.probabilities[name]) - _log_odds(threshold)


def _log_odds(probability: float) -> float:
    bounded = min(max(probability, 1e-6), 1 - 1e-6)
    return math.log(bounded / (1 - bounded))
