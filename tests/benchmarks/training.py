"""The engine: overhead, scaling, bytes sent, checkpoints, waiting, memory: ``python -m tests.benchmarks.training``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from ctclip import distributed
from ctclip.training.engine import Engine
from tests.benchmarks.common import apart, machine, peak_gb, table

MODEL = {
    "dim": 64, "standardise": True,
    "volume": {"kind": "vit3d", "spacing": [4.5, 3.2, 3.2], "patch": [4, 4, 4], "stages": [[32, 1], [96, 1]], "width": 192, "depth": 1,
               "heads": 6, "registers": 2, "windows": [[-1000, 1000], [-160, 240]], "pooling": ["mean", "max"]},
    "text": {"width": 128, "depth": 2, "heads": 4, "max_tokens": 64},
}  # fmt: skip
SHAPE = (64, 80, 112)
HERE = "tests.benchmarks.training"
# Where memory is measured: what is freed goes back at once, or the C library would keep half as much again of a step.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TEXTS = [
    "There is a large pleural effusion on the left.",
    "No nodule is seen.",
    "The heart is enlarged.",
    "Mild emphysema.",
]


def build(batch: int, stage: int = 1) -> tuple[Any, Any, Any]:
    """Configuration, step module and one rank's batch on fixed data."""
    from ctclip.config import Config
    from ctclip.data.dataset import Batch
    from ctclip.models.dual_encoder import build_model
    from ctclip.models.text import train_tokenizer
    from ctclip.training.step import ContrastiveStep

    config = Config.model_validate({"model": MODEL, "training": {"batch": batch, "zero": {"stage": stage}}})
    torch.manual_seed(0)
    step = ContrastiveStep(build_model(config.model, train_tokenizer(TEXTS * 4, 100)), config.objectives)
    share = batch // distributed.world_size()
    volumes = torch.rand(share, 1, *SHAPE) * 2 - 1
    texts = [f"{TEXTS[i % 4]} {i}" for i in range(share)]
    first = distributed.rank() * share
    return (
        config,
        step,
        Batch(volumes, texts, torch.arange(first, first + share), torch.arange(first, first + share), None),
    )


def engine(batch: int, steps: int, stage: int) -> dict[str, float]:
    """Seconds a step of the engine, alone; and how long a checkpoint's copy and its writing take."""
    from ctclip.training.checkpoints import Checkpoints

    with distributed.process_group() as device:
        config, step, data = build(batch, stage)
        made = Engine(step, config, device)
        seconds = _median(lambda: made.step(data, 0, 100), steps)
        began = time.perf_counter()
        state = made.state()
        copied = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder), 2, "")
            checkpoints.save(1, state)
            during = _median(lambda: made.step(data, 0, 100), 3)
            checkpoints.wait()
            began = time.perf_counter()
            checkpoints.save(2, state)
            checkpoints.wait()
            written = time.perf_counter() - began
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2
    return {"seconds": seconds, "copied": copied, "written": written, "during": during, "megabytes": size / 1e6}


def both(batch: int, steps: int) -> dict[str, float]:
    """The engine and the bare loop in one process, their steps taken in turn: what the machine does besides hits both."""
    with distributed.process_group() as device:
        config, step, data = build(batch, 0)
        made = Engine(step, config, device)
        _, other, _ = build(batch)
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
        other.train()

        def plain() -> None:
            tokens = other.model.text_encoder.tokenise(data.texts)
            loss, _ = other("step", volumes=data.volumes, tokens=tokens, scans=data.scans, text_identities=data.text_identities)  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()

        times: dict[str, list[float]] = {"engine": [], "bare": []}
        for number in range(steps + 2):
            for name, action in (("engine", lambda: made.step(data, 0, 100)), ("bare", plain)):
                began = time.perf_counter()
                action()
                if number >= 2:
                    times[name].append(time.perf_counter() - began)
    return {name: float(torch.tensor(values).median()) for name, values in times.items()}


def rank_main(settings: dict[str, int]) -> None:
    """One rank of the scaling run: seconds a step, and bytes it sends a step."""
    # DeepSpeed keeps references to torch's collectives from its start on: they are counted from before that.
    with Counted() as sent, distributed.process_group() as device:
        config, step, data = build(settings["share"] * distributed.world_size(), settings["stage"])
        made = Engine(step, config, device)
        made.step(data, 0, 100)
        sent.bytes = 0.0
        made.step(data, 0, 100)
        counted = sent.bytes
        seconds = _median(lambda: made.step(data, 0, 100), settings["steps"])
        parameters = sum(p.numel() for p in step.parameters() if p.requires_grad)
        if distributed.is_main():
            print("\n" + json.dumps({"seconds": seconds, "sent": counted, "parameters": parameters}), flush=True)


