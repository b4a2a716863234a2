"""Zero-shot detection with prompts. Texts are encoded once for all volumes, and each volume once for all findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.head import Head
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.prompts import PromptSet, load_prompts

NAMES = "names.yaml"


class PromptHead(Head):
    """Scores findings by the softmax over each one's positive and negative prompt (Radford et al. 2021, section
    3.1.4)."""

    kind = "prompts"

    def __init__(self, model: DualEncoder, prompts: PromptSet, names: Sequence[str] | None = None) -> None:
        """``names``: the findings, named in ``prompts`` or not. Default: those of ``prompts``."""
        super().__init__(model)
        self.prompts = prompts
        self.names = tuple(names or prompts.names())
        if not self.names:
            raise CheckpointError(f"the prompt set {prompts.name!r} names no finding; give the findings to look for")
        self.source = prompts.identity()
        self.positive, self.negative = pair_vectors(model, prompts, self.names)
        self.values_of = tuple(f"{name} [{grade.unit}]" for name, grade in prompts.graded.items())
        self.grades = list(prompts.graded.values())
        self.graded_vectors = [_graded_vectors(model, grade.templates, grade.values) for grade in self.grades]

    def score(self, encoded: Encoded) -> Tensor:
        """Positive minus negative logit."""
        return self.score_embeddings(_embedding(encoded))

    def score_embeddings(self, embeddings: Tensor) -> Tensor:
        """Unit vectors (n, dim) of volumes -> (n, names)."""
        return self.model.logits(embeddings, self.positive - self.negative)

    def texts(self) -> Tensor:
        return self.positive

    @torch.inference_mode()
    def values(self, encoded: Encoded) -> Tensor:
        """The mean of a finding's values, weighted by the softmax over their prompts: regression by prompts as in
        EchoCLIP (Christensen et al. 2024), with a weighted mean instead of the median."""
        embeddings = _embedding(encoded)
        columns = []
        for grade, vectors in zip(self.grades, self.graded_vectors, strict=True):
            weights = self.model.logits(embeddings, vectors).softmax(dim=1)
            columns.append(weights @ torch.tensor(grade.values).to(weights))
        return torch.stack(columns, dim=1) if columns else embeddings.new_zeros(len(embeddings), 0)

    def fingerprint(self, probe: Tensor) -> bytes:
        return (self.positive - self.negative).float().cpu().numpy().tobytes()

    def save(self, folder: Path) -> None:
        self.write(folder, self.prompts, self.names)

    @staticmethod
    def write(folder: Path, prompts: PromptSet, names: Sequence[str]) -> None:
        """Write what ``save`` writes, for a prompt set that has not been encoded."""
        values = prompts.model_dump(mode="json", exclude_defaults=True)
        for name, kept in (("prompts.yaml", values), (NAMES, list(names))):
            (folder / name).write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> PromptHead:
        names = read_names(folder) if (folder / NAMES).is_file() else None
        return cls(model, load_prompts(folder / "prompts.yaml"), names)


def read_names(folder: Path) -> list[str]:
    """The findings of a saved head with prompts, in its order. Raises CheckpointError."""
    path = folder / NAMES
    try:
        names = read_yaml(path)
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read; copy the model folder again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: expected a list of names; copy the model folder again")
    return names


def _embedding(encoded: Encoded) -> Tensor:
    if encoded.embedding is None:
        raise ValueError("these volumes were encoded without their embedding; call DualEncoder.encode")
    return encoded.embedding


@torch.no_grad()
def pair_vectors(
    model: DualEncoder,
    prompts: PromptSet,
    names: Sequence[str],
    encode: Callable[[Sequence[str]], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Positive and negative vectors (names, dim): the weighted mean of the phrasings of each side. All phrasings are
    encoded together.

    The mean is normalised for ``ensemble: embeddings``, but not for ``logits``, where the mean of dot products is the
    dot product with the mean. With ``average: section`` each section has the same weight, however many phrasings it
    has. A model that standardises its features gives both sides of a pair the same norm (``embeddings``; see
    ``DualEncoder.encode_prompts``). ``encode``: texts to unit vectors (n, dim), in place of the model's own.
    """
    shared = encode is None and shares_length(model, prompts.ensemble)
    if encode is None:
        encode = model.encode_prompts if shared else model.encode_text
    sides = [(name, positive) for positive in (True, False) for name in names]
    groups = [prompts.groups(*side) for side in sides]
    weights = [prompts.weights(*side) for side in sides]
    vectors = encode([text for sections in groups for texts in sections for text in texts])
    means, start = [], 0
    for sections, shares in zip(groups, weights, strict=True):
        parts = []
        for texts, share in zip(sections, shares, strict=True):
            part = vectors[start : start + len(texts)]
            each = torch.tensor(share).to(vectors)
            parts.append(part.mean(dim=0) if len(set(share)) == 1 else each @ part / each.sum())
            start += len(texts)
        means.append(torch.stack(parts).mean(dim=0))
    positive, negative = torch.stack(means).split(len(names))
    return unit_pair(positive, negative, prompts.ensemble, shared=shared)


def shares_length(model: DualEncoder, ensemble: str) -> bool:
    """Whether the two sides of a pair get the same norm, see ``pair_vectors``."""
    return model.config.standardise and ensemble == "embeddings"


def unit_pair(positive: Tensor, negative: Tensor, ensemble: str, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Means of each side's phrasings (names, dim) -> the two sides as ``pair_vectors`` returns them."""
    if shared:
        length = (positive.norm(dim=-1, keepdim=True) + negative.norm(dim=-1, keepdim=True)) / 2
        return positive / length, negative / length
    if ensemble == "embeddings":
        return F.normalize(positive, dim=-1), F.normalize(negative, dim=-1)
    return positive, negative


@torch.inference_mode()
def _graded_vectors(model: DualEncoder, templates: Sequence[str], values: Sequence[float]) -> Tensor:
    """Unit vectors (values, dim), one per value, each the mean over templates."""
    texts = [template.replace("{value}", f"{value:g}") for value in values for template in templates]
    vectors = model.encode_text(texts)
    return F.normalize(vectors.unflatten(0, (len(values), len(templates))).mean(dim=1), dim=-1)
