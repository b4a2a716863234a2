"""Two ranks under the launchers that users type: killed, or sent a signal, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctclip.distributed import free_port

from .runs import command, run, same_curve, wait_for_step

TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "ctclip.train"]
DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--module", "ctclip.train"]


@pytest.mark.parametrize(("killed", "launcher"), [("one", TORCHRUN), ("all", DEEPSPEED)])
def test_kill_9_of_ranks_of_two(store: Path, whole: Path, tmp_path: Path, killed: str, launcher: list[str]) -> None:
    """And the same command again, to the end, under the launcher a user types."""
    output = tmp_path / "run"
    # Other tests may run beside this one, on the launcher's own port.
    port = ["--master_port", str(free_port())] if launcher is DEEPSPEED else []
    words = [str(Path(sys.executable).with_name(launcher[0])), *port, *launcher[1:], *command(store, output)[1:]]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=settings)
    # Found before the moment comes: eight steps are soon over. Launchers first: none shall see its ranks die.
    wait_for_step(output, 0)
    there = _processes(output)
    # torchrun's own children are the ranks; they may have children with the same words.
    ranks = [pid for pid in there if _parent(pid) == process.pid]
    wait_for_step(output, 2)
    for pid in there if killed == "all" else ranks[-1:]:
        os.kill(pid, signal.SIGKILL)
    # Where one rank died the launcher ends the other; nothing is left to wait for ever.
    assert process.wait(timeout=120) != 0
    ends = time.monotonic() + 20
    while _processes(output) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not _processes(output)
    done = subprocess.run(words, capture_output=True, text=True, env=settings, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"model: {output / 'model'}" in done.stdout
    # Sums over two ranks round otherwise than those of one process.
    same_curve(output, whole, 1e-4)


def test_a_signal_to_the_launching_command_reaches_its_ranks(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ctclip.train", *command(store, output)[1:], "--processes", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    wait_for_step(output, 1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said[-2000:]
    assert not _processes(output)
    assert list((output / "checkpoints").glob("step_*"))
    # One process goes on where two were.
    assert run(command(store, output)).returncode == 0
    same_curve(output, whole, 1e-4)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _processes(output: Path) -> list[int]:
    """Launchers and ranks of the run in ``output``, the oldest first."""
    found = subprocess.run(["pgrep", "-f", f"output {output}"], capture_output=True, text=True, check=False).stdout
    return sorted(int(pid) for pid in found.split())
