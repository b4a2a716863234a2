"""The base class of heads: named scores of encoded volumes, their supervision and their calibration."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.calibration import Calibration
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.errors import UNFIT

# Exceptions caused by files that are missing, damaged or unrelated.
DAMAGED = (*UNFIT, SafetensorError, yaml.YAMLError, RuntimeError)


@contextlib.contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Context manager for reading the files of a head: turns any of ``DAMAGED`` into a CheckpointError that names
    ``folder`` and ``what``."""
    try:
        yield
    except DAMAGED as error:
        raise CheckpointError(f"{folder}: {what} missing or damaged; copy the model folder again") from error


class Head(ABC):
    """Turns ``Encoded`` into a score for each of ``names``.

    A subclass sets ``kind`` (its name in the configuration, or ``module:Name``), ``names``, ``supervision`` (its
    training data; "none" if it adds nothing to the model's) and ``source`` (its origin, as stated in the prediction
    table), and implements ``score``, ``save`` and ``load``.
    """

    kind: ClassVar[str]
    names: tuple[str, ...]
    supervision: str = "none"
    source: str = ""
    values_of: tuple[str, ...] = ()  # findings with a size, as "name [unit]"

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self.calibration: Calibration | None = None
        # For a head fitted to labels: the patients and the model.
        self.adaptation: Adaptation | None = None

    @abstractmethod
    def score(self, encoded: Encoded) -> Tensor:
        """(B, names) float32: scores for ranking; a larger score is more likely, 0 is undecided.

        Should be differentiable if possible, because most explanations need its gradient.
        """

    @torch.no_grad()
    def texts(self) -> Tensor:
        """An embedding (names, dim), of any norm, of each finding; by default that of its name."""
        return self.model.encode_text(self.names)

    def values(self, encoded: Encoded) -> Tensor:
        """Sizes (B, values_of) of the findings that have one, in their units."""
        return encoded.pooled.new_zeros(len(encoded.pooled), 0)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write everything that ``load`` needs to ``folder``, which exists and is empty."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, model: DualEncoder) -> Head:
        """Load the head that ``save`` wrote. Raises CheckpointError if files are missing or do not fit ``model``."""

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores (n, names) -> probabilities: the sigmoid, or the calibration if there is one."""
        if self.calibration is None:
            return scores.sigmoid()
        slope, intercept = self.calibration.of(self.names)
        return (scores * torch.as_tensor(slope).to(scores) + torch.as_tensor(intercept).to(scores)).sigmoid()

    def intervals(self, scores: Tensor) -> np.ndarray:
        """Scores (n, names) -> (n, names, 2) float64: 95 % intervals of the calibrated probabilities, NaN where there is none."""
        margins = scores.detach().double().cpu().numpy()
        if self.calibration is None:
            return np.full((*margins.shape, 2), np.nan)
        return self.calibration.limits(self.names, margins)

    def thresholds(self) -> dict[str, float]:
        """The decision threshold on the probability of each calibrated name."""
        lines = self.calibration.lines if self.calibration is not None else {}
        return {name: lines[name].threshold for name in self.names if name in lines}

    def identity(self) -> str:
        """An identifier that is equal for heads with the same scores and calibration."""
        probe = torch.nn.functional.normalize(_probe(self.model.config.dim), dim=-1).to(self.model.device)
        facts = repr((self.kind, self.names, self.source, self.calibration)).encode()
        return hashlib.sha256(facts + self.fingerprint(probe)).hexdigest()[:16]

    def fingerprint(self, probe: Tensor) -> bytes:
        """Bytes that differ if scores differ. ``probe``: a few unit vectors (n, dim) on the model's device."""
        return b""


def _probe(dim: int) -> Tensor:
    return torch.sin(torch.arange(4 * dim, dtype=torch.float32).view(4, dim) * 1.7)
