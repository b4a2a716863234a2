"""Calibrated probabilities from margins, fitted on a calibration split and kept with the model."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctclip.errors import EvaluationError
from ctclip.evaluation.calibration_interval import Covariance, checked_covariance, line_covariance, probability_limits
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text

Method = Literal["platt", "temperature"]
FEWEST = 5  # minimum number of patients with the finding, and without
FALLING = "the margins of the calibration split do not rise with the label"


@dataclass(frozen=True)
class Line:
    """probability = sigmoid(slope * margin + intercept); ``threshold`` on that probability; ``covariance`` of slope and
    intercept (see ``line_covariance``), None in files of 1.0 and for a slope that labels share."""

    slope: float
    intercept: float
    threshold: float
    positives: int
    n: int
    covariance: Covariance | None = None

    def limits(self, margins: np.ndarray) -> np.ndarray:
        """Margins (n,) -> 95 % intervals (n, 2) of their probabilities; NaN without a covariance."""
        return probability_limits(margins, self.slope, self.intercept, self.covariance)


@dataclass(frozen=True)
class Calibration:
    """The calibration of one model with one prompt set: a line for each abnormality, a description of the data it was
    fitted on, and digests of the patients, none of whom may be in a test set. ``uncalibrated``: the abnormalities that
    keep their plain softmax, with reasons. ``salt`` is part of the digests (empty in files before 0.3), so that ids
    cannot be looked up in a precomputed table. Without digests, as in a folder from a hub, the patients are unknown."""

    method: Method
    fitted_on: str
    model: str
    lines: dict[str, Line]
    prompts: str = ""
    # Excluded from repr, from which a head's identity is computed, because they do not change a score.
    patients: tuple[str, ...] = field(default=(), repr=False)
    uncalibrated: dict[str, str] = field(default_factory=dict)
    salt: str = field(default="", repr=False)

    def of(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and intercepts (names,) float32; an abnormality that was not fitted keeps its plain softmax."""
        lines = [self.lines.get(name) for name in names]
        slopes = [1.0 if line is None else line.slope for line in lines]
        intercepts = [0.0 if line is None else line.intercept for line in lines]
        return np.array(slopes, "f4"), np.array(intercepts, "f4")

    def limits(self, names: Sequence[str], margins: np.ndarray) -> np.ndarray:
        """Margins (n, names) -> 95 % intervals (n, names, 2) of the probabilities; NaN if unknown."""
        limits = np.full((*margins.shape, 2), np.nan)
        for index, name in enumerate(names):
            if name in self.lines:
                limits[:, index] = self.lines[name].limits(margins[:, index])
        return limits

    def covers(self, names: Sequence[str]) -> bool:
        """Whether every one of ``names`` was fitted."""
        return all(name in self.lines for name in names)

    def saw(self, patients: Iterable[str]) -> list[str]:
        """The ``patients`` it was fitted on."""
        seen = set(self.patients)
        return [patient for patient in patients if digest(patient, self.salt) in seen]

    def without_patients(self) -> Calibration:
        """A copy without the digests of patients, for publication."""
        return replace(self, patients=(), salt="")

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Load a calibration. Raises EvaluationError if the file is not one.

        A line with a slope of 0 or less, which versions before 0.3 could fit to a few volumes, is left out, because it
        would reverse the model's scores.
        """
        try:
            values = plain_json.read(path)
            lines = {str(name): _line(facts) for name, facts in values.pop("lines").items()}
            uncalibrated = dict(values.pop("uncalibrated", {}))
            patients = tuple(values.pop("patients", ()))
            uncalibrated |= {name: FALLING for name, line in lines.items() if line.slope <= 0}
            rising = {name: line for name, line in lines.items() if line.slope > 0}
            texts = [*values.values(), *patients, *uncalibrated.values()]
            if odd := [value for value in texts if not isinstance(value, str)]:
                raise ValueError(f"{type(odd[0]).__name__} where text is expected")
            return cls(**values, lines=rising, patients=patients, uncalibrated=uncalibrated)
        except UNFIT as error:
            raise EvaluationError(f"{path}: not a calibration file ({error}); `ctclip calibrate` writes one") from error


def _line(facts: dict[str, Any]) -> Line:
    """Parse a line. Raises ValueError, TypeError or AttributeError if it is damaged."""
    covariance = facts.get("covariance")
    line = Line(**facts | {"covariance": None if covariance is None else checked_covariance(covariance)})
    if not np.isfinite(np.array([line.slope, line.intercept, line.threshold], dtype=float)).all():
        raise ValueError("a slope, intercept or threshold is not a finite number")
    return line


def digest(patient: str, salt: str = "") -> str:
    """The digest of a patient's id, twelve hex digits, for files kept with the model."""
    return hashlib.sha256((salt + patient).encode()).hexdigest()[:12]


