"""Parameter groups, learning rates, and DeepSpeed's configuration."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ctclip.config import TrainingConfig
from ctclip.distributed import world_size
from ctclip.errors import ConfigError
from ctclip.models.start import rate_factors
from ctclip.training.step import TrainingStep


def rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero; ``progress`` in [0, 1)."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def parameter_groups(step: TrainingStep, config: TrainingConfig) -> list[dict[str, Any]]:
    """Parameter groups of the volume and text sides with their own learning rates, which decrease towards the input
    with ``layer_decay``. Weight decay applies to matrices, not to vectors and temperatures."""
    rates = {"volume": config.learning_rate, "text": config.text_learning_rate or config.learning_rate}
    factors = rate_factors(step.model, config.layer_decay)
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            side = "text" if ".text_" in f".{name}" else "volume"
            key = side, factors.get(id(parameter), 1.0), parameter.ndim > 1
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError("there is nothing to train: training.freeze and model.text.tuning freeze every parameter")
    return [
        {"params": members, "lr": rates[side] * factor, "weight_decay": config.weight_decay if decays else 0.0}
        for (side, factor, decays), members in sorted(groups.items())
    ]


def piece_size(trained: int) -> int:
    """Number of elements that DeepSpeed reduces or gathers at once: a tenth of the trained parameters, at most 200 MB.

    DeepSpeed's default of half a billion is a buffer of 2 GB (at times 4 GB) on every GPU at stages 1 to 3, however
    small the model.
    """
    return max(1, min(trained // 10, 50_000_000))


def deepspeed_config(config: TrainingConfig, parts: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``trained`` parameters and ``parts`` micro-batches per rank. The launcher sets the
    number of ranks."""
    piece = piece_size(trained)
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": piece,
        # Release gathered parameters after use and gather them again for the backward pass, because stage 3 is chosen
        # to save memory. With DeepSpeed's defaults, all parameters of a model below a billion stay on every GPU.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": piece,
        "stage3_prefetch_bucket_size": piece,
    }
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    share = config.batch // world_size()
    return {
        "train_batch_size": config.batch,
        "train_micro_batch_size_per_gpu": share // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": config.gradient_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": list(config.betas),
                "eps": 1e-6,
                "torch_adam": True,
                # The fused optimizer uses one kernel for all parameters, and can skip an update by a flag on the device
                # (`guard`).
                "fused": True,
            },
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "steps_per_print": 10**9,
    }


def micro_batches(config: TrainingConfig) -> int:
    """Number of parts in which a rank encodes its share of the batch. Raises ConfigError if they are not of equal
    size."""
    ranks = world_size()
    if config.batch % ranks:
        raise ConfigError(f"training.batch={config.batch} is not a multiple of the {ranks} ranks")
    share = config.batch // ranks
    micro = config.micro_batch or share
    if share % micro:
        raise ConfigError(f"training.micro_batch={micro} does not divide the {share} volumes of a rank")
    return share // micro
