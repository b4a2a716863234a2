"""Two ranks under each launcher are killed or sent a signal, and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctclip.distributed import free_port

from .runs import command, losses, run, same_curve, wait_for_step

pytestmark = pytest.mark.slow

TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "ctclip.train"]
DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--module", "ctclip.train"]
# By default it allows one second between SIGTERM and SIGKILL; a step may take longer.
TIME = ["--mca", "odls_base_sigkill_timeout", "60"]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", *TIME, "-n", "2", sys.executable, "-m", "ctclip.train"]
LAUNCHERS = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "mpirun": MPIRUN}
SETTINGS = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def typed(launcher: str, arguments: list[str]) -> list[str]:
    """The command line for two ranks; the test is skipped if the launcher is not installed."""
    name, *words = LAUNCHERS[launcher]
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.is_file() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    # Other tests may be using the launcher's default port.
    port = ["--master_port", str(free_port())] if launcher == "deepspeed" else []
    return [path, *port, *words, *arguments[1:]]


@pytest.mark.parametrize(("killed", "launcher"), [("one", "torchrun"), ("all", "deepspeed"), ("one", "mpirun")])
def test_kill_9_of_ranks_of_two(store: Path, whole: Path, tmp_path: Path, killed: str, launcher: str) -> None:
    """After a kill, the same command under the same launcher finishes the run."""
    output = tmp_path / "run"
    words = typed(launcher, command(store, output))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=SETTINGS)
    # Processes are listed in advance, as eight steps take little time. Launchers are killed first, so that none sees its ranks die.
    wait_for_step(output, 0)
    there = _processes(output)
    # The ranks are direct children of the launcher; they may have children with the same command line.
    ranks = [pid for pid in there if _parent(pid) == process.pid]
    wait_for_step(output, 2)
    for pid in there if killed == "all" else ranks[-1:]:
        os.kill(pid, signal.SIGKILL)
    # If one rank dies, the launcher stops the other; no process is left waiting.
    assert process.wait(timeout=600) != 0
    ends = time.monotonic() + 60
    while _processes(output) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not _processes(output)
    done = subprocess.run(words, capture_output=True, text=True, env=SETTINGS, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"model: {output / 'model'}" in done.stdout
    # Sums over two ranks are rounded differently from those of one process.
    same_curve(output, whole, 1e-4)


def test_a_signal_to_the_launching_command_reaches_its_ranks(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ctclip.train", *command(store, output)[1:], "--processes", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=SETTINGS,
    )  # fmt: skip
    wait_for_step(output, 1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 75, said[-2000:]
    assert not _processes(output)
    assert list((output / "checkpoints").glob("step_*"))
    # One process continues the run of two.
    assert run(command(store, output)).returncode == 0
    same_curve(output, whole, 1e-4)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_under_a_launcher_writes_a_checkpoint(launcher: str, store: Path, whole: Path, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all foreground processes, and launchers forward it in different ways. Afterwards the
    run continues on one process. The run includes an objective whose decoder has tied weights that are sharded over
    ranks."""
    output = tmp_path / "run"
    arguments = command(store, output, "objectives.captioning=0.3", "objectives.mlm=0.3", "training.zero=3")
    long = [*arguments, "training.epochs=500", "training.checkpoint_every=100000"]
    process = subprocess.Popen(
        typed(launcher, long), env=SETTINGS, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    wait_for_step(output, 1)
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate(timeout=600)
    assert process.returncode != 0
    # torchrun shows a traceback of its own.
    assert "ctclip/training" not in said, said[-3000:]
    assert printed.count("interrupted: stopped after step") == 1
    (checkpoint,) = (output / "checkpoints").glob("step_*")
    assert not _processes(output)
    done, an_epoch = int(checkpoint.name.removeprefix("step_")), len(losses(whole)) / 4
    again = run([*arguments, f"training.epochs={(done + 1) / an_epoch}", "--force"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert max(losses(output)) == done


CALLED = """
import multiprocessing, sys

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from ctclip.cli import main

    cohort, store, *words = sys.argv[1:]
    code = main(["preprocess", cohort, "--output", store, "--spec", "phantom", "--workers", "2"])
    sys.exit(code or main([*words, "--processes", "2", "data.workers=2"]))
"""


def test_called_from_python_where_processes_are_spawned(cohort: Path, whole: Path, tmp_path: Path) -> None:
    """Processes start as on macOS and Windows, called from a notebook: they inherit nothing, not even a command
    line."""
    (tmp_path / "called.py").write_text(CALLED)
    words = [tmp_path / "called.py", cohort, tmp_path / "store", *command(tmp_path / "store", tmp_path / "run")]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=SETTINGS, timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(tmp_path / "run", whole, 1e-4)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _processes(output: Path) -> list[int]:
    """Launchers and ranks of the run in ``output``, the oldest first."""
    found = subprocess.run(["pgrep", "-f", f"output {output}"], capture_output=True, text=True, check=False).stdout
    return sorted(int(pid) for pid in found.split())
