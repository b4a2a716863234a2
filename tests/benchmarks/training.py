"""The training engine: overhead, scaling, communication, checkpoints, data waiting, memory: ``python -m
tests.benchmarks.training``."""

from __future__ import annotations

import argparse
import gc
import itertools
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
from ctclip.training.step import pairs_of, parts_of
from tests.benchmarks.common import ONE_THREAD, apart, machine, peak_gb, table

MODEL = {
    "dim": 64, "standardise": True,
    "volume": {"kind": "vit3d", "patch": [4, 4, 4], "stages": [[32, 1], [96, 1]], "width": 192, "depth": 1,
               "heads": 6, "registers": 2, "windows": [[-1000, 1000], [-160, 240]], "pooling": ["mean", "max"]},
    "text": {"width": 128, "depth": 2, "heads": 4, "max_tokens": 64},
}  # fmt: skip
SHAPE = (64, 80, 112)
HERE = "tests.benchmarks.training"
SMALL = (32, 48, 64)
FOUND = "found: "
WORDS = {"captioning": 1.0, "mlm": 1.0}
TEXTS = [
    "There is a large pleural effusion on the left.",
    "No nodule is seen.",
    "The heart is enlarged.",
    "Mild emphysema.",
]
# With full stops, close to the 64 tokens that the encoder reads at once, as the plan assumes.
LONG = " ".join(TEXTS * 3).split()[:48]


def build(
    batch: int,
    stage: int = 1,
    shape: tuple[int, int, int] = SHAPE,
    objectives: dict[str, float] | None = None,
    long: bool = False,
) -> tuple[Any, Any, Any]:
    """Configuration, step module and one rank's batch on fixed data; ``long``: reports that fill the text encoder."""
    from ctclip.config import Config
    from ctclip.data.batch import Batch
    from ctclip.models.dual_encoder import build_model
    from ctclip.models.text import train_tokenizer
    from ctclip.objectives.objective import Context
    from ctclip.preprocessing.spec import PreprocessingSpec
    from ctclip.training.step import TrainingStep

    training = {"batch": batch, "zero": {"stage": stage}}
    config = Config.model_validate(
        {"model": MODEL, "training": training, "objectives": {"clip": 1, **(objectives or {})}}
    )
    torch.manual_seed(0)
    spec = PreprocessingSpec("benchmark", spacing=(4.5, 3.2, 3.2), shape=shape)
    model = build_model(config.model, spec, train_tokenizer(TEXTS * 4, 100))
    step = TrainingStep(Context(model), config.objectives)
    share = batch // distributed.world_size()
    volumes = torch.rand(share, 1, *shape) * 2 - 1
    texts = [" ".join(LONG[i:] + LONG[:i]) if long else f"{TEXTS[i % 4]} {i}" for i in range(share)]
    first = distributed.rank() * share
    numbers = torch.arange(first, first + share)
    words = [step.words(texts)] if step.reads_words else None
    return config, step, Batch(volumes, [model.text_encoder.tokenise(texts)], numbers, numbers, words=words)


def checkpoints(batch: int, steps: int) -> dict[str, float]:
    """Seconds of a plain step, and of a step while a checkpoint is being written, in turn."""
    from ctclip.training.checkpoints import Checkpoints

    with distributed.process_group() as device, tempfile.TemporaryDirectory() as folder:
        config, step, data = build(batch)
        made, kept = Engine(step, config, device), Checkpoints(Path(folder), 2, "")
        times: dict[str, list[float]] = {"plain": [], "copied": [], "with": [], "written": []}
        for number in range(steps + 1):
            began = time.perf_counter()
            made.step(data, 0, 100)
            plain = time.perf_counter()
            state = made.state()
            copied = time.perf_counter()
            kept.save(2 * number, state)
            made.step(data, 0, 100)
            ended = time.perf_counter()
            kept.wait()
            # Once more, without training at the same time.
            again = time.perf_counter()
            kept.save(2 * number + 1, state)
            kept.wait()
            found = {"plain": plain - began, "copied": copied - plain, "with": ended - plain, "written": time.perf_counter() - again}  # fmt: skip
            for name, seconds in found.items() if number else ():
                times[name].append(seconds)
        size = (kept.found()[0][1] / "state.safetensors").stat().st_size
    return {name: float(torch.tensor(values).median()) for name, values in times.items()} | {"megabytes": size / 1e6}


