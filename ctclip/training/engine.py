"""DeepSpeed: from our configuration to an engine, and one optimisation step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctclip.config import Config, TrainingConfig
from ctclip.data.dataset import Batch
from ctclip.distributed import mean_over_ranks, rank, world_size
from ctclip.errors import ConfigError
from ctclip.models.ctvit import Codebook
from ctclip.training import state
from ctclip.training.step import ContrastiveStep


class Engine:
    """A ContrastiveStep under DeepSpeed ZeRO. ``resumed`` is the state of a checkpoint, or empty."""

    def __init__(
        self,
        step: ContrastiveStep,
        config: Config,
        device: torch.device,
        resumed: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config.training
        self.seed = config.seed
        self.labels_first = config.objectives.labels_first
        self.stage = config.training.zero.stage
        self.module = step
        self.device = device
        self.tokenise = step.model.text_encoder.tokenise
        self.chunks = _chunks(config.training)
        step.bf16 = config.training.precision == "bf16"
        if self.chunks > 1:
            check_two_pass(step.model.volume_encoder)
        if config.training.compile:
            step.model.volume_encoder.compile()
        if resumed:
            state.load_parameters(step, resumed)
        import deepspeed

        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=step.to(device),
            model_parameters=parameter_groups(step, config.training),
            config=deepspeed_config(
                config.training, self.chunks, sum(p.numel() for p in step.parameters() if p.requires_grad)
            ),
        )
        self.codebooks = [module for module in step.modules() if isinstance(module, Codebook)]
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        if resumed:
            state.load_moments(step, self.optimizer, self.stage, resumed)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, on rank 0. A collective."""
        return state.collect(self.module, self.optimizer, self.stage)

    def scale(self) -> Tensor:
        """The current inverse temperature. A collective at stage 3."""
        with self.gathered():
            return self.module.model.similarity.scale().detach().cpu().clone()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """The text side and the temperature whole on every rank, for code that calls them by themselves."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        model = self.module.model
        parts = [*model.text_encoder.parameters(), *model.text_projection.parameters(), *model.similarity.parameters()]
        with deepspeed.zero.GatheredParameters(parts):
            yield

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters and buffers, under ``state/``, on rank 0. A collective at stage 3."""
        return state.parameters(self.module, self.stage)

    def step(self, batch: Batch, number: int, steps: int) -> dict[str, float]:
        """Step ``number`` of ``steps`` on this rank's share of the global batch.

        Returns what to log: the loss and its parts, logit scale, gradient norm, learning rate.
        """
        # Dropout is a function of the step, so that a resumed run continues as if nothing had happened.
        torch.manual_seed(hash((self.seed, number, rank())) % 2**63)
        factor = rate_factor(number / steps, self.config.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.deepspeed.train()
        identities = {
            "scans": batch.scans,
            "text_identities": batch.text_identities,
            "labels": batch.labels,
            "labels_alone": number < self.labels_until(steps),
        }
        if self.chunks == 1:
            inputs = self._inputs(batch.volumes, batch.texts)
            loss, parts = self.deepspeed("step", **inputs, **identities)
            self.deepspeed.backward(loss)
        else:
            loss, parts = self._two_pass(batch, identities)
        norm = self._norm() if self.stage == 0 else None
        self.deepspeed.step()
        for codebook in self.codebooks:
            codebook.settle()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        # Each rank knows its rows; what is logged is of the global batch.
        values = torch.stack(
            [loss.detach().float().reshape(()), *(part.float().reshape(()) for part in parts.values())]
        )
        logged = dict(zip(("loss", *parts), mean_over_ranks(values).tolist(), strict=True))
        logged["learning_rate"] = self.config.learning_rate * factor
        # -1 is DeepSpeed's word for one that is not a number.
        return logged | {"gradient_norm": float(norm) if norm is not None and norm >= 0 else math.nan}

    def labels_until(self, steps: int) -> int:
        """The first of ``steps`` steps at which the objectives other than labels count."""
        return math.ceil(self.labels_first * steps)

    def _norm(self) -> Tensor:
        """Of the gradients that the backward pass has averaged over ranks: at stage 0 DeepSpeed clips, and keeps it to itself."""
        found = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(found)

    def _two_pass(self, batch: Batch, identities: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """GradCache (Gao et al. 2021): the exact gradient of a contrastive batch larger than memory.

        First all features without a graph, then the loss and its gradient at the features, then each chunk
        again with a graph, pulled back from that gradient.
        """
        views = len(batch.texts) // len(batch.volumes)
        size = len(batch.volumes) // self.chunks
        pieces = [
            self._inputs(batch.volumes[first : first + size], batch.texts[first * views : (first + size) * views])
            for first in range(0, len(batch.volumes), size)
        ]
        with torch.no_grad():
            encoded = [self.deepspeed("features", volumes=piece["volumes"], tokens=piece["tokens"]) for piece in pieces]
        volumes = torch.cat([pair[0] for pair in encoded]).float().requires_grad_()
        texts = torch.cat([pair[1] for pair in encoded]).float().requires_grad_()
        self.deepspeed.set_gradient_accumulation_boundary(False)
        loss, parts = self.deepspeed("loss", volume_features=volumes, text_features=texts, **identities)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        assert volumes.grad is not None
        assert texts.grad is not None
        for index, piece in enumerate(pieces):
            self.deepspeed.set_gradient_accumulation_boundary(index == self.chunks - 1)
            volume_features, text_features, read = self.deepspeed("features", **piece)
            rows = slice(index * size, (index + 1) * size)
            text_rows = slice(index * size * views, (index + 1) * size * views)
            surrogate = (volume_features.float() * volumes.grad[rows]).sum()
            surrogate = surrogate + (text_features.float() * texts.grad[text_rows]).sum()
            for name, part in read.items():
                surrogate = surrogate + part / self.chunks
                parts[name] = parts.get(name, 0.0) + part.detach() / self.chunks
                loss = loss + part.detach() / self.chunks
            self.deepspeed.backward(surrogate, scale_wrt_gas=False)
        return loss, parts

    def _inputs(self, volumes: Tensor, texts: list[str]) -> dict[str, Any]:
        tokens = {name: ids.to(self.device) for name, ids in self.tokenise(texts).items()}
        inputs: dict[str, Any] = {"volumes": volumes, "tokens": tokens}
        words = self.module.words(texts[:: len(texts) // len(volumes)])
        if words is not None:
            inputs["words"] = {name: ids.to(self.device) for name, ids in words.items()}
        return inputs


def check_two_pass(encoder: nn.Module) -> None:
    """Raises ConfigError if what ``encoder`` says of a volume depends on those beside it."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            "training.micro_batch: two-pass gradients are exact only for encoders that see each volume alone, and this "
            "one has batch norm; leave micro_batch unset, or choose model.volume without it (stages=[]; norm=group)"
        )


def rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero; ``progress`` in [0, 1)."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def parameter_groups(step: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Volume and text sides with their own rates; matrices decay, vectors and temperatures do not."""
    rates = {"volume": config.learning_rate, "text": config.text_learning_rate or config.learning_rate}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            side = "text" if ".text_" in f".{name}" else "volume"
            groups.setdefault((side, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "lr": rates[side], "weight_decay": config.weight_decay if decays else 0.0}
        for (side, decays), members in sorted(groups.items())
    ]


def piece_size(trained: int) -> int:
    """Elements that DeepSpeed reduces or gathers at once, of so many trained: a tenth of the model, 200 MB at most.

    Its own half a billion is a buffer of 2 GB on every card at stages 1 to 3 (4 GB at times), however small the model.
    """
    return max(1, min(trained // 10, 50_000_000))


def deepspeed_config(config: TrainingConfig, chunks: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for ``trained`` parameters; how many ranks there are is the launcher's business."""
    piece = piece_size(trained)
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": piece,
        # Gathered parameters are let go after use and gathered again for the backward pass: who chooses stage 3 wants
        # memory, and with DeepSpeed's own settings every parameter of a model below a billion stays on every card.
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
        "train_micro_batch_size_per_gpu": share // chunks,
        "gradient_accumulation_steps": chunks,
        "gradient_clipping": config.gradient_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": list(config.betas),
                "eps": 1e-6,
                "torch_adam": True,
            },
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "steps_per_print": 10**9,
    }


def _chunks(config: TrainingConfig) -> int:
    ranks = world_size()
    if config.batch % ranks:
        raise ConfigError(f"training.batch={config.batch} cannot be shared by {ranks} ranks: make it a multiple")
    share = config.batch // ranks
    micro = config.micro_batch or share
    if share % micro:
        raise ConfigError(f"training.micro_batch={micro} does not divide the {share} volumes of a rank")
    return share // micro
