"""Collect whole parameters and optimizer moments from any ZeRO stage, and restore them.

Parameters are float32 masters at every stage (bf16 is autocast in the forward pass), so their values are loaded before
DeepSpeed wraps the module, and only Adam's moments are restored afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ctclip.distributed import is_main, rank, world_size
from ctclip.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def collect(module: nn.Module, optimizer: Any, stage: int) -> dict[str, torch.Tensor]:
    """Collect every parameter, buffer and moment, whole, on rank 0's CPU; other ranks get an empty result. A collective
    operation."""
    state = parameters(module, stage)
    _link(optimizer, stage)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        for moment in MOMENTS:
            value = _moment(parameter, optimizer, stage, moment)
            if value is not None and is_main():
                state[f"{moment}/{name}"] = _copied(value).contiguous()
    if is_main():
        state["optimizer_step"] = torch.tensor(_optimizer_step(optimizer))
    return state


def parameters(module: nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """Collect every parameter and buffer, whole, on rank 0's CPU, under ``state/``. A collective operation at stage
    3."""
    if stage < 3:
        return {f"state/{name}": _copied(value) for name, value in module.state_dict().items()} if is_main() else {}
    import deepspeed

    kept = set(module.state_dict())
    state = {f"state/{name}": _copied(value) for name, value in module.named_buffers() if name in kept}
    # Tied parameters (a decoder's input and output word vectors) are listed under each name, as in a state_dict.
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_main():
                state[f"state/{name}"] = _copied(parameter)
    return state if is_main() else {}


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def check_fits(module: nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """Raise CheckpointError unless ``state`` holds a tensor of the right shape for every parameter and buffer of
    ``module``, and nothing else. ``source`` is named in the error."""
    expected = {f"state/{name}": value.shape for name, value in module.state_dict().items()}
    given = {name: value.shape for name, value in state.items() if name.startswith("state/")}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong or "optimizer_step" not in state:
        name = wrong[0].removeprefix("state/") if wrong else "optimizer_step"
        raise CheckpointError(
            f"{source}: the checkpoint does not fit the run's configuration ({name}): it was written by another version or "
            f"for another model. Train in another --output"
        )


def load_parameters(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Restore parameters and buffers, before DeepSpeed wraps the module."""
    prefix = "state/"
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def load_moments(module: nn.Module, optimizer: Any, stage: int, state: dict[str, torch.Tensor]) -> None:
    """Restore Adam's moments and step count, after DeepSpeed has wrapped the module."""
    inner = getattr(optimizer, "optimizer", optimizer)
    step = float(state["optimizer_step"])
    # At stage 3, DeepSpeed gives Adam one flat piece at a time, and none between steps.
    flats = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else [p for g in inner.param_groups for p in g["params"]]
    )
    for flat in flats:
        # Adam creates these at its first step; after a restart they must exist to be restored.
        inner.state[flat] = {
            "step": torch.tensor(step, device=flat.device),
            **{name: torch.zeros_like(flat) for name in MOMENTS},
        }
    _link(optimizer, stage)
    for name, parameter in module.named_parameters():
        for moment in MOMENTS:
            value = state.get(f"{moment}/{name}")
            if value is not None:
                _set_moment(parameter, value.to(flats[0].device), optimizer, stage, moment)


def _set_moment(parameter: nn.Parameter, value: torch.Tensor, optimizer: Any, stage: int, name: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if stage == 0:
        optimizer.state[parameter][name].copy_(value)
    elif stage < 3:
        safe_set_full_optimizer_state(parameter, value, name)
    else:
        # Each rank holds an equal piece of each parameter; the last piece is padded.
        size = -(-value.numel() // world_size())
        padded = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank() * size :][:size], name)


def _link(optimizer: Any, stage: int) -> None:
    """Map each parameter to its moments in the flat tensors. DeepSpeed does so after the first parameter group's first
    step, when the moments of the other groups do not exist yet."""
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _moment(parameter: nn.Parameter, optimizer: Any, stage: int, name: str) -> torch.Tensor | None:
    if stage == 0:
        return optimizer.state.get(parameter, {}).get(name)
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, name)


def _optimizer_step(optimizer: Any) -> float:
    inner = getattr(optimizer, "optimizer", optimizer)
    return max((float(entry["step"]) for entry in inner.state.values() if "step" in entry), default=0.0)
