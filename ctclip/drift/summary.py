"""A summary of a model's training scans, used to decide whether another scan is far from them.

It holds means, covariances and ranges over some hundred patients, and no data of a single patient. The limit is a
conformal quantile (Vovk et al. 2005) over held-out patients: for any distribution of distances, a scan of the same kind
exceeds it at the stated rate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.drift.facts import SOURCE_NAMES, Source, fact_names, scan_facts
from ctclip.errors import CheckpointError
from ctclip.models.folder import SUMMARY as FILE
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.spec import PreprocessingSpec

VERSION = 1
RATE = 0.01
# If there are too few held-out patients for a limit with this rate, no scan is flagged.
WORST_RATE = 0.05
FEWEST = 20
FOLDS = 5
# A spacing or extent beyond those of all training scans by this factor counts as much as a distance at the limit.
BEYOND = 1.2
SOURCE, EMBEDDING = "acquisition", "embedding"
NAMED_FACTS = 3


@dataclass(frozen=True)
class Described:
    """The numbers of one scan that are compared: vectors by group, and its source if known."""

    groups: dict[str, np.ndarray]
    source: Source | None

    @classmethod
    def of(cls, voxels: np.ndarray, spec: PreprocessingSpec, embedding: np.ndarray, source: Source | None) -> Described:
        """voxels [slice, row, column] in [-1, 1], embedding (dim,) unit vector."""
        return cls({**scan_facts(voxels, spec), EMBEDDING: np.asarray(embedding, float)}, source)


@dataclass(frozen=True)
class Normal:
    """Mean, standard deviation and inverse correlation of a group of numbers, for a Mahalanobis distance with the
    covariance shrunk as in Ledoit & Wolf (2004). ``low``, ``high``: the range of the training scans, for messages."""

    mean: np.ndarray
    spread: np.ndarray
    precision: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray) -> Normal:
        """Fit to ``vectors`` (n, d) with n at least 2."""
        from sklearn.covariance import ledoit_wolf

        mean, spread = vectors.mean(axis=0), vectors.std(axis=0)
        # If a number is the same in all scans, any other value is far away, but not infinitely far.
        spread = np.maximum(spread, max(1e-3 * float(spread.max()), 1e-6))
        covariance, _ = ledoit_wolf((vectors - mean) / spread, assume_centered=True)
        low, high = np.quantile(vectors, [0.01, 0.99], axis=0)
        return cls(mean, spread, np.linalg.pinv(covariance, hermitian=True), low, high)

    def distance(self, vector: np.ndarray) -> float:
        """Mahalanobis distance, divided by the square root of the number of dimensions."""
        z = (vector - self.mean) / self.spread
        return math.sqrt(max(0.0, float(z @ self.precision @ z)) / len(z))

    def unusual(self, vector: np.ndarray) -> list[int]:
        """Indices of numbers outside the range of the training scans, the farthest first."""
        z = np.abs(vector - self.mean) / self.spread
        outside = np.flatnonzero((vector < self.low) | (vector > self.high))
        return [int(index) for index in outside[np.argsort(-z[outside])]]


@dataclass(frozen=True)
class Verdict:
    """How far a scan is from the training scans: ``ratio`` of its distance to the limit (far: above 1), and the
    reasons."""

    ratio: float
    reasons: tuple[str, ...]
    rate: float

    @property
    def far(self) -> bool:
        return self.ratio > 1

    def warning(self) -> str:
        """A one-line warning for readers of the scores."""
        return (
            f"far from the scans the model was trained on ({self.ratio:.1f} times the distance that {self.rate:.0%} of such "
            f"scans exceed): {', '.join(self.reasons)}"
        )


@dataclass(frozen=True)
class TrainingSummary:
    """``normals`` by group; ``scales``: the distance in each group that counts as 1; ``source`` (2, 6): smallest and
    largest spacing and extent in mm, or None; ``limit``: limit of the largest scaled distance; ``rate``: fraction of
    scans of the training kind that exceed it; ``model``: hash of the weights; ``patients``, ``held_out``: numbers of
    patients it was computed from."""

    normals: dict[str, Normal]
    scales: dict[str, float]
    source: np.ndarray | None
    limit: float
    rate: float
    model: str
    patients: int
    held_out: int

    @classmethod
    def fit(
        cls,
        training: Sequence[Described],
        held_out: Sequence[Described],
        *,
        model: str,
        rate: float = RATE,
        seed: int = 0,
    ) -> TrainingSummary | None:
        """Fit to one scan per patient. Without ``held_out`` patients, each fold of the training patients is held out in
        turn. Returns None if there are too few patients for a rate of ``WORST_RATE``."""
        if len(training) < FEWEST or len(held_out or training) + 1 < 1 / WORST_RATE:
            return None
        fold = np.random.default_rng(seed).permutation(len(training)) % FOLDS
        out_of_fold: list[dict[str, float]] = [{} for _ in training]
        for number in range(FOLDS):
            part = _fit_parts([one for one, own in zip(training, fold, strict=True) if own != number])
            for index in np.flatnonzero(fold == number):
                out_of_fold[index] = _distances(*part, training[int(index)])
        scales = {
            group: max(1e-6, float(np.quantile([one[group] for one in out_of_fold if group in one], 1 - rate)))
            for group in out_of_fold[0]
            if group != SOURCE
        }
        normals, source = _fit_parts(training)
        distances = [_distances(normals, source, one) for one in held_out] if held_out else out_of_fold
        scores = np.sort([_largest(_scaled(one, scales)) for one in distances])
        place = math.ceil((len(scores) + 1) * (1 - rate))
        kept_rate = rate if place <= len(scores) else 1 / (len(scores) + 1)
        limit = float(scores[min(place, len(scores)) - 1])
        return cls(normals, scales, source, limit, kept_rate, model, len(training), len(held_out))

    def judge(self, scan: Described) -> Verdict:
        """How far ``scan`` is from the training scans, and why."""
        scaled = _scaled(_distances(self.normals, self.source, scan), self.scales)
        far = sorted((group for group, score in scaled.items() if score > self.limit), key=lambda group: -scaled[group])
        reasons = tuple(reason for group in far for reason in self._reasons(group, scan))
        return Verdict(_largest(scaled) / self.limit, reasons, self.rate)

    def _reasons(self, group: str, scan: Described) -> list[str]:
        """Describe how a scan differs from the training scans."""
        if group == SOURCE:
            assert self.source is not None
            assert scan.source is not None
            facts, most = scan.source.facts, BEYOND**self.limit
            return [
                f"{SOURCE_NAMES[index]} {facts[index]:.3g} mm (training: {low:.3g} to {high:.3g})"
                for index, (low, high) in enumerate(self.source.T)
                if not low / most <= facts[index] <= high * most
            ]
        if group == EMBEDDING:
            return ["its embedding"]
        names, normal, values = fact_names()[group], self.normals[group], scan.groups[group]
        unusual = [names[index] for index in normal.unusual(values)[:NAMED_FACTS]]
        if group == "densities":
            shares = {name: index for index, name in enumerate(names)}
            unusual = [
                f"{name} {values[shares[name]] ** 2:.1%} (training: {normal.low[shares[name]] ** 2:.1%} to "
                f"{normal.high[shares[name]] ** 2:.1%})"
                for name in unusual[:1]
            ]
        return [f"its {group}" + (f" ({', '.join(unusual)})" if unusual else "")]

    def save(self, folder: Path) -> None:
        """Write ``FILE`` into a model folder, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {
            f"{group}/{part}": np.ascontiguousarray(getattr(normal, part), dtype=np.float32)
            for group, normal in self.normals.items()
            for part in Normal.__dataclass_fields__
        }
        if self.source is not None:
            tensors[SOURCE] = np.ascontiguousarray(self.source, dtype=np.float32)
        facts = {
            "version": VERSION, "scales": self.scales, "limit": self.limit, "rate": self.rate, "model": self.model,
            "patients": self.patients, "held_out": self.held_out,
        }  # fmt: skip
        with written_beside(folder / FILE) as partial:
            save_file(tensors, partial, {"summary": json.dumps(facts, sort_keys=True), "sha256": _sha256(tensors)})

    @classmethod
    def load(cls, folder: Path) -> TrainingSummary | None:
        """The summary of a model folder; None if it has none. Raises CheckpointError if it cannot be used."""
        from safetensors import SafetensorError, safe_open

        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "np") as stream:
                metadata = stream.metadata() or {}
                facts = plain_json.loads(metadata["summary"])
                stored = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            if metadata.get("sha256", "") not in ("", _sha256(stored)):
                raise ValueError("damaged: its numbers do not match its SHA-256")
            tensors = {name: values.astype(float) for name, values in stored.items()}
            if facts["version"] != VERSION:
                raise ValueError(f"version {facts['version']}")
            names = list(Normal.__dataclass_fields__)
            normals = {group: Normal(*(tensors[f"{group}/{part}"] for part in names)) for group in facts["scales"]}
            _check(normals, facts, tensors.get(SOURCE))
            return cls(
                normals, {k: float(v) for k, v in facts["scales"].items()}, tensors.get(SOURCE), float(facts["limit"]),
                float(facts["rate"]), str(facts["model"]), int(facts["patients"]), int(facts["held_out"]),
            )  # fmt: skip
        except (*UNFIT, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be used ({' '.join(str(error).split())[:120]}); run `ctclip summarise` to write it "
                f"again"
            ) from error


