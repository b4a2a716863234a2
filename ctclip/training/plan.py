"""Estimate the needs of a run: bytes per rank for each ZeRO stage, the batch that fits, time per epoch.

Activations are counted: a step is traced forward and backward on tensors with shapes but no data, and its peak memory
is added up; floating-point operations are counted in the same way. Bytes are those of tensors
(``torch.cuda.max_memory_allocated``), without the workspaces of cuDNN; ``describe`` states the other memory of a
process.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctclip.config import Config
from ctclip.labels import load_labels
from ctclip.models import by_hand
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.encoded import Encoded
from ctclip.models.text import train_tokenizer
from ctclip.objectives.objective import Context, columns_needed
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.training.engine import check_two_pass
from ctclip.training.optimizer import piece_size
from ctclip.training.run_model import run_prompts
from ctclip.training.step import TrainingStep

GIB = 2**30
# Memory (GiB) and dense bf16 rate (TFLOP/s) of GPUs, from their data sheets; "cpu" is measured on request.
CARDS = {"a10": (24, 125), "rtx4090": (24, 165), "a100-40": (40, 312), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989)}  # fmt: skip
# Fraction of the data sheet's rate that the recipes in configs/ reach, measured on an H100 (vit3d, and the encoder of
# ctvit) and an H200 (resnet3d in float32, an underestimate); an intermediate value for others.
UTILISATION = {"vit3d": 0.177, "resnet3d": 0.029, "ctvit": 0.025}
OTHERWISE = 0.03
# Memory of the CUDA context, cuBLAS and NCCL before the first tensor.
CONTEXT = 1.5 * GIB
REPORT_TOKENS = 256
# Measured by tests/benchmarks/card.py.
MEASURED = "on an H100 ct_rate_vit3d_base took 5 % less than is stated here"
# Memory on a CPU that the estimate leaves out, measured by tests/benchmarks/training.py.
PROCESS = (
    "beside them a process holds Python and its libraries (some 0.7 GiB), and memory that was freed: some 40 % more"
)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank at one ZeRO stage, without activations."""

    stage: int
    parameters: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def held(self) -> float:
        """Bytes held all the time. At stage 3, DeepSpeed also reserves memory for gradients."""
        return self.states - (self.gradients if self.stage < 3 else 0.0)

    def peak(self, activations: float, in_parts: bool = False) -> float:
        """Peak bytes. Gradients are allocated while activations are freed; the gradients of the first micro-batch are
        kept for the second."""
        return self.states + activations if in_parts else max(self.states, self.held + activations)


@dataclass(frozen=True)
class Plan:
    """The estimate, in bytes and floating-point operations."""

    volume_parameters: int
    text_parameters: int
    head_parameters: int
    stages: tuple[StageMemory, ...]
    activations: float
    """of each volume"""
    weights: float
    """bfloat16 copies of weights, which do not depend on the batch"""
    batch_volumes: float
    flops: float
    ranks: int

    def peak(self, stage: StageMemory, micro: int, share: int) -> float:
        """Bytes of a step that encodes ``micro`` of a rank's ``share`` of volumes at once."""
        return stage.peak(self.weights + micro * self.activations, micro < share) + share * self.batch_volumes

    def largest_share(self, stage: StageMemory, card_bytes: float) -> int:
        """Number of volumes that a rank can hold at once on a GPU."""
        room = card_bytes - CONTEXT
        if stage.peak(0.0) > room:
            return 0
        # peak() is constant while gradients need more memory than activations, and linear beyond.
        left = room - stage.held - self.weights
        return max(0, math.floor(left / (self.activations + self.batch_volumes)))

    def hours(self, volumes: int, flops_a_second: float) -> float:
        """Hours of one epoch over ``volumes`` scans on all ranks."""
        return volumes * self.flops / (flops_a_second * self.ranks) / 3600


def make_plan(config: Config, ranks: int, *, card: bool = True) -> Plan:
    """Estimate for the model and batch of ``config`` on ``ranks`` ranks, each on a GPU if ``card``, else on a CPU.
    Raises ConfigError if it cannot be trained."""
    spec = PreprocessingSpec.load(config.preprocessing)
    tokenizer = None
    if config.model.text.pretrained is None:
        words = config.model.text.vocabulary
        tokenizer = train_tokenizer([" ".join(f"word{number}" for number in range(words))], words)
    model = build_model(config.model, spec, tokenizer)
    if (config.training.micro_batch or config.training.batch) < config.training.batch // ranks:
        check_two_pass(model.volume_encoder)
    if config.training.text_warmup.locks:
        model.lock_text()
    labels = load_labels(config.labels or "ct_rate_18")
    step = TrainingStep(Context(model, labels, run_prompts(config, labels)), config.objectives)
    return plan_of(step, config, spec.shape, ranks, card=card)


