"""The second stage of training a locator: which cells of a volume are those that its report describes.

In the first stage every cell of a volume inherits the volume's target, though a finding fills few of them. Here the
locator itself chooses, in each volume, the cells that respond most to a sentence of the report, and, for a sentence
that the report does not state, the cells that respond wrongly. It is then trained by gradient descent to separate the
two, and chooses again: expectation-maximisation over instances (mi-SVM, Andrews et al. 2002; Zhang and Goldman 2001).
In a last round the cells are also weighted by how much the model's own match with the sentence depends on them
(``influence.py``), which finds what is too small for the first stage, such as calcifications. No masks or labels are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.adaptation.descent import descend
from ctclip.heads.locator import Locator
from ctclip.models.encoded import Level
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.training.optimizer import rate_factor

# Volumes per step of gradient descent, its learning rate, and the fraction of the steps in which it rises.
BATCH, RATE, WARMUP = 16, 2e-3, 0.05
# A sentence describes the cells that reach half of its highest value, but at least and at most these fractions of all.
FEWEST, MOST = 0.001, 0.015
# Cells kept of each volume: of each sentence that is stated, of each that is not, and further ones drawn at random.
STATED, UNSTATED, RANDOM = 32, 12, 64


@dataclass(frozen=True)
class Meanings:
    """Sentences grouped by meaning, and which volumes state them.

    ``group`` (q,): the meaning of each sentence; ``says`` (n, q) int8 as in ``Stated``; ``rate`` (groups,): the fraction
    of volumes that state each meaning.
    """

    group: np.ndarray
    says: np.ndarray
    rate: np.ndarray

    @classmethod
    def of(cls, sentences: Tensor, says: Tensor, same: float) -> Meanings:
        """Sentences (q, dim), unit vectors, most frequent first: each joins the first one whose cosine is at least
        ``same``, or begins a group."""
        alike = (sentences @ sentences.T >= same - 1e-4).numpy()
        group = np.full(len(sentences), -1)
        count = 0
        for number in range(len(sentences)):
            if group[number] < 0:
                group[alike[number] & (group < 0)] = count
                group[number] = count
                count += 1
        stated = says.numpy() == 1
        rate = np.array([stated[:, group == one].any(axis=1).mean() for one in range(count)])
        return cls(group, says.numpy(), rate)

    def draw(self, row: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Sentences that a volume states, one of each meaning, and about as many that it does not, drawn by how often
        other volumes state them, so that every meaning counts about equally as present and as absent."""
        says = self.says[row]
        present = [int(random.choice(np.flatnonzero((self.group == one) & (says == 1)))) for one in np.unique(self.group[says == 1])]  # fmt: skip
        # A meaning is absent if no sentence of it is stated or unclear.
        unclear = np.unique(self.group[says != 0])
        odds = self.rate / (1 - self.rate).clip(min=1e-3)
        odds[unclear] = 0.0
        absent = []
        if odds.sum() > 0:
            count = random.poisson(odds)
            absent = [int(random.choice(np.flatnonzero(self.group == one))) for one in np.flatnonzero(count)]
        return present, absent


@dataclass(frozen=True)
class Chosen:
    """Cells of one volume: ``parts`` (cells, C) float16 of each grid, ``position`` (cells, 3), ``queries`` (k,) numbers
    of sentences, ``described`` (cells, k) int8: 1 the sentence describes the cell, 0 it does not, -1 unknown."""

    parts: list[Tensor]
    position: Tensor
    queries: Tensor
    described: Tensor
    row: int


