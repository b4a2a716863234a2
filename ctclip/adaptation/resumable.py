"""A single-process training loop that can be killed at any time: its state is written atomically, and every step seeds
its random numbers with its own number, so that a resumed run produces identical files."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ctclip.adaptation.descent import descend
from ctclip.adaptation.state import damaged, read_state, write_state
from ctclip.preprocessing.progress import track
from ctclip.training.optimizer import rate_factor

T = TypeVar("T")

SAVE_EVERY_SECONDS = 60.0
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Schedule:
    """Number of ``steps``; peak ``learning_rate`` of AdamW, which rises during the fraction ``warmup`` of the steps and
    then falls to 0 along a cosine; ``average``: decay of the moving average of the weights that is saved (Polyak &
    Juditsky 1992), 0 for the last weights."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.05
    average: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * rate_factor(step / self.steps, self.warmup)


def train_resumably(
    module: nn.Module,
    loss_of: Callable[[T], Tensor],
    examples: Callable[[int], Iterable[T]],
    schedule: Schedule,
    state: Path,
    *,
    key: str,
    seed: int,
    what: str,
) -> list[float]:
    """Train ``module`` in place and return the loss of each step.

    ``examples``: yields the batches from a given step; ``loss_of``: the loss of one batch, may use torch's random
    generator. ``state``: a file that is written every minute and at the end. A run with the same ``key`` resumes from
    it; a run with another key starts from the beginning. Raises CheckpointError if the file is damaged, and TrainingError
    if a loss is not a number.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    averaged = {name: value.detach().clone() for name, value in parameters.items()}
    losses = _resume(state, key, parameters, averaged, optimizer)
    begin, saved = len(losses), time.monotonic()
    module.train()
    todo = range(begin, schedule.steps)
    shown = track(zip(todo, examples(begin), strict=False), len(todo), what, "steps", lambda: _last(losses))
    for step, batch in shown:
        torch.manual_seed(_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(batch)
        losses.append(descend(loss, parameters.values(), optimizer, what, clip=1.0))
        # The average forgets quickly at first, when the weights change most.
        decay = min(schedule.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in parameters.items():
                averaged[name].lerp_(value, 1 - decay)
        if time.monotonic() - saved > SAVE_EVERY_SECONDS or step + 1 == schedule.steps:
            _save(state, key, parameters, averaged, optimizer, losses)
            saved = time.monotonic()
    if schedule.average:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(averaged[name])
    module.eval()
    return losses


def rows_of(step: int, count: int, batch: int, seed: int) -> np.ndarray:
    """The rows of a step. Each of the ``count`` rows occurs once per epoch, in an order that depends only on the seed
    and the epoch."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_order(int(place // count), count, seed)[place % count] for place in places])


@functools.lru_cache(maxsize=4)
def _order(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 47, epoch]).permutation(count)


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, 53, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _last(losses: list[float]) -> str:
    return f"loss {np.mean(losses[-50:]):.4f}" if losses else ""


def _save(
    path: Path,
    key: str,
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in averaged.items()}
    for moment in MOMENTS:
        # A parameter that has not been used in any step has no moments.
        there = {name: optimizer.state[value][moment] for name, value in parameters.items() if value in optimizer.state}
        tensors |= {f"{moment}.{name}": value for name, value in there.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    write_state(path, key, tensors)


def _resume(
    path: Path,
    key: str,
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """Load the state of this run; return the losses of its steps, empty if there is no state."""
    kept = read_state(path, key)
    if kept is None:
        return []
    tensors, _ = kept
    try:
        losses: list[float] = tensors["losses"].tolist()
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(tensors[f"weight.{name}"])
                averaged[name].copy_(tensors[f"average.{name}"])
                if f"{MOMENTS[0]}.{name}" in tensors:
                    moments = {moment: tensors[f"{moment}.{name}"].to(value) for moment in MOMENTS}
                    optimizer.state[value] = {"step": torch.tensor(float(len(losses))), **moments}
    except (KeyError, RuntimeError) as error:
        raise damaged(path) from error
    return losses