def plan_of(step: TrainingStep, config: Config, shape: tuple[int, ...], ranks: int, *, card: bool = True) -> Plan:
    """Estimate for a step that has been built, on volumes of ``shape``."""
    sides = dict.fromkeys(("volume", "text", "head"), 0)
    for name, parameter in step.named_parameters():
        side = "head" if not name.startswith("model.") else "volume" if name.startswith("model.volume_") else "text"
        sides[side] += parameter.numel()
    count, trained = sum(sides.values()), sum(p.numel() for p in step.parameters() if p.requires_grad)
    views = config.data.views_per_volume
    with warnings.catch_warnings():
        # torch warns that some operations are slow in bfloat16 on a CPU, which does not matter for tracing.
        warnings.simplefilter("ignore", UserWarning)
        bf16 = config.training.precision == "bf16"
        one, two = (_most(step, shape, views, batch, bf16=bf16, card=card) for batch in (1, 2))
        flops = _flops(step, shape, views)
    return Plan(
        volume_parameters=sides["volume"],
        text_parameters=sides["text"],
        head_parameters=sides["head"],
        stages=tuple(stage_memory(stage, count, trained, ranks) for stage in range(4)),
        activations=float(two - one),
        weights=float(max(0, 2 * one - two)),
        batch_volumes=4.0 * math.prod(shape),
        flops=flops,
        ranks=ranks,
    )


def stage_memory(stage: int, parameters: int, trained: int, ranks: int) -> StageMemory:
    """Float32 masters, gradients and Adam's two moments: 16 bytes a parameter, of which ZeRO 1 shares the moments and a
    second copy of the masters it updates, ZeRO 2 the gradients too, ZeRO 3 everything (Rajbhandari et al. 2020).
    Buffers for communication come on top."""
    piece = 4.0 * piece_size(trained)
    return StageMemory(
        stage,
        parameters=4.0 * parameters / (ranks if stage == 3 else 1) + (4.0 * trained / ranks if stage else 0.0),
        gradients=4.0 * trained / (ranks if stage >= 2 else 1),
        optimizer=8.0 * trained / (ranks if stage >= 1 else 1),
        # Gradients waiting for reduction; at stage 3 also flattened gradients in transit and gathered parameters.
        buffers=piece * (4 if stage == 3 else 1 if stage else 0),
    )


def measured_flops_a_second() -> float:
    """Measured rate of float32 matrix products on this machine's CPU, in operations per second."""
    import time

    left, right = torch.randn(2, 1536, 1536)
    left @ right
    began = time.perf_counter()
    for _ in range(5):
        left @ right
    return 5 * 2 * 1536**3 / (time.perf_counter() - began)


def _ids(model: DualEncoder, texts: int, length: int) -> dict[str, Tensor]:
    # The last token of a vocabulary is an ordinary word; the first ones are special tokens.
    ids = torch.full((texts, length), model.text_encoder.bert.config.vocab_size - 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _report(model: DualEncoder, texts: int) -> Tensor:
    encoded: Tensor = model.text_encoder(**_ids(model, texts, min(REPORT_TOKENS, model.text_encoder.max_tokens)))
    return encoded


def _on_tokens(step: TrainingStep, encoded: Encoded) -> list[Tensor]:
    """The losses of objectives on tokens. Objectives that request columns of the store are not counted, because the
    shape of these columns is unknown."""
    if any(columns_needed(objective) for objective in step.objectives.values() if "tokens" in objective.needs):  # type: ignore[arg-type, operator]
        return []
    words = _ids(step.model, len(encoded.tokens), step.longest) if step.reads_words else None
    return list(step.token_losses(encoded, words, {}).values())


def _most(step: TrainingStep, shape: tuple[int, ...], views: int, batch: int, *, bf16: bool, card: bool) -> int:
    """Peak bytes of a step on ``batch`` volumes, without parameters and their gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    step.train()
    encoder = step.model.volume_encoder
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _converted(encoder, mode):
        for parameter in encoder.parameters():
            if parameter.requires_grad:  # counted by stage_memory
                parameter.register_post_accumulate_grad_hook(lambda learned: setattr(learned, "grad", None))
        volumes = torch.zeros(batch, 1, *shape)
        with Live() as live:
            with _precisions(bf16=bf16, card=card):
                encoded = encoder(volumes)
            kept = live.now
            (encoded.pooled.float().sum() + encoded.tokens.float().sum()).backward()
    # BERT inspects its mask, so it needs data; a report is small enough to run.
    text, _ = _saved(lambda: _report(step.model, batch * views), step, bf16)
    seen = encoded._replace(tokens=torch.ones(encoded.tokens.shape, dtype=encoded.tokens.dtype), real=None)
    words, _ = _saved(lambda: _on_tokens(step, seen), step, bf16)
    # Texts are encoded after volumes, and their activations are freed before the backward pass of the volumes.
    return max(live.most, kept + text + words)


class Live(TorchDispatchMode):
    """Bytes of the tensors created inside the context that are still alive: ``now``, and at the peak (``most``)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, count: int) -> None:
        self.now -= count


class _Exactly(TorchFunctionMode):
    """Operations that autocast runs in float32 on a GPU, but leaves unchanged on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, F.group_norm):
            args = [given.float() if isinstance(given, Tensor) else given for given in args]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _precisions(*, bf16: bool, card: bool) -> Iterator[None]:
    """Context for operations on tensors without data, with the precisions of autocast on a GPU or a CPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bf16))
        if card:
            stack.enter_context(by_hand.switched_off())
        if card and bf16:
            stack.enter_context(_Exactly())
        yield


