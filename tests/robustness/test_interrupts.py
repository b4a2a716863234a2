"""Ctrl-C stops a training with a checkpoint, one line and exit code 75; a second Ctrl-C stops it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .processes import Command, Done
from .runs import command, wait_for_step

pytestmark = pytest.mark.integration

SETTINGS = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
LONG = ("training.epochs=500", "training.checkpoint_every=100000")
RANKS = ["--debug", "train", "--processes", "2"]


class Ranks:
    """`ctclip --debug train --processes 2` in its own session, as in a terminal."""

    def __init__(self, arguments: list[str]) -> None:
        words = [sys.executable, "-m", "ctclip", *RANKS, *arguments[1:]]
        self.process = subprocess.Popen(
            words, env=SETTINGS, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.pid = self.process.pid

    def wait(self, seconds: float) -> Done:
        out, err = self.process.communicate(timeout=seconds)
        return Done(self.process.returncode, out, err)


Start = Callable[..., "Ranks | Command"]


def processes(output: Path) -> list[int]:
    """Launchers and ranks of the run in ``output``, the oldest first."""
    listed = subprocess.run(["pgrep", "-f", f"output {output}"], capture_output=True, text=True, check=False)
    return sorted(map(int, listed.stdout.split()))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A run folder; processes still running after the test are stopped."""
    yield tmp_path / "run"
    for pid in processes(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def ctrl_c(run: Ranks | Command) -> None:
    """Send a signal to the foreground process group, as a terminal does."""
    os.killpg(run.pid, signal.SIGINT)


@pytest.mark.parametrize("start", [Command, Ranks])
def test_ctrl_c_writes_a_checkpoint_and_says_one_line(start: Start, store: Path, output: Path) -> None:
    run = start(command(store, output, *LONG, "data.workers=1"))
    wait_for_step(output, 1)
    ctrl_c(run)
    done = run.wait(300)
    assert done.returncode == 75, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stdout.count("interrupted: stopped after step") == 1
    assert len(list((output / "checkpoints").glob("step_*"))) == 1
    assert not processes(output)


@pytest.mark.parametrize("start", [Command, Ranks])
def test_the_second_ctrl_c_ends_at_once(start: Start, store: Path, output: Path) -> None:
    # Every step after the second takes an hour.
    patch = "import time; from ctclip.training.engine import Engine; step = Engine.step\ndef slow(self, batch, number, steps):\n    time.sleep(3600 * (number > 2)); step(self, batch, number, steps)\nEngine.step = slow"  # fmt: skip
    if start is Command:
        run = start(command(store, output, *LONG), patch)
    else:
        run = start(command(store, output, *LONG))
    wait_for_step(output, 1)
    for pid in processes(output):
        # A rank that hangs never reaches the end of its step.
        if b"--local_rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    ctrl_c(run)
    time.sleep(0.2)
    ctrl_c(run)
    done = run.wait(10)
    assert done.returncode in (130, -signal.SIGINT), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not processes(output)


def test_ctrl_c_while_ranks_start_is_one_line(store: Path, output: Path) -> None:
    run = Ranks(command(store, output, *LONG))
    until(lambda: any(b"--local_rank" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes(output)))
    ctrl_c(run)
    done = run.wait(150)
    assert done.returncode == 130, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "interrupted"
    assert not processes(output)


def test_ctrl_c_while_libraries_are_loaded_is_one_line(store: Path, output: Path) -> None:
    words = [sys.executable, "-m", "ctclip.train", *command(store, output, *LONG)[1:]]
    process = subprocess.Popen(words, env=SETTINGS, text=True, start_new_session=True, stderr=subprocess.PIPE)
    until(lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text())
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=150)
    assert (process.returncode, said) == (130, "interrupted\n")