@torch.no_grad()
def choose(
    locator: Locator,
    levels: Sequence[Level],
    spec: PreprocessingSpec,
    sentences: Tensor,
    present: Sequence[int],
    absent: Sequence[int],
    row: int,
    random: np.random.Generator,
    influence: Tensor | None = None,
) -> Chosen | None:
    """Choose cells of one volume, with ``levels`` as in ``Locator.maps``, for sentences that its report states
    (``present``) and does not state (``absent``); None if there is no sentence or no real cell. ``influence`` (present,
    N) from 0 to 1: weights of the cells for the sentences that are stated."""
    queries = [*present, *absent]
    if not queries:
        return None
    values, cells = locator.maps(levels, spec, sentences[queries], centred=True)
    count = values.shape[1]
    if influence is not None:
        values = F.softplus(values)
        values[: len(present)] *= influence
    real = np.arange(count)
    if cells.real is not None:
        values = values.masked_fill(~cells.real[0].to(values.device), -math.inf)
        real = np.flatnonzero(cells.real[0].cpu())
    if not len(real):
        return None
    fewest, most = max(1, round(FEWEST * count)), max(1, round(MOST * count))
    order = values.topk(min(most, len(real)), dim=1)
    drawn = [torch.from_numpy(random.choice(real, min(RANDOM, len(real)), replace=False))]
    described = []
    for number in range(len(queries)):
        ranked = order.indices[number].cpu()
        if number < len(present):
            strong = int((order.values[number] >= order.values[number, 0] / 2).sum())
            ranked = ranked[: min(max(strong, fewest), len(ranked))]
            described.append(ranked)
            drawn.append(ranked[torch.from_numpy(random.permutation(len(ranked))[:STATED])])
        else:
            drawn.append(ranked[torch.from_numpy(random.permutation(min(len(ranked), 5 * UNSTATED))[:UNSTATED])])
    chosen = torch.cat(drawn).unique()
    target = torch.full((len(chosen), len(queries)), -1, dtype=torch.int8)
    target[:, len(present) :] = 0
    for number, ranked in enumerate(described):
        target[torch.isin(chosen, ranked), number] = 1
    parts = [level.features[0][within[chosen].to(level.features.device)].half().cpu() for level, within in zip(levels, cells.within, strict=True)]  # fmt: skip
    return Chosen(parts, cells.position[chosen], torch.tensor(queries), target, row)


def sharpen(
    locator: Locator, chosen: Sequence[Chosen], sentences: Tensor, held_out: np.ndarray, epochs: int, seed: int
) -> list[tuple[float, float]]:
    """Train all weights of a locator, in place, to tell the described cells from others; returns the loss of each epoch on
    training volumes and, after it, on those of ``held_out`` (n,) bool (NaN if there are none)."""
    train = [one for one in chosen if not held_out[one.row]]
    test = [one for one in chosen if held_out[one.row]]
    learned = [*locator.random, locator.offset, locator.weight, locator.bias]
    for tensor in learned:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=1e-4)
    random = np.random.default_rng([seed, 47])
    steps = epochs * math.ceil(len(train) / BATCH)
    losses, step = [], 0
    for _ in track(range(epochs), epochs, "sharpening", "epochs"):
        total = 0.0
        for members in _batched(random.permutation(len(train))):
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_factor(step / steps, WARMUP)
            loss = _loss(locator, [train[number] for number in members], sentences)
            total += descend(loss, learned, optimizer, "sharpening") * len(members)
            step += 1
        with torch.no_grad():
            held = [
                float(_loss(locator, test[first : first + BATCH], sentences)) for first in range(0, len(test), BATCH)
            ]
        losses.append((total / len(train), float(np.mean(held)) if held else math.nan))
    for tensor in learned:
        tensor.requires_grad_(False)
    locator.size["rounds"] += 1
    return losses


def _batched(order: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(order), BATCH):
        yield order[first : first + BATCH]


def _loss(locator: Locator, volumes: Sequence[Chosen], sentences: Tensor) -> Tensor:
    """Binary cross-entropy (nats): every sentence of every volume has the same weight, divided among its cells."""
    device = locator.weight.device
    parts = [torch.cat(parts).to(device) for parts in zip(*(one.parts for one in volumes), strict=True)]
    position = torch.cat([one.position for one in volumes]).to(device)
    output = locator.features(parts, position) @ locator.weight + locator.bias
    losses = []
    for one, own in zip(volumes, output.split([len(one.position) for one in volumes]), strict=True):
        target = one.described.to(device)
        known = target >= 0
        logits = own @ sentences[one.queries].to(device).T
        each = F.binary_cross_entropy_with_logits(logits, target.clamp(min=0).float(), reduction="none")
        losses.append((each * known).sum(dim=0) / known.sum(dim=0).clamp(min=1))
    return torch.cat(losses).mean()
