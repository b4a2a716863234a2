"""One optimisation step of a TrainingStep under DeepSpeed, and its logged values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctclip.config import Config
from ctclip.data.batch import Batch
from ctclip.data.dataset import Tokenisers
from ctclip.distributed import mean_over_ranks, rank
from ctclip.errors import ConfigError
from ctclip.training import state
from ctclip.training.optimizer import deepspeed_config, micro_batches, parameter_groups, rate_factor
from ctclip.training.step import EncodedPart, Pairs, Part, TrainingStep, pairs_of, parts_of


class Engine:
    """A TrainingStep under DeepSpeed ZeRO. ``resumed`` is the state of a checkpoint, or empty.

    A step never waits for the device: values to log stay there until ``read``. (From ZeRO 1 on, DeepSpeed itself waits
    to check that the gradient norm is finite.)
    """

    def __init__(
        self,
        step: TrainingStep,
        config: Config,
        device: torch.device,
        resumed: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config.training
        self.seed = config.seed
        self.stage = config.training.zero.stage
        self.module = step
        self.device = device
        self.parts = micro_batches(config.training)
        step.bf16 = config.training.precision == "bf16"
        if self.parts > 1:
            check_two_pass(step.model.volume_encoder)
        if config.training.compile:
            step.model.volume_encoder.compile()
        if resumed:
            state.load_parameters(step, resumed)
        import deepspeed

        trained = sum(p.numel() for p in step.parameters() if p.requires_grad)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=step.to(device),
            model_parameters=parameter_groups(step, config.training),
            config=deepspeed_config(config.training, self.parts, trained),
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.unread: list[tuple[float, dict[str, Tensor]]] = []
        if resumed:
            state.load_moments(step, self.optimizer, self.stage, resumed)

    @property
    def tokenisers(self) -> Tokenisers:
        """The tokenisers for the reading processes."""
        words = self.module.words if self.module.reads_words else None
        return Tokenisers(self.module.model.text_encoder.tokenise, words, self.parts)

    def state(self) -> dict[str, Tensor]:
        """The content of a checkpoint, on rank 0. A collective operation."""
        return state.collect(self.module, self.optimizer, self.stage)

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters and buffers, under ``state/``, on rank 0. A collective operation at stage 3."""
        return state.parameters(self.module, self.stage)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Context in which every rank has the whole text side and temperature, for code that calls them directly."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        model = self.module.model
        parts = [*model.text_encoder.parameters(), *model.text_projection.parameters(), *model.similarity.parameters()]
        with deepspeed.zero.GatheredParameters(parts):
            yield

    def step(self, batch: Batch, number: int, steps: int) -> None:
        """Step ``number`` of ``steps`` on this rank's share of the global batch. Parameters stay unchanged if the
        gradient is not finite; ``read`` reports this."""
        # Dropout is a function of the step, so that a resumed run continues unchanged.
        torch.manual_seed(hash((self.seed, number, rank())) % 2**63)
        factor = rate_factor(number / steps, self.config.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.deepspeed.train()
        parts, pairs, progress = parts_of(batch, self.parts), pairs_of(batch), number / steps
        if self.parts == 1:
            loss, logged = self.deepspeed(parts[0], pairs, progress=progress)
            self.deepspeed.backward(loss)
        else:
            loss, logged = self._two_pass(parts, pairs, batch.views, progress)
        norm = self._guard() if self.stage == 0 else None
        self.deepspeed.step()
        self.module.model.volume_encoder.end_step()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        # Each rank has its own rows; logged values refer to the global batch.
        values = {"loss": loss.detach(), **logged, "gradient_norm": torch.as_tensor(math.nan if norm is None else norm)}
        self.unread.append((self.config.learning_rate * factor, values))

    def read(self) -> list[dict[str, float]]:
        """The values to log for each step since the last call: the loss and its parts, logit scale, gradient norm,
        learning rate. Waits for the device. A collective."""
        steps, self.unread = self.unread, []
        if not steps:
            return []
        names = list(steps[0][1])
        table = torch.stack([
            torch.stack([values[name].to(self.device, torch.float32).reshape(()) for name in names]) for _, values in steps
        ])  # fmt: skip
        rows = mean_over_ranks(table).tolist()
        logged = []
        for (learning_rate, _), row in zip(steps, rows, strict=True):
            values = dict(zip(names, row, strict=True)) | {"learning_rate": learning_rate}
            # DeepSpeed reports a non-finite norm as -1 or infinity.
            norm = values["gradient_norm"]
            logged.append(values | {"gradient_norm": norm if 0 <= norm < math.inf else math.nan})
        return logged

    def progress_at(self, steps: int) -> set[int]:
        """Steps at which another objective begins, so that the loss changes."""
        return {math.ceil(begin * steps) for begin in self.module.begins.values() if begin > 0}

    def _guard(self) -> Tensor:
        """Compute the norm of the gradients, which the backward pass has averaged over ranks. If it is not finite, a
        flag on the device makes the optimizer skip the update. Only for stage 0; from stage 1 on, DeepSpeed does
        both."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # The mechanism by which torch's GradScaler controls a fused optimizer.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        return norm

    def _two_pass(
        self, parts: list[Part], pairs: Pairs, views: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """GradCache (Gao et al. 2021): the exact gradient of a contrastive batch larger than memory.

        First compute all features without a graph, then the loss and its gradient with respect to the features, then
        each micro-batch again with a graph, through which that gradient is propagated.
        """
        with torch.no_grad():
            encoded = [self._features(part, progress) for part in parts]
        volumes = torch.cat([one.volumes for one in encoded]).float().requires_grad_()
        texts = torch.cat([one.texts for one in encoded]).float().requires_grad_()
        self.deepspeed.set_gradient_accumulation_boundary(False)
        loss, logged = self.deepspeed(None, pairs, (volumes, texts), progress)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        assert volumes.grad is not None
        assert texts.grad is not None
        size = len(volumes) // self.parts
        for index, part in enumerate(parts):
            self.deepspeed.set_gradient_accumulation_boundary(index == self.parts - 1)
            one: EncodedPart = self.deepspeed(part, progress=progress)
            rows = slice(index * size, (index + 1) * size)
            text_rows = slice(index * size * views, (index + 1) * size * views)
            surrogate = (one.volumes.float() * volumes.grad[rows]).sum()
            surrogate = surrogate + (one.texts.float() * texts.grad[text_rows]).sum()
            for name, value in one.losses.items():
                surrogate = surrogate + value / self.parts
                logged[name] = logged.get(name, torch.zeros_like(value)) + value.detach() / self.parts
                loss = loss + value.detach() / self.parts
            self.deepspeed.backward(surrogate, scale_wrt_gas=False)
        return loss, logged

    def _features(self, part: Part, progress: float) -> Any:
        """The features of a part, without the objectives on its tokens, which are computed in the second pass."""
        return self.deepspeed(Part(part.volumes, part.tokens, None, part.body), progress=progress)


def check_two_pass(encoder: nn.Module) -> None:
    """Raises ConfigError if the output of ``encoder`` for a volume depends on the other volumes of the batch."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            "training.micro_batch: two-pass gradients are exact only for encoders that see each volume alone, and this "
            "one has batch norm; leave micro_batch unset, or choose model.volume without it (stages=[]; norm=group)"
        )