def both(batch: int, steps: int) -> dict[str, float]:
    """The engine and a bare loop in one process, with alternating steps, so that other load affects both."""
    with distributed.process_group() as device:
        config, step, data = build(batch, 0)
        made = Engine(step, config, device)
        _, other, _ = build(batch)
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
        other.train()

        def plain() -> None:
            loss, _ = other(parts_of(data, 1)[0], pairs_of(data), progress=0.0)
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


def rank_main(settings: dict[str, Any]) -> None:
    """One rank of the measurement in ``settings``; rank 0 prints the result."""
    # DeepSpeed keeps references to torch's collectives, so counting starts before it is imported.
    with Counted() as sent, distributed.process_group():
        found = memory(settings) if settings["kind"] == "memory" else speed(settings, sent)
        if distributed.is_main():
            print(f"\n{FOUND}{json.dumps(found)}", flush=True)
    distributed.leave(0)


def speed(settings: dict[str, Any], sent: Counted) -> dict[str, float]:
    """Seconds per step, and of these in collectives; bytes per step and rank, counted in torch and in the kernel.

    ``apart``: seconds of the same steps, in turn, with collectives that return at once: the speed without
    communication."""
    config, step, data = build(settings["share"] * distributed.world_size(), settings["stage"])
    sizes = [4 * p.numel() for p in step.parameters() if p.requires_grad]
    made, steps = Engine(step, config, distributed.device()), settings["steps"]
    times: dict[bool, list[float]] = {False: [], True: []}
    counted, collectives, passed = 0.0, 0.0, 0
    for part in range(5):
        for silent in (False, True) if settings["stage"] < 3 else (False,):
            distributed.barrier()
            sent.bytes, sent.seconds, sent.silent, before = 0.0, 0.0, silent, _loopback()
            for number in range(steps):
                began = time.perf_counter()
                made.step(data, number, 100)
                if part:
                    times[silent].append(time.perf_counter() - began)
            sent.silent = False
            distributed.barrier()
            if part and not silent:
                counted, collectives, passed = counted + sent.bytes, collectives + sent.seconds, passed + _loopback() - before  # fmt: skip
    taken = len(times[False])
    median = {silent: float(torch.tensor(found or [0.0]).median()) for silent, found in times.items()}
    return {
        "seconds": median[False], "apart": median[True], "collectives": collectives / taken, "sent": counted / taken,
        "wire": passed / taken / distributed.world_size(), "parameters": sum(sizes),
        # DeepSpeed's stage3_param_persistence_threshold: smaller parameters are replicated on every rank.
        "small": sum(size for size in sizes if size <= 4 * 100_000),
    }  # fmt: skip


def _loopback() -> int:
    """Bytes that the kernel has sent over the loopback interface."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


class Counted:
    """Seconds in torch's collectives, and bytes that this rank sends in a ring: S (n - 1) / n for a reduce-scatter or
    an all-gather of S bytes, twice that for an all-reduce."""

    # The argument with the rank's tensor, and its cost in units of S (n - 1) / n; S is the whole tensor.
    RING: ClassVar = {
        "all_reduce": (0, 2.0), "reduce": (0, 1.0), "broadcast": (0, 1.0), "reduce_scatter_tensor": (1, 1.0),
        "_reduce_scatter_base": (1, 1.0), "all_gather": (1, 0.0), "all_gather_into_tensor": (1, 0.0), "_all_gather_base": (1, 0.0),
    }  # fmt: skip

    def __init__(self) -> None:
        self.bytes = self.seconds = 0.0
        self.silent = False
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
            if self.silent:
                given = (*arguments, *named.values())
                return self._pretended(name, given[0], given[min(1, len(given) - 1)])
            given = arguments[place] if len(arguments) > place else next(named[n] for n in names if n in named)
            ranks = torch.distributed.get_world_size()
            size = float(given.numel() * given.element_size())
            # In an all-gather a rank contributes one part, which goes to every other rank.
            self.bytes += size * (ranks - 1) if cost == 0 else cost * size * (ranks - 1) / ranks
            began = time.perf_counter()
            try:
                return real(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return counting

    @staticmethod
    def _pretended(name: str, out: Any, given: Any) -> None:
        """Return at once, as if all ranks were identical to this one."""
        if name == "all_gather":
            for part in out:
                part.copy_(given)
        elif "gather" in name:
            out.view(-1, given.numel()).copy_(given.flatten().clone())


def ranked(ranks: int, settings: dict[str, Any]) -> Any:
    """The result of rank 0 among this many processes with one thread each."""
    return _found(_started(ranks, settings))


def _started(ranks: int, settings: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.benchmarks.training", "--rank", json.dumps(settings)]  # fmt: skip
    environment = {**os.environ, **ONE_THREAD, "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _found(process: subprocess.Popen[str]) -> Any:
    said, wrong = process.communicate()
    if process.returncode:
        raise RuntimeError(wrong[-3000:])
    return json.loads(next(line for line in said.splitlines() if line.startswith(FOUND)).removeprefix(FOUND))


def waiting(workers: int) -> dict[str, float]:
    """Share of time waiting for data, and volumes per second, of `ctclip train` on a local disk, without the first
    interval."""
    from ctclip.phantom.cohort import Options, make_cohort
    from ctclip.preprocessing.cohort_run import preprocess_cohort
    from ctclip.preprocessing.spec import PreprocessingSpec

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


def memory(settings: dict[str, Any]) -> list[dict[str, float]]:
    """For all ``objectives`` and ``stages``: the estimate of `ctclip train --plan` for a rank, and measurements of two
    steps.

    ``allocated``: peak bytes in use by torch's allocator, from its own events. Operations are those of the forward and
    backward passes.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ctclip.training.plan import plan_of

    results, ranks, share = [], distributed.world_size(), settings["share"]
    for objectives in settings["objectives"]:
        given = (share * ranks, 0, SMALL, objectives, True)
        config, step, data = build(*given)
        # Attention as matrix products, because torch does not count the fused CPU kernel.
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
            step(parts_of(data, 1)[0], pairs_of(data), progress=0.0)[0].backward()
        flops = counted.get_total_flops() / share
        plan = plan_of(step, config, SMALL, ranks, card=False)
        del config, step, data
        for stage in settings["stages"]:
            gc.collect()
            allocated = _allocated(lambda given=given, stage=stage: _steps(given[0], stage, *given[2:]))
            results.append({
                "allocated": allocated / 2**30, "planned": plan.peak(plan.stages[stage], share, share) / 2**30,
                "flops": flops, "planned_flops": plan.flops,
            })  # fmt: skip
    return results


