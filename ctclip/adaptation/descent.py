"""One step of training a head, which stops before weights are spoiled."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ctclip.errors import TrainingError


def descend(
    loss: Tensor, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer, what: str, clip: float = math.inf
) -> float:
    """Take a step of ``optimizer`` along the gradient of ``loss``, at most ``clip`` long; returns the loss. Raises
    TrainingError, and leaves the weights as they are, if the loss or its gradient is not a number."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), clip)
    value = float(loss.detach())
    if not math.isfinite(value + float(norm)):
        rate = optimizer.param_groups[0]["lr"]
        raise TrainingError(f"{what}: the loss or its gradient is not a number; set a learning rate below {rate:.2g}")
    optimizer.step()
    return value
