"""From margins to probabilities that mean what they say, fitted on a calibration split and kept with the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ctclip.errors import EvaluationError
from ctclip.preprocessing.files import write_text

Method = Literal["platt", "temperature"]
FEWEST = 5


@dataclass(frozen=True)
class Line:
    """probability = sigmoid(slope * margin + intercept); ``threshold`` on that probability."""

    slope: float
    intercept: float
    threshold: float
    positives: int
    n: int


@dataclass(frozen=True)
class Calibration:
    """Of one model and one set of prompts: a line an abnormality, where it was fitted, and digests of the patients it
    saw, none of whom may be in a test."""

    method: Method
    fitted_on: str
    model: str
    lines: dict[str, Line]
    prompts: str = ""
    patients: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """slope, intercept (names,) float32; an abnormality that was not fitted keeps its plain softmax."""
        plain = Line(1.0, 0.0, 0.5, 0, 0)
        lines = [self.lines.get(name, plain) for name in names]
        return np.array([line.slope for line in lines], "f4"), np.array([line.intercept for line in lines], "f4")

    def covers(self, names: Sequence[str]) -> bool:
        """Whether every one of ``names`` was fitted."""
        return all(name in self.lines for name in names)

    def saw(self, patients: Iterable[str]) -> list[str]:
        """Those of ``patients`` it was fitted on."""
        seen = set(self.patients)
        return [patient for patient in patients if digest(patient) in seen]

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises EvaluationError if the file is not one."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            lines = {str(name): Line(**line) for name, line in values.pop("lines").items()}
            return cls(**values | {"patients": tuple(values.get("patients", ()))}, lines=lines)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{path}: no calibration ({error}); `ctclip calibrate` writes one") from error


def digest(patient: str) -> str:
    """Twelve hex digits that stand for a patient's id in a file that travels with the model."""
    return hashlib.sha256(patient.encode()).hexdigest()[:12]


def fit_calibration(
    labels: np.ndarray,
    margins: np.ndarray,
    names: Sequence[str],
    *,
    method: Method,
    fitted_on: str,
    model: str,
    prompts: str = "",
    patients: Iterable[str] = (),
) -> Calibration:
    """labels (n, L) of 0, 1, NaN; margins (n, L), positive minus negative logit.

    ``platt``: a slope and an intercept each label, with Platt's (1999) smoothed targets. ``temperature``: one slope
    for all labels and no intercept (Guo et al. 2017). Labels with fewer than five positives or negatives are left
    uncalibrated by ``platt``. The threshold is the ROC point nearest to perfect, on this split.
    """
    # Here and not above: detection reads calibrations, and need not wait for the compiler of the metrics.
    from ctclip.evaluation.metrics import best_threshold

    known = ~np.isnan(labels)
    if not known.any():
        raise EvaluationError("no labels in the calibration split: nothing can be fitted")
    shared = _fit(margins[known], labels[known], intercept=False) if method == "temperature" else None
    lines = {}
    for index, name in enumerate(names):
        truth, margin = labels[known[:, index], index], margins[known[:, index], index]
        positives = int(truth.sum())
        if min(positives, len(truth) - positives) < FEWEST:
            if shared is None:
                continue
            slope, intercept = shared
        else:
            slope, intercept = shared or _fit(margin, truth, intercept=True)
        probability = 1 / (1 + np.exp(-(slope * margin + intercept)))
        lines[name] = Line(slope, intercept, best_threshold(truth, probability), positives, len(truth))
    if not lines:
        raise EvaluationError(
            f"no label has {FEWEST} positives and {FEWEST} negatives in the calibration split: take a larger one"
        )
    return Calibration(method, fitted_on, model, lines, prompts, tuple(sorted({digest(p) for p in patients})))


def _fit(margin: np.ndarray, truth: np.ndarray, *, intercept: bool) -> tuple[float, float]:
    """Slope and intercept of least cross-entropy, by Newton's method on smoothed targets."""
    positives = truth.sum()
    high, low = (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2)
    target = np.where(truth == 1, high, low) if intercept else truth
    spread = max(float(margin.std()), 1e-12)
    design = np.stack([margin / spread, np.ones_like(margin)], axis=1)[:, : 2 if intercept else 1]
    weights = np.zeros(design.shape[1])
    for _ in range(100):
        probability = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (probability - target)
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design + 1e-9 * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights -= np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            break
    return float(weights[0] / spread), float(weights[1]) if intercept else 0.0
