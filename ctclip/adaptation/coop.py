"""Learn prompt vectors from a few labels, on cached embeddings of volumes. Both encoders are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ctclip.adaptation.descent import descend
from ctclip.adaptation.probe import Probe
from ctclip.adaptation.shrinkage import ANCHORS, Towards, embedding_unit, fit_towards
from ctclip.errors import ConfigError
from ctclip.heads.contexts import Contexts, directions, with_vectors, word_embedding, word_vectors_of
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.text import TextEncoder
from ctclip.objectives.labels import multi_label
from ctclip.prompts import Pair, PromptSet
from ctclip.schema import Section

# Anchor weight of labels that keep their written prompts when contexts are shared.
STAY = 10 * max(anchor for anchor in ANCHORS if np.isfinite(anchor))


class CoopConfig(Section):
    """How prompts are learned."""

    contexts: Literal["class-specific", "unified"] = Field(
        "class-specific", description="class-specific: one context per label; unified: one context for all labels"
    )
    positive: str | None = Field(
        None, description="written prompt to start from, with {x} for the label's name; null: the prompts of the model"
    )
    negative: str | None = Field(None, description="written prompt for the absent finding, in the same form")
    vectors: int = Field(0, ge=0, le=64, description="start from this many random vectors instead of a written prompt")
    place: Literal["front", "middle", "after"] = Field(
        "front",
        description="position of random vectors: in front of the name, half on either side (middle), or after it",
    )
    steps: int = Field(50, ge=1)
    learning_rate: float = Field(
        0.1, gt=0, description="scale of random vectors, in standard deviations of the word vectors"
    )
    anchor: float | None = Field(
        None,
        ge=0,
        description="weight of staying close to the written prompts (KgCoOp, Yao et al. 2023); 0: none; null: chosen for each "
        "label by cross-validation among its patients",
    )

    @model_validator(mode="after")
    def _begins_with_one_thing(self) -> CoopConfig:
        if (self.positive is None) != (self.negative is None):
            raise ValueError("give both positive and negative, or neither")
        if self.positive is not None and self.vectors:
            raise ValueError("give either a written prompt (positive, negative) or vectors")
        for text in (self.positive, self.negative):
            if text is not None and "{x}" not in text:
                raise ValueError(f"the prompt {text!r} has no {{x}} for the label's name")
        if self.contexts == "unified" and self.positive is None and not self.vectors:
            raise ValueError(
                "contexts=unified starts from one prompt for all labels: give positive and negative with {x}, or vectors"
            )
        return self


def initial_contexts(
    model: DualEncoder, names: Sequence[str], prompts: PromptSet, config: CoopConfig, seed: int = 0
) -> Contexts:
    """The initial prompts: those of ``prompts`` for ``names``, a written prompt, or random vectors. Every word except
    the name is learned."""
    builder = _Builder(model.text_encoder, unified=config.contexts == "unified")
    if config.positive is not None and config.negative is not None:
        pair = Pair(positive={"findings": (config.positive,)}, negative={"findings": (config.negative,)})
        prompts = PromptSet(name="coop", templates=pair, sections=("findings",))
    random = np.random.default_rng([seed, 13])
    for label, name in enumerate(names):
        for side, stated in enumerate((True, False)):
            if config.vectors:
                builder.add_random(name, 2 * label + side, config.vectors, config.place, random)
                continue
            groups = prompts.groups(name, stated)
            for group in groups:
                for number, text in enumerate(group):
                    builder.add_written(text, name, 2 * label + side, 1 / (len(groups) * len(group)), number)
    return builder.contexts()


class _Builder:
    """Collects prompts as rows of tokens, slots and initial vectors."""

    def __init__(self, encoder: TextEncoder, *, unified: bool) -> None:
        self.encoder, self.unified = encoder, unified
        self.room = encoder.max_tokens - encoder.reading.around
        self.rows: list[tuple[list[int], list[int]]] = []
        self.sides: list[int] = []
        self.weights: list[float] = []
        self.vectors: list[Tensor] = []
        self.known: dict[tuple[object, ...], int] = {}

    def add_written(self, text: str, name: str, side: int, weight: float, number: int) -> None:
        ids, of_name = _tokens(self.encoder.tokenizer, text, name)
        ids, of_name = ids[: self.room], of_name[: self.room]
        vectors = word_vectors_of(
            self.encoder.bert, torch.tensor(ids, device=word_embedding(self.encoder.bert).weight.device)
        )
        slots, before = [], 0
        for token, inside, vector in zip(ids, of_name, vectors, strict=True):
            key = (side % 2, number, before, token) if self.unified else (len(self.rows), before)
            slots.append(-1 if inside else self._slot(key, vector))
            before += not inside
        self._add(ids, slots, side, weight)

    def add_random(self, name: str, side: int, count: int, place: str, random: np.random.Generator) -> None:
        ids, _ = _tokens(self.encoder.tokenizer, name, name)
        ids = ids[: max(1, self.room - count)]
        words = word_embedding(self.encoder.bert).weight
        # Any token can be the placeholder of a vector; a token of the name is never padding.
        front = {"front": count, "middle": (count + 1) // 2, "after": 0}[place]
        slots = []
        for index in range(count):
            vector = torch.from_numpy(random.normal(0, float(words.detach().float().std()), words.shape[1])).float()
            slots.append(self._slot((side % 2, index) if self.unified else (side, index), vector.to(words.device)))
        tokens = [ids[0]] * front + ids + [ids[0]] * (count - front)
        self._add(tokens, [*slots[:front], *([-1] * len(ids)), *slots[front:]], side, 1.0)

    def _slot(self, key: tuple[object, ...], vector: Tensor) -> int:
        if key not in self.known:
            self.known[key] = len(self.vectors)
            self.vectors.append(vector)
        return self.known[key]

    def _add(self, ids: list[int], slots: list[int], side: int, weight: float) -> None:
        reading = self.encoder.reading
        ids = [*reading.prefix, *ids, *reading.suffix]
        self.rows.append((ids, [*([-1] * len(reading.prefix)), *slots, *([-1] * len(reading.suffix))]))
        self.sides.append(side)
        self.weights.append(weight)

    def contexts(self) -> Contexts:
        if not self.vectors:
            raise ConfigError(
                "nothing to learn: the prompts consist of the names alone; give vectors=8, or other prompts"
            )
        length = max(len(ids) for ids, _ in self.rows)
        padded = lambda values, filler: torch.tensor([row + [filler] * (length - len(row)) for row in values])  # noqa: E731
        ids = padded([ids for ids, _ in self.rows], self.encoder.reading.padding)
        mask = padded([[1] * len(ids) for ids, _ in self.rows], 0)
        slot = padded([slots for _, slots in self.rows], -1)
        device = self.vectors[0].device
        return Contexts(
            ids, mask, slot, torch.tensor(self.sides), torch.tensor(self.weights), torch.stack(self.vectors)
        ).to(device)


def _tokens(tokenizer: object, text: str, name: str) -> tuple[list[int], list[bool]]:
    """Token ids of ``text``, and whether each belongs to ``name``."""
    start = text.casefold().find(name.casefold())
    end = start + len(name) if start >= 0 else -1
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # type: ignore[operator]
        inside = [start < last and first < end and last > first for first, last in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), [start >= 0 and one for one in inside]
    parts = [(text, False)] if start < 0 else [(text[:start], False), (text[start:end], True), (text[end:], False)]
    ids: list[int] = []
    of_name: list[bool] = []
    for part, inside_name in parts:
        cut = tokenizer(part, add_special_tokens=False)["input_ids"] if part.strip() else []  # type: ignore[operator]
        ids += cut
        of_name += [inside_name] * len(cut)
    return ids, of_name


def fit_contexts(
    model: DualEncoder,
    contexts: Contexts,
    embeddings: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    config: CoopConfig,
    ensemble: str,
    *,
    written: np.ndarray | None = None,
    seed: int = 0,
) -> Contexts:
    """Fit contexts to ``labels`` (n, L) of 0, 1 and NaN (not used), by cross-entropy over the whole set.

    embeddings (n, dim): unit vectors of volumes, with patients (n,). written (L, dim): the directions of the written
    prompts to stay close to; None: those of ``contexts``. The model is not changed. The anchor of each label, and its
    bias during training, are those of ``fit_towards``, which solves the same problem for directions instead of words.
    """
    count = labels.shape[1]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            first = directions(model, contexts, count, ensemble)
        first = first if written is None else torch.from_numpy(written).to(first)
        towards = Towards(first.cpu().numpy(), float(model.similarity.scale().detach()))
        free = fit_towards(embeddings, labels, patients, towards, anchor=config.anchor, seed=seed)
        return _learn(model, contexts, embeddings, labels, config, ensemble, first, free)
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _learn(
    model: DualEncoder, contexts: Contexts, embeddings: np.ndarray, labels: np.ndarray, config: CoopConfig, ensemble: str,
    first: Tensor, free: Probe,
) -> Contexts:  # fmt: skip
    """Contexts after ``config.steps`` steps of Adam. A label that keeps its prompts (strength inf) contributes no
    cross-entropy and the strongest anchor: its own context does not move, a shared context moves less."""
    kept = np.isinf(free.strengths)
    labels = np.where(kept, np.nan, labels)
    if np.isnan(labels).all():
        return contexts
    seen = ~np.isnan(labels).all(axis=1)
    volumes = torch.from_numpy(embeddings[seen]).float().to(model.device)
    target = torch.from_numpy(labels[seen]).float().to(model.device)
    bias = torch.from_numpy(free.bias).float().to(model.device)
    # The cross-entropy is a mean over known labels, so the weight of the anchor decreases with their number.
    unit = (
        embedding_unit(embeddings)
        * float(model.similarity.scale().detach()) ** 2
        / (2 * float((~np.isnan(labels)).sum()))
    )
    held = torch.from_numpy(np.where(kept, STAY, free.strengths) * unit).to(first)
    spread = float(word_embedding(model.text_encoder.bert).weight.detach().float().std())
    moved = torch.zeros_like(contexts.vectors, requires_grad=True)
    optimizer = torch.optim.Adam([moved], lr=config.learning_rate)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        now = directions(model, with_vectors(contexts, contexts.vectors + spread * moved), len(first), ensemble)
        away = (now - first).square().sum(dim=1)
        loss = multi_label(model.logits(volumes, now) + bias, target) + (held * away).sum()
        descend(loss, [moved], optimizer, "contexts")
    return with_vectors(contexts, (contexts.vectors + spread * moved).detach())
