"""Training steps of the recipes against their plan, and encoders at full size, on a GPU: ``python -m
tests.benchmarks.card``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctclip import distributed
from ctclip.models import by_hand
from ctclip.models.ctvit import CTViT, CTViTConfig
from ctclip.models.vit3d import ViT3D
from ctclip.training.engine import Engine
from tests.benchmarks.common import apart, machine, table
from tests.benchmarks.training import median
from tests.benchmarks.vit3d import EQUAL, PUBLISHED, SPEC, products

HERE = "tests.benchmarks.card"
CT_RATE_SCANS = 24_128  # of its training split
# The share of the batch of one card, for each configuration in `configs/`: an eighth for recipes of 8 cards.
ON_A_CARD = {
    "phantom_tiny": (),
    "ct_rate_resnet18_labels": (),
    "ct_rate_vit3d_base": ("training.batch=32",),
    "ct_rate_ctvit": ("training.batch=8",),
}


def on_a_card(name: str, overrides: list[str], steps: int) -> dict[str, float]:
    """The estimate of `ctclip train --plan` for one card, and the measured memory and time of steps on random volumes."""
    from ctclip.config_files import load_config
    from ctclip.data.batch import Batch
    from ctclip.labels import load_labels
    from ctclip.models.dual_encoder import build_model
    from ctclip.models.encoded import axis_shape
    from ctclip.models.text import train_tokenizer
    from ctclip.objectives.objective import Context
    from ctclip.preprocessing.spec import PreprocessingSpec
    from ctclip.training.plan import make_plan
    from ctclip.training.run_model import run_prompts
    from ctclip.training.step import TrainingStep

    config, random = load_config(name, overrides), torch.Generator().manual_seed(0)
    plan, batch = make_plan(config, 1), config.training.batch
    spec = PreprocessingSpec.load(config.preprocessing)
    words = [f"word{number}" for number in range(config.model.text.vocabulary)]
    # 20 sentences of 12 words: with full stops, the 256 tokens that the plan assumes, or more if sentences are read one
    # by one.
    drawn = torch.randint(len(words), (batch * config.data.views_per_volume, 20, 12), generator=random).tolist()
    texts = [" ".join(" ".join(words[word] for word in line) + "." for line in text) for text in drawn]
    with distributed.process_group() as device:
        model = build_model(config.model, spec, train_tokenizer([" ".join(words)], len(words)))
        if config.training.text_warmup.locks:
            model.lock_text()
        labels, views = load_labels("ct_rate_18"), config.data.views_per_volume
        context = Context(model, labels, run_prompts(config, labels))
        engine = Engine(TrainingStep(context, config.objectives), config, device)
        of_a_part = len(texts) // engine.parts
        parts = [texts[first : first + of_a_part] for first in range(0, len(texts), of_a_part)]
        words = engine.tokenisers.words
        columns = {}
        if config.reads("labels"):
            columns["labels"] = torch.randint(2, (batch, len(labels.names)), generator=random).float().to(device)
        numbers, body = torch.arange(batch, device=device), model.volume_encoder.body_tokens()
        volumes = torch.rand(batch, 1, *axis_shape(spec), device=device) * 2 - 1
        data = Batch(
            volumes, [engine.tokenisers.texts(part) for part in parts], numbers, numbers.repeat_interleave(views),
            words=None if words is None else [words(part[::views]) for part in parts],
            body=None if body is None else torch.from_numpy(body.of_volumes(volumes)), columns=columns,
        )  # fmt: skip

        def step() -> None:
            # Reading the loss waits for the card.
            engine.step(data, 0, 100)
            engine.read()

        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
        seconds = median(step, steps)
        measured = torch.cuda.max_memory_allocated()
    micro = config.training.micro_batch or batch
    return {
        "batch": batch, "micro": micro, "seconds": seconds, "measured": measured / 2**30,
        "planned": plan.peak(plan.stages[config.training.zero.stage], micro, batch) / 2**30,
        "flops": batch * plan.flops, "bf16": float(config.training.precision == "bf16"),
    }  # fmt: skip


def training_table(steps: int) -> str:
    """Steps of the configurations on this card. Operations are those that the plan counts, without recomputation."""
    rows = []
    for name, overrides in ON_A_CARD.items():
        try:
            found = apart(HERE, "on_a_card", name, overrides, steps, card=True)
        except RuntimeError as error:
            rows.append([name, str(error).strip().splitlines()[-1]])
            continue
        rows.append([
            name, f"{found['batch']:.0f} ({found['micro']:.0f})", "bf16" if found["bf16"] else "fp32", f"{found['measured']:.2f}", f"{found['planned']:.2f}",
            f"{found['planned'] / found['measured'] - 1:+.0%}", f"{found['seconds']:.3f}", f"{found['batch'] / found['seconds']:,.0f}",
            f"{found['flops'] / found['seconds'] / 1e12:.1f}", f"{CT_RATE_SCANS * found['seconds'] / found['batch'] / 3600:.2f}",
        ])  # fmt: skip
    return table("Training steps on one card, voxels on it already", ["configuration", "batch (at once)", "precision", "GiB at most", "`--plan`", "off by", "seconds a step", "volumes a second", "TFLOP/s", f"hours an epoch of {CT_RATE_SCANS:,} scans"], rows)  # fmt: skip


def encoders_table() -> str:
    """bfloat16 with fused attention: tokens per second, fraction of the card's measured rate, largest batch."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 20 * 2 * 8192**3 / _cuda_seconds(lambda: [a @ a for _ in range(20)])
    rows, costs = [], {}
    for kind, encoder in (
        ("ctvit", CTViT(CTViTConfig(), SPEC)),
        ("vit3d", ViT3D(EQUAL.model_copy(update={"drop_air": False}), SPEC)),
        (
            "vit3d large",
            ViT3D(EQUAL.model_copy(update={"drop_air": False, "width": 1024, "heads": 16, "depth": 24}), SPEC),
        ),
    ):
        encoder.cuda().train()
        batch, best = 1, (0.0, 0.0, 0)
        while True:
            try:
                best = max(best, (*_gpu_rates(encoder, batch), batch), key=lambda found: found[2])
            except torch.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
            batch *= 2
        costs[kind] = costliest(lambda encoder=encoder: _step(encoder, _volume(1)))
        rows.append([kind, f"{best[0]:,.0f}", f"{best[1] / 1e12:.0f}", f"{100 * best[1] / rate:.0f} %", str(best[2])])
        encoder.cpu()
    said = "\n".join(f"{kind}, one volume: {cost}" for kind, cost in costs.items())
    title = f"Forward and backward in bfloat16, full size; matrix products of 8192 x 8192: {rate / 1e12:.0f} TFLOP/s"
    return table(title, ["", "tokens/s", "TFLOP/s", "of the card's rate (bar 40 %)", "largest batch (powers of 2)"], rows) + "\n" + said  # fmt: skip


