"""Fit the plan of a caption head to the findings that reports state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.heads.plan import NEVER, PARTS, Plan, side_shares

# Penalties on standardised features, relative to the mean cross-entropy; the best on held-out patients is chosen for
# each target.
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FOLDS = 5
# A side is stated only if at most this fraction of sides is wrong on held-out patients.
WRONG, FEWEST_SIDES, LEAST_SHARE = 0.03, 15, 0.5
# Minimum number of held-out reports that state a finding for it to get its own threshold.
FEWEST = 5
STEPS = 60


def fit_plan(names: Sequence[str], features: Tensor, stated: Tensor, patients: np.ndarray, seed: int = 0) -> Plan:
    """Fit a plan to ``features`` (n, D), ``stated`` (n, names, PARTS) of 0, 1 and NaN (not used), and ``patients``
    (n,).

    Each target's penalty, the threshold of each finding (the one with the largest F1) and the certainty required for
    its sides are chosen by cross-validation over patients; the weights are then fitted to all of them.
    """
    plan = Plan(names, features.shape[1])
    plan.mean, plan.spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    inputs, targets = (features - plan.mean) / plan.spread, stated.flatten(1)
    folds = torch.from_numpy(_folds(patients, seed))
    logits = torch.stack([_held_out(inputs, targets, folds, penalty) for penalty in PENALTIES])
    best = torch.stack([_losses(one, targets) for one in logits]).argmin(dim=0)
    seen = logits.gather(0, best[None, None].expand(1, len(inputs), -1))[0].unflatten(1, (len(names), PARTS))
    plan.thresholds = torch.tensor([_best_f1(seen[:, i, 0], stated[:, i, 0]) for i in range(len(names))])
    plan.certain = torch.tensor(_certain(seen, stated))
    weight, bias = _regression(inputs, targets, torch.tensor(PENALTIES)[best])
    with torch.no_grad():
        plan.linear.weight.copy_(weight)
        plan.linear.bias.copy_(bias)
    return plan.eval().requires_grad_(False)


def _folds(patients: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each volume (n,): those of its patient, or of the volume itself if there are fewer patients than
    folds."""
    people, person = np.unique(patients, return_inverse=True)
    if len(people) < FOLDS:
        return np.arange(len(patients)) % FOLDS
    fold: np.ndarray = np.random.default_rng([seed, 31]).permutation(len(people)) % FOLDS
    return fold[person]


def _held_out(inputs: Tensor, targets: Tensor, folds: Tensor, penalty: float) -> Tensor:
    """Logits (n, T), each by a regression that saw no volume of the same fold."""
    logits = torch.zeros_like(targets)
    for fold in folds.unique():
        held = folds == fold
        weight, bias = _regression(inputs[~held], targets[~held], torch.full((targets.shape[1],), penalty))
        logits[held] = inputs[held] @ weight.T + bias
    return logits


def _regression(inputs: Tensor, targets: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the logistic regressions of all targets at once: weight (T, D), bias (T,)."""
    weight = torch.zeros(targets.shape[1], inputs.shape[1], requires_grad=True)
    share = targets.nanmean(dim=0).nan_to_num(0.0).clamp(1e-4, 1 - 1e-4)
    bias = torch.logit(share).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _losses(inputs @ weight.T + bias, targets).sum() + (penalty[:, None] * weight.square()).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    return weight.detach(), bias.detach()


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each target over the volumes with a known target."""
    known = ~targets.isnan()
    every = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0.0), reduction="none") * known
    return every.sum(dim=0) / known.sum(dim=0).clamp(min=1)


def _best_f1(logits: Tensor, truth: Tensor) -> float:
    """The logit threshold with the largest F1; 0 (a probability of 0.5) for a finding that few held-out reports
    state."""
    known = ~truth.isnan()
    order = logits[known].argsort(descending=True)
    right = truth[known][order].cumsum(0)
    if not len(right) or right[-1] < FEWEST:
        return 0.0
    f1 = 2 * right / (torch.arange(1, len(right) + 1) + right[-1])
    return float(logits[known][order][f1.argmax()])


def _certain(logits: Tensor, stated: Tensor) -> list[float]:
    """For each finding, the smallest share of the likelier side above which that side is hardly ever wrong."""
    shares, best = side_shares(logits)
    certain = []
    for i in range(shares.shape[1]):
        sided = (stated[:, i, 0] == 1) & (stated[:, i, 1:].nansum(dim=1) == 1)
        share, right = shares[sided, i], best[sided, i] == stated[sided, i, 1:].argmax(dim=1)
        likely = share >= LEAST_SHARE
        least = least_certain(share[likely], right[likely])
        certain.append(NEVER if least is None else least)
    return certain


def least_certain(shares: Tensor, right: Tensor) -> float | None:
    """The smallest of the ``shares`` (n,) from which on hardly any side is wrong (``right`` (n,) bool); None if there is
    none."""
    order = shares.argsort(descending=True)
    number = torch.arange(1, len(order) + 1)
    wrong = (~right[order]).cumsum(0)
    fits = ((wrong <= WRONG * number) & (number >= FEWEST_SIDES)).nonzero()
    return float(shares[order][fits[-1]]) if len(fits) else None
