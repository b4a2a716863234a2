"""Start commands quickly, by forking a server that has imported the modules of training.

Each command is a process in its own session, as if it had been typed: it can be killed or sent signals, and ends with
the exit code of the command. Only the imports, some ten seconds, are shared.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["torch", "deepspeed", "deepspeed.moe.layer", "torch._inductor.compile_fx", "torch.utils.tensorboard", "networkx", "numba",
     "transformers.models.bert.modeling_bert", "ctclip.cli", "ctclip.training.loop", "ctclip.training.export", "ctclip.models.vit3d"]
)  # fmt: skip


@dataclass
class Done:
    """The result of a command; ``returncode`` is minus the number of the signal that ended it, if any."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A running command ``ctclip ARGUMENTS``. ``patch``: Python code that runs in its process first."""

    def __init__(self, arguments: list[str], patch: str = "") -> None:
        self.said = [tempfile.mkstemp(prefix="ctclip_test_")[1] for _ in range(2)]
        self.process = FORKED.Process(target=_run, args=(arguments, patch, *self.said))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def wait(self, seconds: float = 900) -> Done:
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            os.killpg(self.pid, 9)
            raise TimeoutError(f"still running after {seconds} s: {Path(self.said[1]).read_text()[-2000:]}")
        texts = [Path(name).read_text() for name in self.said]
        for name in self.said:
            os.unlink(name)
        return Done(code, *texts)


def _run(arguments: list[str], patch: str, out: str, err: str) -> None:
    os.setsid()
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    # The command must not see variables that the test process set for itself.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    # Nor those that multiprocessing sets for its children.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["ctclip", *arguments]
    exec(patch, {"__name__": "patch"})
    from ctclip.cli import command

    with contextlib.suppress(KeyboardInterrupt):
        command()