def _sha256(tensors: dict[str, np.ndarray]) -> str:
    """The SHA-256 of named arrays, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _check(normals: dict[str, Normal], facts: dict[str, Any], source: np.ndarray | None) -> None:
    """Raise ValueError unless the sizes in a file fit the numbers they are compared with."""
    expected = {group: len(names) for group, names in fact_names().items()}
    for group, normal in normals.items():
        size = expected.get(group, len(normal.mean))
        shapes = [getattr(normal, part).shape for part in ("mean", "spread", "low", "high")]
        if shapes != [(size,)] * 4 or normal.precision.shape != (size, size) or not (normal.spread > 0).all():
            raise ValueError(f"{group} has the wrong size")
    if source is not None and (source.shape != (2, len(SOURCE_NAMES)) or not (source > 0).all()):
        raise ValueError(f"{SOURCE} has the wrong size")
    limits = [float(value) for value in (facts["limit"], *facts["scales"].values())]
    if set(normals) != {*expected, EMBEDDING} or not min(limits) > 0:
        raise ValueError("its parts are not those of this version")


def _fit_parts(scans: Sequence[Described]) -> tuple[dict[str, Normal], np.ndarray | None]:
    normals = {group: Normal.fit(np.stack([one.groups[group] for one in scans])) for group in scans[0].groups}
    known = [one.source.facts for one in scans if one.source is not None]
    return normals, np.stack([np.min(known, axis=0), np.max(known, axis=0)]) if known else None


def _distances(normals: dict[str, Normal], source: np.ndarray | None, scan: Described) -> dict[str, float]:
    distances = {group: normal.distance(scan.groups[group]) for group, normal in normals.items()}
    if source is not None and scan.source is not None:
        facts = scan.source.facts
        beyond = np.abs(np.log(facts / np.clip(facts, *source)))
        distances[SOURCE] = float(beyond.max()) / math.log(BEYOND)
    return distances


def _scaled(distances: dict[str, float], scales: dict[str, float]) -> dict[str, float]:
    return {group: distance / scales.get(group, 1.0) for group, distance in distances.items()}


def _largest(scaled: dict[str, float]) -> float:
    return max(scaled.values())
