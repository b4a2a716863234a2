"""Shared by benchmarks: a description of the machine, tables, and measurements in a separate process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")}


def machine() -> str:
    """Processor, cores and memory of this machine, and its card."""
    import torch

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    flags = Path("/proc/cpuinfo").read_text()
    has = ", ".join(name for name in ("avx2", "avx512f", "amx_bf16") if f" {name}" in flags)
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    card = f"; {torch.cuda.get_device_name()}, torch {torch.__version__}" if torch.cuda.is_available() else ""
    return f"{model}, {len(os.sched_getaffinity(0))} cores ({has}), {gigabytes:.0f} GiB{card}"


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def best_of(action: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of several runs; noise on a shared machine only adds time."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def processor_seconds(action: Callable[[], object], times: int = 3) -> float:
    """Processor time of the fastest of several runs. On one thread this is the time on an idle machine, and other
    processes hardly affect it. With several threads (see ``apart``) it is divided by their number."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    seconds = []
    for _ in range(times):
        began = time.process_time()
        action()
        seconds.append(time.process_time() - began)
    return min(seconds) / threads


def peak_gb() -> float:
    """Peak memory of this process, without that of its parent, which getrusage includes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def apart(module: str, function: str, *arguments: Any, threads: int | None = None, card: bool = False) -> Any:
    """Run ``function`` of ``module`` in a new process, so that its peak memory is its own, and return its result. A GPU
    is visible only with ``card``."""
    script = f"import json, sys; from {module} import {function}; print('\\n' + json.dumps({function}(*json.loads(sys.argv[1]))))"
    environment = {**os.environ}
    if not card:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if threads is not None:
        environment |= {name: str(threads) for name in ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(arguments)], env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:  # Negative: ended by a signal (-9: the kernel, out of memory), with nothing on stderr.
        raise RuntimeError(f"{module}.{function} ended with {done.returncode}: {done.stderr[-3000:] or 'no message'}")
    return json.loads(done.stdout.strip().splitlines()[-1])
