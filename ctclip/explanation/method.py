"""The interface of methods of explanation, and the list of methods."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.heads.head import Head
from ctclip.heads.locator import Locator
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded, Evidence

# A method is registered with one line; its file cites the paper.
METHODS = {
    "similarity": "Similarity",
    "contribution": "Contribution",
    "occlusion": "Occlusion",
    "gradcam": "GradCAM",
    "attention": "Attention",
    "counterfactual": "Counterfactual",
    "learned": "Learned",
}
# Methods that encode the scan many times.
SLOW = ("occlusion", "counterfactual")


class Maps(NamedTuple):
    """values (F, d, h, w) float32: one map per finding, 0 where a location has no influence; affine (4, 4): from the
    index (d, h, w) of a cell to mm of the prepared volume, as ``Encoded.affine``; notes: one for each finding, or none."""

    values: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


# A volume (1, 1, D, H, W) -> for one finding after another, the gradient (D, H, W) of the sum of its map.
Gradient = Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class Subject:
    """What to explain: the scores of ``findings`` (indices into ``head.names``) for one volume (1, 1, D, H, W) in [-1,
    1] on the model's device. ``budget``: the maximum number of encodings. ``locator``: what `ctclip adapt --method locate`
    trained for the model, if it has one."""

    model: DualEncoder
    head: Head
    findings: Sequence[int]
    volume: Tensor
    budget: int = 600
    locator: Locator | None = None

    def evidence(self) -> Evidence:
        """The encoded volume, with the features that were pooled."""
        with torch.no_grad():
            try:
                return self.model.volume_encoder.evidence(self.volume)
            except ValueError as error:
                raise ExplanationError(str(error)) from error

    def scores(self, encoded: Encoded) -> Tensor:
        """The scores (B, F) of the findings, for a gradient (see ``constant_norm``)."""
        embedding = constant_norm(self.model, encoded)
        return self.head.score(encoded._replace(embedding=embedding))[:, list(self.findings)]


def constant_norm(model: DualEncoder, encoded: Encoded) -> Tensor:
    """The unit vectors (B, dim) of volumes. The norm by which features become unit vectors is held constant, so that a
    gradient shows the contribution of a location, not its contribution relative to the volume's other findings."""
    features = model.similarity.volume_standard(model.volume_projection(encoded.pooled).float())
    return features / features.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)


class Method(ABC):
    """A method that computes maps of a subject."""

    name: ClassVar[str]
    # Number of positions of the cells along each axis, see ``ctclip.explanation.shifts``.
    shifts: ClassVar[int] = 1

    @abstractmethod
    def maps(self, subject: Subject) -> Maps:
        """Raises ExplanationError if the method does not support the encoder or the head."""

    def slopes(self, subject: Subject) -> Gradient | None:
        """For the detail within cells, see ``ctclip.explanation.detail``; None if the method shows no detail."""
        return None


def method(name: str) -> Method:
    """The method called ``name``. Raises ExplanationError for an unknown name."""
    if name not in METHODS:
        raise ExplanationError(f"no method {name!r}: give one of {', '.join(METHODS)}")
    kind: type[Method] = getattr(importlib.import_module(f"ctclip.explanation.{name}"), METHODS[name])
    return kind()


def differentiable(subject: Subject) -> tuple[Evidence, list[Tensor], Tensor]:
    """The features that an encoder pools, as leaves of the autograd graph, and the scores computed from them."""
    evidence = subject.evidence()
    features = [level.features.detach().clone().requires_grad_() for level in evidence.levels]
    scores = subject.scores(evidence.encoded._replace(tokens=features[0], pooled=evidence.pool(features)))
    return evidence, features, scores


def gradients(subject: Subject, scores: Tensor, of: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each finding, the gradients of its score (scores (1, F)) with respect to each tensor of ``of``."""
    if not scores.requires_grad:
        raise ExplanationError(
            f"the head of kind {subject.head.kind!r} is not differentiable: use --method occlusion, which needs no gradient"
        )
    every = []
    for number in range(scores.shape[1]):
        slopes = torch.autograd.grad(scores[0, number], of, retain_graph=True, allow_unused=True)
        every.append([torch.zeros_like(one) if slope is None else slope for slope, one in zip(slopes, of, strict=True)])
    return every