def depthwise_table() -> str:
    """ctvit's depthwise convolution in bfloat16: PyTorch's 3-D kernel, and the 2-D convolutions used instead on a GPU."""
    cells = torch.randn(4, 24, 24, 24, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn_like(cells)
    convolution = nn.Conv3d(512, 512, 3, groups=512, device="cuda", dtype=torch.bfloat16)
    given = (cells, convolution.weight, convolution.bias)
    rows = []
    for name, way in (("3-D kernel", by_hand._convolve), ("planes", by_hand._by_planes)):
        forward = _cuda_seconds(lambda way=way: way(*given))
        both = _cuda_seconds(lambda way=way: torch.autograd.grad(way(*given), given, slope))
        rows.append([name, f"{1000 * forward:.2f}", f"{1000 * both:.2f}"])
    return table("Depthwise convolution, 4 x 24 x 24 x 24 cells of 512 channels", ["", "forward, ms", "forward and backward, ms"], rows)  # fmt: skip


def costliest(action: Any, shown: int = 6) -> str:
    """The operations that take most of the card's time, with their shares."""
    from torch.profiler import ProfilerActivity, profile

    action()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total for event in profiler.key_averages() if event.key.startswith("aten::")}  # fmt: skip
    whole = sum(spent.values()) or 1.0
    first = sorted(spent.items(), key=lambda item: -item[1])[:shown]
    return ", ".join(f"{name.removeprefix('aten::')} {time / whole:.0%}" for name, time in first)


def _volume(batch: int) -> Tensor:
    return torch.rand(batch, 1, *PUBLISHED, device="cuda") * 2 - 1


def _step(encoder: nn.Module, volume: Tensor) -> int:
    """Forward and backward pass in bfloat16; returns the number of tokens."""
    encoder.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        found = encoder(volume)
    found.pooled.float().square().mean().backward()
    return int(found.tokens.shape[0] * found.tokens.shape[1])


def _gpu_rates(encoder: nn.Module, batch: int) -> tuple[float, float]:
    """Tokens and operations per second."""
    volume = _volume(batch)
    operations = products(lambda: _step(encoder, volume))
    seconds = _cuda_seconds(lambda: _step(encoder, volume))
    return _step(encoder, volume) / seconds, operations / seconds


def _cuda_seconds(action: Any, times: int = 3) -> float:
    action()
    found = []
    for _ in range(times):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        action()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended) / 1000)
    return min(found)


def main() -> None:
    if not torch.cuda.is_available():
        print("There is no GPU: nothing was measured.")
        return
    print(f"{machine()}\n\n{training_table(8)}\n{encoders_table()}\n{depthwise_table()}", flush=True)


if __name__ == "__main__":
    main()
