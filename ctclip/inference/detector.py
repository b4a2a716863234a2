"""Zero-shot detection: text embedded once for all volumes, a volume encoded once for all abnormalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.evaluation.calibration import Calibration
from ctclip.inference.prompts import PromptSet
from ctclip.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Scores:
    """Of a batch: probabilities and margins (B, abnormalities), values (B, graded findings), embeddings (B, dim)."""

    probabilities: Tensor
    margins: Tensor
    values: Tensor
    embeddings: Tensor


class Detector:
    """Scores abnormalities by the softmax over each one's positive and negative prompt."""

    def __init__(
        self,
        model: DualEncoder,
        prompts: PromptSet,
        abnormalities: Sequence[str] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.model = model
        self.abnormalities = tuple(abnormalities or prompts.names())
        self.positive, self.negative = pair_vectors(model, prompts, self.abnormalities)
        self.prompts = prompts.identity()
        self.calibration = calibration
        self.grades = list(prompts.graded.values())
        self.graded = tuple(f"{name} [{grade.unit}]" for name, grade in prompts.graded.items())
        self.ladders = [_ladder(model, grade.templates, grade.values) for grade in self.grades]

    @property
    def device(self) -> torch.device:
        return self.positive.device

    def identity(self) -> bytes:
        """Equal for detectors that score alike."""
        return (self.positive - self.negative).float().cpu().numpy().tobytes() + repr(self.calibration).encode()

    @torch.inference_mode()
    def margins(self, embeddings: Tensor) -> Tensor:
        """Unit volume embeddings (n, dim) -> (n, abnormalities): positive minus negative logit."""
        return self.model.logits(embeddings, self.positive - self.negative)

    def probabilities(self, margins: Tensor) -> Tensor:
        """(n, abnormalities) margins -> the softmax over each pair, calibrated where a calibration is known."""
        if self.calibration is None:
            return margins.sigmoid()
        slope, intercept = self.calibration.of(self.abnormalities)
        return (margins * torch.as_tensor(slope).to(margins) + torch.as_tensor(intercept).to(margins)).sigmoid()

    def thresholds(self) -> dict[str, float]:
        """Of the abnormalities that were calibrated: the probability at and above which the split's best call is yes."""
        lines = self.calibration.lines if self.calibration is not None else {}
        return {name: lines[name].threshold for name in self.abnormalities if name in lines}

    @torch.inference_mode()
    def graded_values(self, embeddings: Tensor) -> Tensor:
        """(n, dim) -> (n, graded findings): the mean of a finding's values, weighted by their prompts' softmax.

        EchoCLIP's regression by prompts (Christensen et al. 2024), with weights in place of its median.
        """
        columns = []
        for grade, ladder in zip(self.grades, self.ladders, strict=True):
            weights = self.model.logits(embeddings, ladder).softmax(dim=1)
            columns.append(weights @ torch.tensor(grade.values).to(weights))
        return torch.stack(columns, dim=1) if columns else embeddings.new_zeros(len(embeddings), 0)

    @torch.inference_mode()
    def detect(self, volumes: Tensor) -> Scores:
        """volumes (B, 1, D, H, W) in [-1, 1] -> Scores."""
        embeddings = self.model.encode_volume(volumes.to(self.device))
        margins = self.margins(embeddings)
        return Scores(self.probabilities(margins), margins, self.graded_values(embeddings), embeddings)


@torch.no_grad()
def pair_vectors(model: DualEncoder, prompts: PromptSet, abnormalities: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Positive and negative sides (abnormalities, dim): the mean of each side's phrasings, encoded together.

    It is made a unit vector for ``ensemble: embeddings``, and kept as long as it is for ``logits``, whose mean of dot
    products is the dot product with the mean. With ``average: section`` each section weighs alike, however many
    phrasings it has. A model that standardises its features gives both sides of a pair one length (``embeddings``; see
    ``DualEncoder.encode_prompts``).
    """
    shared = model.config.standardise and prompts.ensemble == "embeddings"
    encode = model.encode_prompts if shared else model.encode_text
    groups = [prompts.groups(name, positive) for positive in (True, False) for name in abnormalities]
    vectors = encode([text for sections in groups for texts in sections for text in texts])
    means, start = [], 0
    for sections in groups:
        parts = []
        for texts in sections:
            parts.append(vectors[start : start + len(texts)].mean(dim=0))
            start += len(texts)
        means.append(torch.stack(parts).mean(dim=0))
    positive, negative = torch.stack(means).split(len(abnormalities))
    if shared:
        length = (positive.norm(dim=-1, keepdim=True) + negative.norm(dim=-1, keepdim=True)) / 2
        return positive / length, negative / length
    if prompts.ensemble == "embeddings":
        return F.normalize(positive, dim=-1), F.normalize(negative, dim=-1)
    return positive, negative


@torch.inference_mode()
def _ladder(model: DualEncoder, templates: Sequence[str], values: Sequence[float]) -> Tensor:
    """(values, dim) unit vectors, one a value: the mean over templates."""
    texts = [template.replace("{value}", f"{value:g}") for value in values for template in templates]
    vectors = model.encode_text(texts)
    return F.normalize(vectors.unflatten(0, (len(values), len(templates))).mean(dim=1), dim=-1)