def fit_calibration(
    labels: np.ndarray,
    margins: np.ndarray,
    names: Sequence[str],
    *,
    method: Method,
    fitted_on: str,
    model: str,
    prompts: str = "",
    patients: Iterable[str] | None = None,
) -> Calibration:
    """Fit a calibration. ``labels`` (n, L) of 0, 1, NaN; ``margins`` (n, L), positive minus negative logit;
    ``patients`` (n,), by default one per volume.

    ``platt``: a slope and an intercept for each label, with Platt's (1999) smoothed targets. ``temperature``: one slope
    for all labels and no intercept (Guo et al. 2017). A slope is never negative. The threshold is that of the ROC point
    nearest to the top left corner, on this split. Not calibrated, and listed in ``uncalibrated``, are labels with fewer
    than five positive or negative patients, and those whose margins do not rise with the label. Raises EvaluationError
    if no label is left.
    """
    # Imported here, because detection reads calibrations and should not wait for SciPy.
    from scipy.special import expit

    from ctclip.evaluation.intervals import patients_by_class
    from ctclip.evaluation.metrics import best_threshold

    known = ~np.isnan(labels)
    if not known.any():
        raise EvaluationError("the calibration split has no labels, so nothing can be fitted")
    people = (
        np.arange(len(labels)).astype(str) if patients is None else np.array([str(patient) for patient in patients])
    )
    shared = fit_line(margins[known], labels[known], intercept=False) if method == "temperature" else None
    lines, uncalibrated = {}, {}
    for index, name in enumerate(names):
        truth, margin = labels[known[:, index], index], margins[known[:, index], index]
        positives, negatives = patients_by_class(truth, people[known[:, index]])
        if min(positives, negatives) < FEWEST:
            uncalibrated[name] = (
                f"{positives} positive and {negatives} negative patients, but {FEWEST} of each are needed"
            )
            continue
        slope, intercept = shared or fit_line(margin, truth, intercept=True)
        if slope <= 0:
            uncalibrated[name] = FALLING
            continue
        threshold = best_threshold(truth, expit(slope * margin + intercept))
        # A shared slope gives no interval for a single label.
        covariance = None if shared else line_covariance(margin, truth, people[known[:, index]], slope, intercept)
        lines[name] = Line(slope, intercept, threshold, int(truth.sum()), len(truth), covariance)
    if not lines:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(uncalibrated.items())[:3])
        raise EvaluationError(f"no label can be calibrated ({reasons}): take a larger calibration split")
    salt = secrets.token_hex(16) if patients is not None else ""
    digests = tuple(sorted({digest(patient, salt) for patient in people})) if patients is not None else ()
    return Calibration(method, fitted_on, model, lines, prompts, digests, uncalibrated, salt)


def fit_line(margin: np.ndarray, truth: np.ndarray, *, intercept: bool) -> tuple[float, float]:
    """Slope (at least 0) and intercept that minimise the cross-entropy; margin (n,), truth (n,) of 0 and 1.

    With an intercept the targets are Platt's: (N+ + 1) / (N+ + 2) for positives and 1 / (N- + 2) for negatives, so that
    separable margins have a finite slope.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    positives = truth.sum()
    high, low = (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2)
    target = np.where(truth == 1, high, low) if intercept else truth
    centre = float(margin.mean()) if intercept else 0.0
    spread = float(np.sqrt(np.mean((margin - centre) ** 2)))
    if spread == 0:
        return 0.0, 0.0  # all margins are equal
    design = np.stack([(margin - centre) / spread, np.ones_like(margin)], axis=1)[:, : 2 if intercept else 1]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        score = design @ weights
        return float(np.mean(np.logaddexp(0, score) - target * score)), design.T @ (expit(score) - target) / len(truth)

    # Without smoothed targets, separable margins have no finite slope; 100 per standard deviation is a step.
    bounds = [(0.0, 100.0), (None, None)][: design.shape[1]]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    weights = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    slope = float(weights[0] / spread)
    return slope, float(weights[1]) - slope * centre if intercept else 0.0