class Counted:
    """Bytes this rank sends in torch's collectives, as a ring sends them: a reduction or a gathering of S bytes is
    S (n - 1) / n, an all-reduce both."""

    # Which argument is the tensor a rank gives, and how many times S (n - 1) / n it costs; S is the whole tensor.
    RING: ClassVar = {
        "all_reduce": (0, 2.0), "reduce": (0, 1.0), "broadcast": (0, 1.0), "reduce_scatter_tensor": (1, 1.0),
        "_reduce_scatter_base": (1, 1.0), "all_gather": (1, 0.0), "all_gather_into_tensor": (1, 0.0), "_all_gather_base": (1, 0.0),
    }  # fmt: skip

    def __init__(self) -> None:
        self.bytes = 0.0
        self.patches: list[Any] = []

    def __enter__(self) -> Counted:
        for name, (place, cost) in self.RING.items():
            if hasattr(torch.distributed, name):
                self.patches.append(mock.patch.object(torch.distributed, name, self._wrapped(name, place, cost)))
                self.patches[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def _wrapped(self, name: str, place: int, cost: float) -> Any:
        real, names = getattr(torch.distributed, name), (("tensor",), ("input", "input_tensor", "tensor"))[place]

        def counting(*arguments: Any, **named: Any) -> Any:
            given = arguments[place] if len(arguments) > place else next(named[n] for n in names if n in named)
            ranks = torch.distributed.get_world_size()
            size = float(given.numel() * given.element_size())
            # What a rank gives to a gathering is one part of it, and goes to every other rank.
            self.bytes += size * (ranks - 1) if cost == 0 else cost * size * (ranks - 1) / ranks
            return real(*arguments, **named)

        return counting


def scaled(ranks: int, share: int, stage: int, steps: int) -> dict[str, float]:
    """``rank_main`` on several processes of one thread each."""
    settings = json.dumps({"share": share, "stage": stage, "steps": steps})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.benchmarks.training", "--rank", settings]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def waiting(workers: int) -> dict[str, float]:
    """Data-wait share and volumes a second of `ctclip train` on a store on local disk, its first window left out."""
    from ctclip.phantom.cohort import Options, make_cohort
    from preprocessing.pipeline import preprocess_cohort
    from preprocessing.spec import PreprocessingSpec

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cohort(folder / "cohort", Options(volumes=32, seed=5, scale=4.0, valid_fraction=0.2), workers=1)
        preprocess_cohort(folder / "cohort", folder / "store", PreprocessingSpec.load("phantom"), workers=1)
        given = ["training.epochs=8", "training.batch=8", "training.log_every=4", "training.text_warmup.steps=0", f"data.workers={workers}"]  # fmt: skip
        command = [sys.executable, "-m", "ctclip.train", "--config", "phantom_tiny", "--store", str(folder / "store"), "--output", str(folder / "run")]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *given], env=environment, capture_output=True, check=True)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    return {key: sum(line[key] for line in lines) / len(lines) for key in ("data_wait", "volumes_per_second")}


def memory(batch: int, stage: int) -> dict[str, float]:
    """Peak memory of training steps above what the process held before the model, and what the plan says of it."""
    from ctclip.training.plan import _kept, stage_memory

    with distributed.process_group() as device:
        warm_config, warm, tiny = build(4, stage)
        Engine(warm, warm_config, device).step(tiny, 0, 10)
        before = peak_gb()
        config, step, data = build(batch, stage)
        made = Engine(step, config, device)
        for number in range(2):
            made.step(data, number, 10)
        grown = peak_gb() - before
        parameters = sum(p.numel() for p in step.parameters())
        one, two = (_kept(step.model, SHAPE, 1, count, False) for count in (1, 2))
    planned = stage_memory(stage, parameters, parameters, 1).states + (batch - 4) * ((two - one) + 4.0 * torch.Size(SHAPE).numel())  # fmt: skip
    return {"measured": grown, "planned": planned / 2**30}


def _median(action: Any, times: int) -> float:
    action()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return float(torch.tensor(seconds).median())