def process(batch: int, steps: int) -> dict[str, float]:
    """Memory (GiB) of a process before the model is built, and its growth; the estimate; seconds per step."""
    from ctclip.training.plan import plan_of

    with distributed.process_group() as device:
        config, step, data = build(4)
        made = Engine(step, config, device)
        made.step(data, 0, 10)
        del config, step, data, made
        gc.collect()
        before = peak_gb()
        config, step, data = build(batch)
        made = Engine(step, config, device)
        seconds = median(lambda: made.step(data, 0, 10), steps)
        grown = peak_gb() - before
        plan = plan_of(step, config, SHAPE, 1, card=False)
    planned = plan.peak(plan.stages[1], batch, batch) / 2**30
    return {"before": before, "grown": grown, "planned": planned, "seconds": seconds}


def _steps(*given: Any) -> None:
    config, step, data = build(*given)
    made = Engine(step, config, distributed.device())
    for number in range(2):
        made.step(data, number, 10)


def _allocated(action: Any) -> float:
    """Peak bytes in use of torch's CPU allocator, among those allocated in ``action``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return float(max(itertools.accumulate(change for _, change in changes)))


def median(action: Any, times: int) -> float:
    action()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return float(torch.tensor(seconds).median())


def engine_table(steps: int) -> str:
    pair, kept = apart(HERE, "both", 16, steps), apart(HERE, "checkpoints", 4, 3 * steps, threads=1)
    cost = kept["with"] - kept["plain"]
    rows = [
        ["bare PyTorch loop, batch 16, seconds a step", f"{pair['bare']:.3f}", ""],
        ["engine (ZeRO 0), the same steps in turn", f"{pair['engine']:.3f}", f"{pair['engine'] / pair['bare'] - 1:+.1%} overhead"],
        [f"checkpoint of {kept['megabytes']:.0f} MB: copied", f"{kept['copied']:.3f}", "training waits for this"],
        ["checkpoint: written, checksummed, flushed, alone", f"{kept['written']:.3f}", "beside training"],
        ["engine (ZeRO 1), batch 4, seconds a step", f"{kept['plain']:.3f}", ""],
        ["the same in turn, a checkpoint copied before and written beside it", f"{kept['with']:.3f}",
         f"{cost:+.3f} s; {cost / 500 / kept['plain']:+.3%} of the time where every 500th step has one"],
    ]  # fmt: skip
    return table("Engine and checkpoints", ["", "seconds", ""], rows)


def scaling_table(steps: int) -> str:
    def one(stage: int = 1) -> dict[str, Any]:
        return {"kind": "speed", "share": 4, "stage": stage, "steps": steps}

    alone = ranked(1, one())
    rows = [["1", f"{alone['seconds']:.3f}", "100%", "", ""]]
    for ranks, stage in ((2, 0), (2, 1), (4, 1)):
        found, cores = ranked(ranks, one(stage)), min(ranks, len(os.sched_getaffinity(0)))
        kept = found["apart"] / found["seconds"]
        rows.append([f"{ranks} on {cores} cores, ZeRO {stage}", f"{found['seconds']:.3f}", f"{alone['seconds'] * ranks / cores / found['seconds']:.0%}",
                     f"{found['apart']:.3f}", f"{kept:.0%}"])  # fmt: skip
    head = ["ranks", "seconds a step", "efficiency against one rank", "seconds of the same steps in turn, collectives answered at once", "efficiency against that"]  # fmt: skip
    return table("Weak scaling, 4 volumes per rank (efficiency: work per core and second)", head, rows)


def bytes_table(_: int) -> str:
    rows = []
    for stage in range(4):
        found = ranked(2, {"kind": "speed", "share": 2, "stage": stage, "steps": 2})
        whole, small, sent, wire = (found[name] / 1e6 for name in ("parameters", "small", "sent", "wire"))
        name, times = FORMULAS[stage]
        expected = times(whole, small) / 2
        rows.append(
            [str(stage), f"{sent:.2f}", f"{name} = {expected:.2f}", f"{sent / expected - 1:+.1%}", f"{wire:.2f}"]
        )
    head = ["ZeRO", "MB counted", "formula, MB (P: parameters, S: those of 100,000 elements at most)", "difference", "MB that passed the kernel"]  # fmt: skip
    return table("Bytes sent per step and rank, 2 ranks, by ZeRO stage", head, rows)


# What a ring sends, (n - 1) / n of each. DeepSpeed all-reduces gradients (twice their size) up to stage 2, from stage 1
# on gathers the parameters; at stage 3 it gathers all but the small ones before either pass, reduces and scatters
# gradients, and gathers the small ones after the step.
FORMULAS: dict[int, tuple[str, Any]] = {
    0: ("1/2 x 2 P", lambda whole, small: 2 * whole),
    1: ("1/2 x (2 P + P)", lambda whole, small: 3 * whole),
    2: ("1/2 x (2 P + P)", lambda whole, small: 3 * whole),
    3: ("1/2 x (2 (P - S) + P + S)", lambda whole, small: 3 * whole - small),
}


def waiting_table(_: int) -> str:
    found = {workers: apart(HERE, "waiting", workers) for workers in (1, 2)}
    rows = [[str(workers), f"{read['data_wait']:.2%}", f"{read['volumes_per_second']:.1f}"] for workers, read in found.items()]  # fmt: skip
    return table("Waiting for data: `ctclip train`, phantom_tiny, store on local disk, one thread", ["reading processes", "share of the time", "volumes a second"], rows)  # fmt: skip


def memory_table(steps: int) -> str:
    rows = []
    for name, objectives in (("contrastive", {}), ("with captioning and mlm", WORDS)):
        for stage, found in enumerate(
            ranked(2, {"kind": "memory", "share": 16, "objectives": [objectives], "stages": [0, 1, 2, 3]})
        ):
            rows.append([name, str(stage), f"{found['allocated']:.3f}", f"{found['planned']:.3f}", f"{found['planned'] / found['allocated'] - 1:+.0%}", f"{found['planned_flops'] / found['flops'] - 1:+.0%}"])  # fmt: skip
    tensors = table("Memory of a step, 2 ranks, 16 volumes a rank, GiB", ["objectives", "ZeRO", "in tensors at once", "`ctclip train --plan`", "plan is off by", "operations: plan is off by"], rows)  # fmt: skip
    held = []
    for name, settings in (("as it comes", {}), ("`MALLOC_MMAP_THRESHOLD_=65536`: what is freed goes back", {"MALLOC_MMAP_THRESHOLD_": "65536"})):  # fmt: skip
        with mock.patch.dict(os.environ, settings):
            found = apart(HERE, "process", 24, steps, threads=1)
        held.append([name, f"{found['before']:.2f}", f"{found['grown']:.2f}", f"{found['planned']:.2f}", f"{found['seconds']:.3f}"])  # fmt: skip
    return tensors + "\n" + table("Memory of a process, ZeRO 1, 24 volumes, GiB", ["C library", "Python, libraries, a first step of 4 volumes", "grown by", "`ctclip train --plan`", "seconds a step"], held)  # fmt: skip


TABLES = {"engine": engine_table, "scaling": scaling_table, "bytes": bytes_table, "waiting": waiting_table, "memory": memory_table}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", help="internal: run one rank")
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
