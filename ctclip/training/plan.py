"""What a run will need before anyone pays for it: bytes a rank for each ZeRO stage, the batch that fits, time an epoch.

Activations are counted, not guessed: the forward pass is traced on tensors that have shapes but no data, and what
autograd would keep is added up; floating-point operations come from the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctclip.config import Config
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.text import train_tokenizer
from ctclip.training.step import ContrastiveStep
from preprocessing.spec import PreprocessingSpec

GIB = 2**30
# Memory (GiB) and dense bf16 rate (TFLOP/s) of cards, from their data sheets; "cpu" is measured when asked for.
CARDS = {"a10": (24, 125), "rtx4090": (24, 165), "a100-40": (40, 312), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989)}  # fmt: skip
# Share of the data sheet's rate that a 3-D transformer of this size reaches; a plan, not a promise.
UTILISATION = 0.35
# What the CUDA context, cuBLAS and NCCL hold before the first tensor.
CONTEXT = 1.5 * GIB
REPORT_TOKENS = 256


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank at one ZeRO stage, activations apart."""

    stage: int
    parameters: float
    gradients: float
    optimizer: float

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """The answer; bytes and floating-point operations."""

    volume_parameters: int
    text_parameters: int
    stages: tuple[StageMemory, ...]
    activations: float
    batch_volumes: float
    flops: float
    ranks: int

    def largest_share(self, stage: StageMemory, card_bytes: float) -> int:
        """Volumes a rank can hold at once on a card."""
        return max(0, math.floor((card_bytes - CONTEXT - stage.states) / (self.activations + self.batch_volumes)))

    def hours(self, volumes: int, flops_a_second: float) -> float:
        """Hours of one epoch over ``volumes`` scans on all ranks."""
        return volumes * self.flops / (flops_a_second * self.ranks) / 3600


def make_plan(config: Config, ranks: int) -> Plan:
    """Count for the model and batch of ``config`` on ``ranks`` ranks."""
    spec = PreprocessingSpec.load(config.preprocessing)
    tokenizer = train_tokenizer(["the lungs are clear"], 60) if config.model.text.pretrained is None else None
    model = build_model(config.model, tokenizer)
    step = ContrastiveStep(model, config.objectives, 18)
    trained = [p for p in step.parameters() if p.requires_grad]
    count, learned = sum(p.numel() for p in step.parameters()), sum(p.numel() for p in trained)
    volume_parameters = sum(p.numel() for n, p in model.named_parameters() if n.startswith("volume_"))
    views = config.data.views_per_volume
    bf16 = config.training.precision == "bf16"
    one = _kept(model, spec.shape, views, 1, bf16)
    two = _kept(model, spec.shape, views, 2, bf16)
    return Plan(
        volume_parameters=volume_parameters,
        text_parameters=count - volume_parameters,
        stages=tuple(stage_memory(s, count, learned, ranks) for s in range(4)),
        activations=float(two - one),
        batch_volumes=4.0 * math.prod(spec.shape),
        flops=_flops(model, spec.shape, views),
        ranks=ranks,
    )


def stage_memory(stage: int, parameters: int, trained: int, ranks: int) -> StageMemory:
    """Float32 masters, gradients and Adam's two moments: 16 bytes a parameter, of which ZeRO 1 shares the moments and a
    second copy of the masters it updates, ZeRO 2 the gradients too, ZeRO 3 everything (Rajbhandari et al. 2020)."""
    copies = 4.0 * trained / ranks if stage in (1, 2) else 0.0
    return StageMemory(
        stage,
        parameters=4.0 * parameters / (ranks if stage == 3 else 1) + copies,
        gradients=4.0 * trained / (ranks if stage >= 2 else 1),
        optimizer=8.0 * trained / (ranks if stage >= 1 else 1),
    )


def measured_flops_a_second() -> float:
    """Float32 matrix products of this machine's processor, operations a second."""
    import time

    left, right = torch.randn(2, 1536, 1536)
    left @ right
    began = time.perf_counter()
    for _ in range(5):
        left @ right
    return 5 * 2 * 1536**3 / (time.perf_counter() - began)


