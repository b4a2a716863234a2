"""The numerical precision of a model: the fastest whose scores agree with float32, checked on this device and saved
with the model (``ctclip check-precision``)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ctclip.errors import CtclipError
from ctclip.heads.head import Head
from ctclip.models.folder import PRECISION, ModelFolder
from ctclip.models.precision import Precision
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text

Asked = Literal["auto", "fp32", "tf32", "bf16"]
# Maximum change of a probability, and minimum rank correlation of each finding's scores.
LARGEST_CHANGE, LEAST_CORRELATION = 0.01, 0.999
FEWEST = 16


class PrecisionError(CtclipError):
    """A device lacks a precision, or a check cannot be made."""


@dataclass(frozen=True)
class Agreement:
    """How scores at one precision differ from those in float32, and how long a volume takes to encode.

    ``change``: the largest change of a probability; ``correlation``: the lowest Spearman correlation over the
    findings.
    """

    precision: Precision
    change: float
    correlation: float
    seconds: float

    @property
    def agrees(self) -> bool:
        return self.change <= LARGEST_CHANGE and self.correlation >= LEAST_CORRELATION


def available(device: torch.device) -> tuple[Precision, ...]:
    """The precisions that a device supports, the most exact first."""
    every: tuple[Precision, ...] = get_args(Precision)
    return every if device.type == "cuda" else tuple(name for name in every if name != "tf32")


def set_precision(loaded: ModelFolder, asked: Asked = "auto") -> Precision:
    """Set the precision of ``loaded`` and return it: the requested one, or for ``auto`` the fastest one that agreed
    with float32 on a device of this name (float32 if none was checked). Raises PrecisionError for one that the device
    does not support."""
    device = loaded.model.device
    if asked != "auto" and asked not in available(device):
        choices = ", ".join(("auto", *available(device)))
        raise PrecisionError(f"{asked!r} is not supported by this device ({device_name(device)}): choose {choices}")
    loaded.model.precision = _fastest(loaded) if asked == "auto" else asked
    return loaded.model.precision


def check_precision(loaded: ModelFolder, head: Head, batches: Iterable[Tensor]) -> tuple[list[Agreement], int]:
    """Score volumes (``batches`` of (b, 1, D, H, W) in [-1, 1], one in memory at a time) at every precision of the
    model's device. Returns the results and the number of volumes.

    Raises PrecisionError if there are fewer than 16: rank correlations of fewer are meaningless.
    """
    before, names = loaded.model.precision, available(loaded.model.device)
    scored: dict[Precision, list[_Scored]] = {name: [] for name in names}
    try:
        for number, batch in enumerate(batches):
            for name in names:
                loaded.model.precision = name
                # The first pass selects kernels, and is not timed.
                for _ in range(2 if number == 0 else 1):
                    one = _score(loaded, head, batch)
                scored[name].append(one)
    finally:
        loaded.model.precision = before
    count = sum(len(one.scores) for one in scored["fp32"])
    if count < FEWEST:
        raise PrecisionError(f"{count} volumes are too few to compare ranks: give at least {FEWEST}")
    scores = {name: np.concatenate([one.scores for one in scored[name]]) for name in names}
    probabilities = {name: np.concatenate([one.probabilities for one in scored[name]]) for name in names}
    results = []
    for name in names:
        correlations = [_correlation(a, b) for a, b in zip(scores["fp32"].T, scores[name].T, strict=True)]
        change = float(np.abs(probabilities[name] - probabilities["fp32"]).max())
        results.append(Agreement(name, change, min(correlations), sum(one.seconds for one in scored[name]) / count))
    return results, count


def keep(loaded: ModelFolder, results: Sequence[Agreement], volumes: int) -> Path:
    """Save the results in the model folder, beside those of other devices."""
    name = device_name(loaded.model.device)
    entries = {device: entry for device, entry in _kept(loaded).items() if device != name}
    entries[name] = {"volumes": volumes, "torch": torch.__version__, "results": [asdict(result) for result in results]}
    path = loaded.path / PRECISION
    write_text(path, json.dumps({"weights": loaded.hash, "devices": entries}, indent=2))
    return path


def fastest(results: Sequence[Agreement]) -> Precision:
    """The fastest precision of those that agree; float32 agrees with itself."""
    return min((result for result in results if result.agrees), key=lambda result: result.seconds).precision


def device_name(device: torch.device) -> str:
    """The name of a device; a check on one kind of device is not valid for another."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return os.uname().machine


def _fastest(loaded: ModelFolder) -> Precision:
    entry = _kept(loaded).get(device_name(loaded.model.device))
    try:
        results = [Agreement(**result) for result in entry["results"]] if entry else []
        checked = fastest(results) if results else "fp32"
    except UNFIT:
        return "fp32"
    return checked if checked in available(loaded.model.device) else "fp32"


def _kept(loaded: ModelFolder) -> dict[str, Any]:
    """The saved checks of these weights, by device."""
    try:
        values = plain_json.read(loaded.path / PRECISION)
    except (OSError, ValueError):
        return {}
    devices = values.get("devices") if isinstance(values, dict) and values.get("weights") == loaded.hash else None
    return devices if isinstance(devices, dict) else {}


class _Scored(NamedTuple):
    """Scores and probabilities (volumes, names) in float64, and the seconds that encoding took."""

    scores: np.ndarray
    probabilities: np.ndarray
    seconds: float


@torch.inference_mode()
def _score(loaded: ModelFolder, head: Head, batch: Tensor) -> _Scored:
    device = loaded.model.device
    voxels = batch.to(device)
    _wait(device)
    began = time.perf_counter()
    encoded = loaded.model.encode(voxels)
    _wait(device)
    seconds = time.perf_counter() - began
    scores = head.score(encoded).float()
    probabilities = head.probabilities(scores)
    return _Scored(scores.double().cpu().numpy(), probabilities.double().cpu().numpy(), seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation; 1 if the scores are all equal at both precisions."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float(np.ptp(one) == np.ptp(other))
    value = float(stats.spearmanr(one, other).statistic)
    return 0.0 if math.isnan(value) else value