def engine_table(steps: int) -> str:
    pair = apart(HERE, "both", 16, steps)
    alone = apart(HERE, "engine", 16, steps, 1)
    rows = [
        ["bare PyTorch loop, batch 16, seconds a step", f"{pair['bare']:.3f}", ""],
        ["engine (ZeRO 0), the same steps in turn", f"{pair['engine']:.3f}", f"{pair['engine'] / pair['bare'] - 1:+.1%} overhead"],
        [f"checkpoint of {alone['megabytes']:.0f} MB: copied", f"{alone['copied']:.3f}", "training waits for this"],
        ["checkpoint: written, checksummed, flushed", f"{alone['written']:.3f}", "beside training"],
        ["step while one is written", f"{alone['during']:.3f}", f"{alone['during'] / alone['seconds'] - 1:+.1%} of a step"],
    ]  # fmt: skip
    return table("Engine and checkpoints", ["", "seconds", ""], rows)


def scaling_table(steps: int) -> str:
    rows, base = [], 0.0
    for ranks in (1, 2, 4):
        found = scaled(ranks, 4, 1, steps)
        base = base or found["seconds"]
        cores = min(ranks, len(os.sched_getaffinity(0)))
        rows.append([f"{ranks} on {cores}", f"{found['seconds']:.3f}", f"{base * ranks / cores / found['seconds']:.0%}", *_sent(found, 1, ranks)])  # fmt: skip
    return table("Weak scaling, 4 volumes a rank, ZeRO 1 (efficiency: work a core does in a second, against one rank)", ["ranks on cores", "seconds a step", "efficiency", *SENT], rows)  # fmt: skip


def bytes_table(_: int) -> str:
    rows = [[str(stage), *_sent(scaled(2, 2, stage, 1), stage, 2)] for stage in range(4)]
    return table("Bytes sent a step and rank, 2 ranks, by ZeRO stage", ["ZeRO", *SENT], rows)


# Rajbhandari et al. 2020, section 7: gradients are reduced and parameters gathered once, at stage 3 gathered twice; a ring
# sends (n - 1) / n of each.
SENT = ["MB sent a step and rank, counted", "formula, MB", "difference"]


def _sent(found: dict[str, float], stage: int, ranks: int) -> list[str]:
    times, whole = 3 if stage == 3 else 2, 4 * found["parameters"] / 1e6
    expected = times * whole * (ranks - 1) / ranks
    apart_by = f"{found['sent'] / 1e6 / expected - 1:+.1%}" if expected else ""
    return [f"{found['sent'] / 1e6:.2f}", f"{times} x {whole:.2f} x {ranks - 1}/{ranks} = {expected:.2f}", apart_by]


def waiting_table(_: int) -> str:
    found = {workers: apart(HERE, "waiting", workers) for workers in (1, 2)}
    rows = [[str(workers), f"{read['data_wait']:.2%}", f"{read['volumes_per_second']:.1f}"] for workers, read in found.items()]  # fmt: skip
    return table("Waiting for data: `ctclip train`, phantom_tiny, store on local disk, one thread", ["reading processes", "share of the time", "volumes a second"], rows)  # fmt: skip


def memory_table(_: int) -> str:
    os.environ |= GIVEN_BACK
    found = {stage: apart(HERE, "memory", 24, stage) for stage in (0, 1)}
    rows = [[str(stage), f"{one['measured']:.3f}", f"{one['planned']:.3f}", f"{one['planned'] / one['measured'] - 1:+.0%}"] for stage, one in found.items()]  # fmt: skip
    return table("Memory of a step, batch 24, GiB", ["ZeRO", "measured (peak resident)", "`ctclip train --plan`", "plan is off by"], rows)  # fmt: skip


TABLES = {"engine": engine_table, "scaling": scaling_table, "bytes": bytes_table, "waiting": waiting_table, "memory": memory_table}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", help="one rank of the scaling run; the benchmark starts it itself")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=list(TABLES), nargs="*", default=list(TABLES))
    chosen = parser.parse_args()
    if chosen.rank:
        rank_main(json.loads(chosen.rank))
        return
    print(f"{machine()}; vit3d of phantom_tiny, volumes of {' x '.join(map(str, SHAPE))}\n")
    for name in chosen.only:
        print(TABLES[name](chosen.steps), flush=True)


if __name__ == "__main__":
    main()
