"""Low-rank adapters (LoRA, Hu et al. 2021) for the frozen weights of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctclip import extras
from ctclip.errors import ConfigError


def add_lora(module: nn.Module, targets: Sequence[str], rank: int) -> None:
    """Add adapters of ``rank`` in place to every linear map (or convolution) of ``module`` whose name ends in one of
    ``targets``. Adapters are initialised to zero, so the output does not change. All other parameters are frozen.

    Raises ConfigError if ``module`` has none of the targets.
    """
    present = [name for name, _ in module.named_modules() if name.rpartition(".")[2] in targets]
    if not present:
        raise ConfigError(
            f"tuning=lora: {type(module).__name__} has no linear layer among {', '.join(targets) or 'its targets'}"
        )
    peft = extras.require("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def lora_layer(layer: nn.Module, rank: int) -> nn.Module:
    """Put adapters beside ``layer``, or beside each linear map of a sequence, as ``add_lora`` does inside a module."""
    holder = nn.ModuleDict({"layer": layer})
    linear = {name.rpartition(".")[2] for name, part in holder.named_modules() if isinstance(part, nn.Linear)}
    add_lora(holder, sorted(linear), rank)
    return holder["layer"]


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return "lora_" in name


def plain_name(name: str) -> str:
    """The name that a weight with an adapter has in a model without adapters."""
    return name.replace(".base_layer.", ".").replace(".base_model.model.", ".")


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of ``model`` with its adapters merged into the weights, under the names of a model without adapters;
    ``model`` itself is not changed."""
    weights = {
        plain_name(f"{name}.weight"): module.get_base_layer().weight + module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "get_base_layer")
    }
    state = {plain_name(name): value for name, value in model.state_dict().items() if not is_adapter(name)}
    return state | weights
