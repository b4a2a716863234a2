"""Join and leave process groups, and collective operations. ``launchers.py`` detects the launcher."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ctclip import extras
from ctclip.launchers import LOOPBACK
from ctclip.launchers import free_port as free_port
from ctclip.launchers import launched as launched
from ctclip.launchers import prepare_environment as prepare_environment
from ctclip.launchers import refuse_ranks as refuse_ranks
from ctclip.launchers import say_unused_tasks as say_unused_tasks
from ctclip.preprocessing.scratch import scratch_folder

# Rendezvous file of ranks started by `launch`.
RENDEZVOUS = "CTCLIP_RENDEZVOUS"


def launched_rank() -> int:
    """The rank of this process, also after the process group has ended."""
    return int(os.environ.get("RANK", 0))


def local_ranks() -> int:
    """Number of ranks on this machine if the launcher states it, else of all ranks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def gpus() -> int:
    """Number of GPUs of this machine; 1 if there is none (the CPU)."""
    return max(1, torch.cuda.device_count())


def device() -> torch.device:
    """The device of a process that runs alone."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m MODULE ARGUMENTS`` as ``processes`` ranks on this machine, under DeepSpeed's launcher.

    SIGTERM and SIGUSR1 are passed on to the ranks, which handle them as a single process would. Ctrl-C and the end of
    the terminal reach them as SIGTERM, and a second Ctrl-C ends them at once. Returns the launcher's exit code, or 128
    + the signal if a signal killed the ranks.
    """
    # Ranks on one machine use a private rendezvous file, and communicate only over the loopback interface.
    with scratch_folder("ctclip-ranks-") as rendezvous:
        return _run_ranks(processes, module, arguments, rendezvous / "store")


def _run_ranks(processes: int, module: str, arguments: Sequence[str], rendezvous: Path) -> int:
    psutil = extras.require("psutil")
    cuda = torch.cuda.is_available()
    environment = dict(os.environ)
    if not cuda:
        environment["DS_ACCELERATOR"] = "cpu"
        # Ranks share the cores; otherwise each would start one thread per core.
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    count = ["--num_gpus" if cuda else "--num_accelerators", str(processes)]
    where = ["--master_addr", LOOPBACK, "--master_port", str(free_port())]
    # Ranks print their own errors; DeepSpeed would repeat the whole command line.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *count, *where, "--log_level=critical"]
    environment[RENDEZVOUS] = str(rendezvous)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        environment.setdefault(variable, "lo")
    # Start a new process group. A terminal sends Ctrl-C to the whole foreground group, and DeepSpeed's launcher would
    # end the ranks before they have written a checkpoint.
    process = subprocess.Popen([*command, "--module", module, *arguments], env=environment, process_group=0)
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        children: list[Any] = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                if again:
                    child.kill()
                # Signal only the ranks; the launcher would end at once, and the ranks with it.
                elif any(word.startswith("--local_rank") for word in child.cmdline()):
                    child.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)
        if again:
            process.kill()

    before = {}
    # Only the main thread of a process may set signal handlers.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            # Under nohup, the process ignores SIGHUP.
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, pass_on)
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    # DeepSpeed's launcher exits with minus the signal that ended a rank, which a shell reports as 256 minus the signal.
    ended_by_signal = code < 0 or 256 - signal.NSIG < code < 256
    return 128 + received[0] if received and ended_by_signal else code


def initialise() -> torch.device:
    """Join the process group and return the device of this rank."""
    prepare_environment()
    # DeepSpeed calls functions that torch has renamed, and every rank would warn about each.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed = extras.require("deepspeed")
    cuda = torch.cuda.is_available()
    if not cuda:
        # Gloo's collectives suffice. DeepSpeed's extension needs a compiler and half a minute to build, and later
        # processes wait forever if the building process is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    _join_without_listening(backend)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def _join_without_listening(backend: str) -> None:
    """Form the group of a single process, or of ranks started by ``launch``, without a server that listens on every
    interface, as torch's rendezvous does. Ranks of other launchers use torch's rendezvous."""
    environment = os.environ
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if dist.is_initialized() or (ranks > 1 and RENDEZVOUS not in environment):
        return
    if ranks == 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.HashStore() if ranks == 1 else dist.FileStore(environment[RENDEZVOUS], ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the process group for the duration of a block."""
    device = initialise()
    try:
        yield device
    finally:
        _control_group.cache_clear()
        if dist.is_initialized():
            _destroy_groups()


def _destroy_groups() -> None:
    """End the process group. DeepSpeed's references must be removed too, or a second run in this Python process (a
    notebook) would use groups that torch no longer knows."""
    deepspeed = extras.require("deepspeed")
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process with ``code`` if it has been in a process group; return if not.

    DeepSpeed keeps references to its groups, so their threads outlive ``destroy_process_group``, and a thread that
    wakes during Python's shutdown aborts the process: a successful run would exit with -6 instead of 0 or the code that
    makes Slurm restart it. Therefore this function performs the steps of a normal exit and ends the process without a
    shutdown.
    """
    if "deepspeed" not in sys.modules or not launched():
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_json(value: Any) -> Any:
    """The ``value`` of rank 0 on every rank. It must be JSON, so that nothing from the network is unpickled."""
    if world_size() == 1:
        return value
    return _json_of_every_rank(value if is_main() else None)[0]


def gather_json(value: Any) -> list[Any]:
    """The ``value`` (JSON) of every rank, in rank order, on every rank."""
    return [value] if world_size() == 1 else _json_of_every_rank(value)


def _json_of_every_rank(value: Any) -> list[Any]:
    group = _control_group()
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(text)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(bytes(part[: int(length)].tolist())) for part, length in zip(texts, lengths, strict=True)]


@functools.cache
def _control_group() -> Any:
    """A second group of all ranks over gloo, for messages that need no GPU."""
    return dist.new_group(backend="gloo")


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on at least one rank."""
    if world_size() == 1:
        return flag
    tensor = torch.tensor([int(flag)])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_control_group())
    return bool(tensor.item())


def on_main(action: Callable[[], object]) -> None:
    """Call ``action`` on rank 0; if it fails there, every rank stops with its message instead of waiting."""
    fault: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as error:
            fault = error
    message = broadcast_json(None if fault is None else str(fault))
    if fault is not None:
        raise fault
    if message is not None:
        sys.exit(2)


def sum_over_ranks(values: torch.Tensor) -> None:
    """Sum the ``values`` of all ranks in place, without gradients."""
    if world_size() > 1:
        dist.all_reduce(values)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of the ``values`` of all ranks, without gradients."""
    sum_over_ranks(values)
    return values / world_size()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Rows (b, ...) of every rank, in rank order, as (world size * b, ...), with gradients.

    The global loss must be the mean of the losses that the ranks compute from the result. The gradient of a row is the
    sum of the ranks' gradients for it, and averaging parameter gradients over ranks, as DeepSpeed and DDP do, gives
    exactly the single-process gradient of the global loss.
    """
    if world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        rows = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(rows, tensor.contiguous())
        context.rows = len(tensor)
        return torch.cat(rows)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed)
        first = rank() * context.rows
        return summed[first : first + context.rows]
