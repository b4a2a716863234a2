"""What happens to a run that is killed, starved, stopped or misled: nothing is lost, and one line says what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctclip.distributed import free_port

from ..end_to_end.conftest import TINY

# A low rate keeps rounding from growing into another curve.
SETTINGS = [*TINY, "training.epochs=4", "training.learning_rate=1e-4", "training.text_learning_rate=1e-4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT.pop("RANK", None)


def command(store: Path, output: Path, *more: str, launcher: tuple[str, ...] = ("-m", "ctclip.train")) -> list[str]:
    return [sys.executable, *launcher, "--config", "phantom_tiny", "--store", str(store), "--output", str(output), *SETTINGS, *more]  # fmt: skip


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**ENVIRONMENT, **environment}
    return subprocess.run(arguments, capture_output=True, text=True, env=given, timeout=240, check=False)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)  # fmt: skip


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for_step(output: Path, step: int) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        path = output / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") > step:
            return
        time.sleep(0.01)
    raise AssertionError("training did not get so far")


def patched(body: str, arguments: list[str]) -> list[str]:
    """The same command in a process in which ``body`` has replaced something."""
    index = arguments.index("ctclip.train")
    script = f"{body}\nimport sys; from ctclip.cli import main; sys.argv[0] = 'ctclip'; main(['train', *sys.argv[1:]])"
    return [sys.executable, "-c", script, *arguments[index + 1 :]]


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(store, output))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(output)) >= 8
    return output


def same_curve(output: Path, whole: Path, tolerance: float = 1e-6) -> None:
    assert losses(output).keys() == losses(whole).keys()
    assert losses(output) == pytest.approx(losses(whole), abs=tolerance)
    assert (output / "model" / "model.safetensors").is_file()


def test_kill_9_and_the_same_command_again(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(command(store, output))
    wait_for_step(output, 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "model").exists()
    assert run(command(store, output)).returncode == 0
    same_curve(output, whole)


def test_kill_9_while_a_batch_is_read(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    body = (
        "import os; from preprocessing.store import VolumeStore; real, calls = VolumeStore.read, []\n"
        "def dying(self, *a):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 30: os.kill(os.getpid(), 9)\n"
        "    return real(self, *a)\n"
        "VolumeStore.read = dying"
    )
    died = run(patched(body, command(store, output, "data.workers=0")))
    assert died.returncode == -signal.SIGKILL
    assert losses(output)
    assert run(command(store, output)).returncode == 0
    same_curve(output, whole)


def test_kill_9_of_one_rank_of_two(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "ctclip.train")  # fmt: skip
    process = start(command(store, output, launcher=launcher))
    wait_for_step(output, 3)
    ranks = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "ctclip.train"], capture_output=True, text=True, check=False).stdout.split()  # fmt: skip
    os.kill(max(int(rank) for rank in ranks), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    # One process goes on where two were; sums over two ranks round otherwise.
    assert run(command(store, output)).returncode == 0
    same_curve(output, whole, 1e-2)


def test_kill_9_while_a_checkpoint_is_written(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    body = (
        "import os; import ctclip.training.checkpoints as c; real, calls = c.save_file, []\n"
        "def dying(state, path):\n"
        "    calls.append(1); real(state, path)\n"
        "    if len(calls) == 2: os.truncate(path, 1000); os.kill(os.getpid(), 9)\n"
        "c.save_file = dying"
    )
    assert run(patched(body, command(store, output))).returncode == -signal.SIGKILL
    assert list((output / "checkpoints").glob(".step_*.partial"))
    done = run(command(store, output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((output / "checkpoints").glob(".step_*"))
    same_curve(output, whole)


def test_a_missing_newest_checkpoint_falls_back_to_the_one_before(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    newest = sorted((output / "checkpoints").glob("step_*"))[-1]
    (newest / "state.safetensors").unlink()
    done = run(command(store, output))
    assert "is damaged" in done.stderr
    same_curve(output, whole)


@pytest.mark.parametrize(("number", "stage", "tolerance"), [(signal.SIGTERM, 1, 1e-6), (signal.SIGUSR1, 3, 1e-5)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_asks_to_be_requeued(
    store: Path, whole: Path, tmp_path: Path, number: signal.Signals, stage: int, tolerance: float
) -> None:
    output = tmp_path / "run"
    process = start(command(store, output, "training.checkpoint_every=1000"))
    wait_for_step(output, 3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "the same command continues" in said
    assert len(list((output / "checkpoints").glob("step_*"))) == 1
    # It may go on at another ZeRO stage, whose sums round otherwise.
    assert run(command(store, output, f"training.zero.stage={stage}")).returncode == 0
    same_curve(output, whole, tolerance)


def test_a_reading_process_that_dies_is_one_line(store: Path, tmp_path: Path) -> None:
    body = (
        "import os; from preprocessing.store import VolumeStore; real, calls = VolumeStore.read, []\n"
        "def dying(self, *a):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 6: os.kill(os.getpid(), 9)\n"
        "    return real(self, *a)\n"
        "VolumeStore.read = dying"
    )
    done = run(patched(body, command(store, tmp_path / "run", "data.workers=1")))
    assert "a reading process died" in last_line(done)


def test_a_volume_that_vanished_is_named(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(store, mine)
    victim = sorted((mine / "volumes").glob("train*.b2nd"))[3]
    body = (
        "import os; import ctclip.training.loop as l; real = l._next\n"
        f"def vanished(stream):\n    os.path.exists({str(victim)!r}) and os.unlink({str(victim)!r})\n    return real(stream)\n"
        "l._next = vanished"
    )
    done = run(patched(body, command(mine, tmp_path / "run", "data.workers=1")))
    said = last_line(done)
    assert victim.name in said
    assert "run `ctclip preprocess` again" in said


def test_a_full_disk_keeps_the_checkpoint_before(store: Path, tmp_path: Path) -> None:
    body = (
        "import ctclip.training.checkpoints as c; real, calls = c.save_file, []\n"
        "def full(state, path):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: raise OSError(28, 'No space left on device')\n"
        "    real(state, path)\n"
        "c.save_file = full"
    )
    output = tmp_path / "run"
    said = last_line(run(patched(body, command(store, output))))
    assert "No space left on device" in said
    assert "continues from the checkpoint before" in said
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_loss_that_is_not_a_number_stops_the_run(store: Path, tmp_path: Path) -> None:
    body = (
        "import torch; import ctclip.losses as l; real, calls = l.clip, []\n"
        "def bad(*a):\n    calls.append(1)\n    return real(*a) * (float('nan') if len(calls) == 4 else 1)\n"
        "l.clip = bad"
    )
    output = tmp_path / "run"
    said = last_line(run(patched(body, command(store, output, "training.text_warmup.steps=0"))))
    assert "the loss is nan at step 3" in said
    assert str(output / "checkpoints") in said


def test_a_loss_that_grows_stops_the_run() -> None:
    from ctclip.training.loop import Divergence

    watch = Divergence()
    assert not any(watch.seen(3.5 - 0.01 * step) for step in range(200))
    assert not any(watch.seen(loss) for loss in (9.0, 2.0, 2.0))
    assert any(watch.seen(12.0) for _ in range(40))


def test_a_checkpoint_of_another_spec_is_refused(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for facts in (output / "checkpoints").glob("*/checkpoint.json"):
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "spec": "000000000000"}))
    assert "learned from volumes of spec 000000000000" in last_line(run(command(store, output)))


def test_another_configuration_is_refused_unless_forced(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    changed = command(store, output, "training.gradient_clip=0.5", "training.epochs=5")
    said = last_line(run(changed))
    assert "differs in training.epochs, training.gradient_clip" in said
    assert "--force" in said
    assert run([*changed, "--force"]).returncode == 0
    assert len(losses(output)) > len(losses(whole))


def test_a_second_run_in_one_folder_is_refused(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(command(store, output, "training.epochs=3000"))
    wait_for_step(output, 1)
    said = last_line(run(command(store, output, "training.epochs=3000")))
    assert "a run is going on in this folder" in said
    assert f"process {process.pid}" in said
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_validation_is_logged_and_the_best_checkpoint_is_kept(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ("training.validate_every=2", "training.keep_checkpoints=1", "training.validate_volumes=6")
    done = run(command(store, output, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "valid_loss" in line]
    assert len(validated) >= 4
    assert {"valid_auroc", "valid_modality_gap", "valid_recall@1", "valid_median_rank"} <= set(validated[0])
    best = min(validated, key=lambda line: line["valid_loss"])
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert f"step_{best['step'] + 1:08d}" in kept
    assert len(kept) <= 2
    # Looking does not change what is learned.
    assert losses(output) == pytest.approx(losses(whole), abs=1e-6)
    exported = run([sys.executable, "-m", "ctclip", "export", str(output), "--checkpoint", "best", "--output", str(tmp_path / "m")])  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "m" / "model.safetensors").is_file()
    absent = run([sys.executable, "-m", "ctclip", "export", str(whole), "--checkpoint", "best", "--output", str(tmp_path / "n")])  # fmt: skip
    assert absent.returncode == 2
    assert "validate_every" in absent.stderr