def _tokens(model: DualEncoder, texts: int) -> dict[str, Tensor]:
    ids = torch.ones(texts, min(REPORT_TOKENS, model.text_encoder.max_tokens), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _kept(model: DualEncoder, shape: tuple[int, ...], views: int, batch: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass, beside parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _converted(model.volume_encoder, mode):
        volume = _saved(lambda: model.volume_encoder(torch.zeros(batch, 1, *shape)).pooled, model.volume_encoder, bf16)
    # BERT looks at its mask, so it needs data; a report is small enough to run.
    text = _saved(lambda: model.text_encoder(**_tokens(model, batch * views)), model.text_encoder, bf16)
    return volume + text


def _saved(forward: Callable[[], Tensor], module: nn.Module, bf16: bool) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # Held until the end: a storage that is freed may give its number to the next.
        held = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del held
    return total


@contextmanager
def _converted(model: nn.Module, mode: Any) -> Iterator[None]:
    """The module's tensors as tensors without data, for the length of a block."""
    parameters = {name: p for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers()}
    convert = mode.from_tensor
    try:
        for name, parameter in parameters.items():
            _set(model, name, nn.Parameter(convert(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, buffer in buffers.items():
            _set(model, name, convert(buffer))
        yield
    finally:
        for name, tensor in (*parameters.items(), *buffers.items()):
            _set(model, name, tensor)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    held[leaf] = tensor


def _flops(model: DualEncoder, shape: tuple[int, ...], views: int) -> float:
    """Operations of one volume's training step: forward, and twice as many backward; once more where activations are
    computed again."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = model.volume_encoder.eval()
    encoder.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 1, *shape, device="meta"))
    with FlopCounterMode(display=False) as text_counter, torch.no_grad():
        model.text_encoder.eval()(**_tokens(model, views))
    again = 1 if getattr(model.config.volume, "activation_checkpointing", False) else 0
    return float(counter.get_total_flops() * (3 + again) + 3 * text_counter.get_total_flops())


def describe(config: Config, plan: Plan, card: str, volumes: int) -> str:
    """The plan as text for a terminal."""
    memory, rate = (CARDS[card][0] * GIB, CARDS[card][1] * 1e12 * UTILISATION) if card in CARDS else (_host(), measured_flops_a_second())  # fmt: skip
    share = config.training.batch // plan.ranks
    lines = [
        f"{config.name} on {plan.ranks} x {card} ({memory / GIB:.0f} GiB), batch {config.training.batch} ({share} a rank)",
        f"parameters: {plan.volume_parameters / 1e6:.1f} M volume, {plan.text_parameters / 1e6:.1f} M text",
        f"a volume: {plan.flops / 1e12:.3f} TFLOP to train on, {plan.activations / GIB:.3f} GiB of activations, "
        f"{plan.batch_volumes / GIB:.3f} GiB of voxels",
        "",
        "ZeRO  parameters  gradients  optimizer  states     with the batch  largest micro batch",
    ]
    for stage in plan.stages:
        held = min(share, config.training.micro_batch or share)
        total = stage.states + held * plan.activations + share * plan.batch_volumes
        mark = " <- configured" if stage.stage == config.training.zero.stage else ""
        lines.append(
            f"{stage.stage:<5} {_gib(stage.parameters)}   {_gib(stage.gradients)}  {_gib(stage.optimizer)}  "
            f"{_gib(stage.states)}  {_gib(total)}       {plan.largest_share(stage, memory):>6}{mark}"
        )
    seconds = 3600 * plan.hours(volumes, rate)
    source = f"{UTILISATION:.0%} of the card's data sheet" if card in CARDS else "measured here, matrix products"
    lines += [
        "",
        f"time: {_duration(seconds)} an epoch of {volumes} scans, {_duration(seconds * config.training.epochs)} for "
        f"{config.training.epochs:g} epochs, at {rate / 1e12:.2f} TFLOP/s a rank ({source}), reading not counted",
    ]
    configured = plan.stages[config.training.zero.stage]
    if plan.largest_share(configured, memory) < min(share, config.training.micro_batch or share):
        lines.append(
            "does not fit: raise zero.stage, set training.micro_batch (two-pass gradients), "
            "model.volume.activation_checkpointing=true, or take more ranks"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _gib(value: float) -> str:
    return f"{value / GIB:7.3f} GiB"


def _host() -> float:
    import psutil

    return float(psutil.virtual_memory().total)