def _saved(forward: Callable[[], Any], module: nn.Module, bf16: bool) -> tuple[int, Any]:
    """Bytes saved for the backward pass, without the parameters of ``module``, and the result of ``forward``."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # Kept alive until the end, because the id of a freed storage may be reused.
        output = forward()
    return sum(storage.nbytes() for storage in kept.values()), output


@contextlib.contextmanager
def _converted(model: nn.Module, mode: Any) -> Iterator[None]:
    """Replace the module's tensors by tensors without data for the duration of a block."""
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


def _flops(step: TrainingStep, shape: tuple[int, ...], views: int) -> float:
    """Operations of a training step on one volume, forward and backward, counted by torch."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    encoder = step.model.volume_encoder
    # Run attention as matrix products, because torch does not count the fused CPU kernel.
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        with by_hand.switched_off(), FakeTensorMode(allow_non_fake_inputs=True) as mode, _converted(encoder, mode):
            encoded = encoder(torch.zeros(1, 1, *shape))
            (encoded.pooled.sum() + encoded.tokens.sum()).backward()
        tokens = torch.ones(encoded.tokens.shape, requires_grad=True)
        read = sum(_on_tokens(step, encoded._replace(tokens=tokens, real=None)), _report(step.model, views).sum())
        if read.requires_grad:  # a locked text side has no backward pass
            read.backward()
    step.zero_grad()
    return float(counter.get_total_flops())


def _convolution_backward(slope: Any, given: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Operations of a convolution's backward pass, from shapes: each gradient takes as many as the convolution. torch
    counts a depthwise convolution as a full one."""
    from torch.utils.flop_counter import conv_flop_count

    *_before, transposed, _padding, _groups, asked = rest
    count: int = conv_flop_count(given, weight, slope, transposed)
    return sum(asked[:2]) * count


def describe(config: Config, plan: Plan, card: str, volumes: int) -> str:
    """The plan as text for a terminal."""
    reached = UTILISATION.get(config.model.volume.kind, OTHERWISE)
    memory, rate = (CARDS[card][0] * GIB, CARDS[card][1] * 1e12 * reached) if card in CARDS else (_host(), measured_flops_a_second())  # fmt: skip
    share = config.training.batch // plan.ranks
    micro = min(share, config.training.micro_batch or share)
    lines = [
        f"{config.name} on {plan.ranks} x {card} ({memory / GIB:.0f} GiB), batch {config.training.batch} ({share} a rank)",
        f"parameters: {plan.volume_parameters / 1e6:.1f} M volume, {plan.text_parameters / 1e6:.1f} M text, "
        f"{plan.head_parameters / 1e6:.1f} M of objectives on words and labels",
        f"per volume: {plan.flops / 1e12:.3f} TFLOP to train on, {plan.activations / GIB:.3f} GiB of activations, "
        f"{plan.batch_volumes / GIB:.3f} GiB of voxels",
        "",
        "GiB of tensors per rank",
        "ZeRO  parameters  gradients  optimizer  buffers   states  with the batch  largest micro batch",
    ]
    for stage in plan.stages:
        parts = (stage.parameters, stage.gradients, stage.optimizer, stage.buffers, stage.states, plan.peak(stage, micro, share))  # fmt: skip
        columns = "  ".join(f"{part / GIB:{width}.3f}" for part, width in zip(parts, (10, 9, 9, 7, 7, 14), strict=True))
        mark = " <- configured" if stage.stage == config.training.zero.stage else ""
        lines.append(f"{stage.stage:<4}  {columns}  {plan.largest_share(stage, memory):>19}{mark}")
    lines.append(
        f"each GPU also holds about {CONTEXT / GIB:.1f} GiB of CUDA and NCCL, which the last column subtracts, and cuDNN workspaces, "
        f"which it does not: {MEASURED}"
        if card in CARDS
        else PROCESS
    )
    if config.training.zero.offload:
        moved = "optimizer and parameters" if config.training.zero.stage == 3 else "optimizer"
        lines.append(f"training.zero.offload moves {moved} to the host's memory; this is not subtracted here")
    seconds = 3600 * plan.hours(volumes, rate)
    source = (
        f"{reached:.1%} of the card's data sheet; try a few steps before a long run"
        if card in CARDS
        else "measured here, matrix products"
    )
    lines += [
        "",
        f"time: {_duration(seconds)} an epoch of {volumes} scans, {_duration(seconds * config.training.epochs)} for "
        f"{config.training.epochs:g} epochs, at {rate / 1e12:.2f} TFLOP/s per rank ({source}), without the time for reading",
    ]
    configured = plan.stages[config.training.zero.stage]
    if plan.largest_share(configured, memory) < micro:
        lines.append(
            "does not fit: raise zero.stage, set training.micro_batch (two-pass gradients), "
            "model.volume.activation_checkpointing=true, or use more ranks"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _host() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
