"""One training step as one module, so that ZeRO's hooks see every parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctclip import plugins
from ctclip.config import ObjectiveConfig
from ctclip.data.batch import Batch, Tokens
from ctclip.distributed import gather, rank
from ctclip.errors import ConfigError
from ctclip.models.encoded import Encoded
from ctclip.objectives.objective import GIVEN, Context, Features, Objective, columns_needed
from ctclip.objectives.siglip import SigLIP
from ctclip.objectives.text_queue import TextQueue
from ctclip.objectives.words import LONGEST


@dataclass(frozen=True)
class Part:
    """The volumes and texts encoded at once: a batch, or one of its micro-batches. ``columns``: columns of its volumes;
    None: compute only features, without objectives on tokens."""

    volumes: Tensor
    tokens: Tokens
    words: Tokens | None = None
    body: Tensor | None = None
    columns: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Pairs:
    """The inputs of the contrastive loss besides features: ``scans`` (b,), ``text_identities`` (b * views,) and columns
    of this rank."""

    scans: Tensor
    text_identities: Tensor
    columns: Mapping[str, Tensor]


@dataclass(frozen=True)
class EncodedPart:
    """Features of a part, (b, dim) and (b * views, dim), and the weighted losses of the objectives on its tokens."""

    volumes: Tensor
    texts: Tensor
    losses: dict[str, Tensor]


class TrainingStep(nn.Module):
    """The dual encoder with its objectives.

    Called with a part, it encodes the part; with features and pairs, it contrasts the features of all ranks; with a
    part and pairs, it does both. The loss of a rank covers its rows against the global batch; the mean over ranks is
    the loss.
    """

    def __init__(self, context: Context, objectives: Mapping[str, ObjectiveConfig]) -> None:
        super().__init__()
        model = context.model
        self.model = model
        self.weights = {name: section.weight for name, section in objectives.items()}
        self.begins = {name: section.begin for name, section in objectives.items()}
        self.sentences = context.sentences
        self.keys = {name: re.sub(r"\W", "_", name) for name in objectives}
        self.objectives = nn.ModuleDict()
        for name, section in objectives.items():
            self.objectives[self.keys[name]] = _built(name, section, context)
        size = max((objective.queue_size for objective in self._all().values()), default=0)
        self.queue = TextQueue(size, model.config.dim) if size else None
        # Parameters that no loss uses have no gradient and must not be in the optimizer.
        model.similarity.logit_bias.requires_grad_(any(isinstance(o, SigLIP) for o in self._all().values()))
        # Encoders run in bfloat16, losses never. Autocast is entered here and not around DeepSpeed's engine, which
        # disables an autocast that is not in its configuration.
        self.bf16 = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a batch that the objectives request."""
        names = (name for objective in self._all().values() for name in columns_needed(objective))
        return tuple(dict.fromkeys(names))

    @property
    def reads_words(self) -> bool:
        """Whether an objective needs the ids of whole reports."""
        return any("words" in objective.needs for objective in self._all().values())

    @property
    def longest(self) -> int:
        """Maximum number of ids of a whole report."""
        return min(LONGEST, self.model.text_encoder.max_tokens)

    def words(self, texts: Sequence[str]) -> Tokens:
        """Ids and mask of whole texts, for objectives on words."""
        return self.model.text_encoder.whole(texts, self.longest)

    def forward(
        self,
        part: Part | None = None,
        pairs: Pairs | None = None,
        features: tuple[Tensor, Tensor] | None = None,
        progress: float = 1.0,
    ) -> Any:
        """``progress``: fraction of the steps that are done, which determines the active objectives.

        Returns ``EncodedPart`` without ``pairs``, else the loss and the values to log.
        """
        if pairs is None:
            assert part is not None
            return self._encode(part, progress)
        if features is not None:
            return self._contrast(*features, pairs, progress)
        assert part is not None
        encoded = self._encode(part, progress)
        loss, parts = self._contrast(encoded.volumes, encoded.texts, pairs, progress)
        logged = parts | {name: value.detach() for name, value in encoded.losses.items()}
        return sum(encoded.losses.values(), loss), logged

    def _all(self) -> dict[str, Objective]:
        return {name: self.objectives[key] for name, key in self.keys.items()}  # type: ignore[misc]

    def _weight(self, name: str, progress: float) -> float:
        """The weight of an objective. It is 0 before the objective begins, instead of skipping it, because ZeRO needs a
        gradient for every parameter."""
        return self.weights[name] if progress >= self.begins[name] else 0.0

    def _encode(self, part: Part, progress: float) -> EncodedPart:
        device = part.volumes.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            encoded: Encoded = self.model.volume_encoder(part.volumes, None, part.body)
            losses = {}
            if part.columns is not None:
                losses = self.token_losses(encoded, part.words, part.columns, progress)
            volumes, texts = self.model.volume_projection(encoded.pooled), self.model.text_features(part.tokens)
        return EncodedPart(volumes, texts, losses)

    def token_losses(
        self, encoded: Encoded, words: Tokens | None, columns: Mapping[str, Tensor], progress: float = 1.0
    ) -> dict[str, Tensor]:
        """The weighted losses of the objectives on tokens, by name."""
        offered: dict[str, Any] = {"tokens": encoded, **columns}
        if words is not None:
            device = encoded.tokens.device
            offered["words"] = {name: ids.to(device, non_blocking=True) for name, ids in words.items()}
        losses: dict[str, Tensor] = {}
        for name, objective in self._all().items():
            if "tokens" in objective.needs:
                given = {need: offered[need] for need in objective.needs}
                losses[name] = self._weight(name, progress) * objective(**given)
        return losses

    def _contrast(
        self, volume_features: Tensor, text_features: Tensor, pairs: Pairs, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features and identities of this rank -> the loss of the global batch, and the values to log."""
        similarity, share = self.model.similarity, len(pairs.scans)
        features = Features(
            volumes=similarity.volume(gather(volume_features.float())),
            texts=similarity.text(gather(text_features.float())),
            scale=similarity.scale(),
            bias=similarity.logit_bias,
            scans=gather(pairs.scans),
            text_identities=gather(pairs.text_identities),
            rows=slice(rank() * share, (rank() + 1) * share),
        )
        offered: dict[str, Any] = {"features": features, "earlier_texts": None}
        if self.queue is not None:
            offered["earlier_texts"] = self.queue.earlier()
        parts: dict[str, Tensor] = {}
        for name, objective in self._all().items():
            if "tokens" in objective.needs:
                continue
            for need in columns_needed(objective):
                if need not in offered:
                    offered[need] = gather(_column(pairs.columns, need, name))
            given = {need: offered[need] for need in objective.needs}
            parts[name] = self._weight(name, progress) * objective(**given)
        if self.queue is not None and torch.is_grad_enabled():
            scans = features.scans.repeat_interleave(features.views)
            self.queue.append(features.texts.detach(), scans, features.text_identities)
        zero = features.volumes.new_zeros(())
        total = torch.stack([zero, *(part.reshape(()) for part in parts.values())]).sum()
        logged = {name: part.detach() for name, part in parts.items()}
        return total, logged | {"logit_scale": features.scale.detach()}


def parts_of(batch: Batch, count: int) -> list[Part]:
    """Split a batch into ``count`` micro-batches of equal size; its tokens are already split."""
    size = len(batch.volumes) // count
    parts = []
    for number in range(count):
        rows = slice(number * size, (number + 1) * size)
        parts.append(
            Part(
                batch.volumes[rows], batch.tokens[number], None if batch.words is None else batch.words[number],
                None if batch.body is None else batch.body[rows], {name: column[rows] for name, column in batch.columns.items()},
            )
        )  # fmt: skip
    return parts


def pairs_of(batch: Batch) -> Pairs:
    """The inputs of the contrastive loss of a batch besides features."""
    return Pairs(batch.scans, batch.text_identities, batch.columns)


def _built(name: str, section: ObjectiveConfig, context: Context) -> Objective:
    kind = plugins.find("objective", name)
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError(f"objectives: {name} is not an Objective (ctclip.objectives.objective)")
    objective: Objective = kind(section, context)
    if ("tokens" in objective.needs) == ("features" in objective.needs):
        raise ConfigError(
            f"objectives.{name}: an objective needs either features or tokens, its `needs` are {objective.needs}"
        )
    return objective


def _column(columns: Mapping[str, Tensor], need: str, name: str) -> Tensor:
    if need not in columns:
        raise ConfigError(f"objectives.{name} needs {need!r}: the batch has {', '.join((*GIVEN, *columns))}")
    return columns[need]
