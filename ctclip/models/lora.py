"""Low-rank adapters (LoRA, Hu et al. 2021) beside the weights of an encoder, which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ctclip import extras
from ctclip.errors import ConfigError


def add_lora(module: nn.Module, targets: Sequence[str], rank: int) -> None:
    """Put adapters of ``rank`` beside every linear map (or convolution) of ``module`` whose name ends in one of
    ``targets``, in place. Adapters begin at zero: the output does not change. Only they learn from then on.

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
        parameter.requires_grad_("lora_" in name)
