"""Runs that are killed, run out of disk, are stopped or get bad data lose nothing, and one line states the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import zlib
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from ctclip.inference.model import Model
from ctclip.training.loop import Divergence

from .processes import Command
from .runs import SETTINGS, batches, command, last_line, losses, recorded, run, same_curve, wait_for_step


def test_the_console_says_how_the_run_goes(whole: Path) -> None:
    shown = r"training: (\d+)/\1 steps, [\d.]+ a second, 0 s left; loss [\d.]+, scale [\d.]+, rate [\d.e-]+, [\d.]+ volumes/s, waiting \d+%, [\d.]+ GB"
    assert re.search(shown, whole.with_name("said").read_text())


def test_a_checkpoint_holds_all_that_a_run_is(whole: Path) -> None:
    """Parameters, both of Adam's moments for all that are trained, its step count, and the step, which determines
    batches, learning rates and random states."""
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    facts = json.loads((newest / "checkpoint.json").read_text())
    state = load_file(newest / "state.safetensors")
    assert facts["step"] == int(state["optimizer_step"]) == len(losses(whole))
    names = {f"model.{name}" for name, _ in Model.from_pretrained(str(whole / "model")).dual.named_parameters()}
    assert names <= {name.removeprefix("state/") for name in state}
    # The text encoder is locked, and no loss of this run uses the bias.
    learning = {name for name in names if not name.startswith("model.text_")} - {"model.similarity.logit_bias"}
    assert "model.similarity.logit_scale" in learning
    for moment in ("exp_avg/", "exp_avg_sq/"):
        assert {name.removeprefix(moment) for name in state if name.startswith(moment)} == learning


def test_kill_9_and_the_same_command_again(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    recording = recorded(tmp_path / "batches")
    process = Command(command(store, output), recording)
    wait_for_step(output, 4)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert not (output / "model").exists()
    assert run(command(store, output), recording).returncode == 0
    same_curve(output, whole)
    found = batches(tmp_path / "batches")
    assert len(found) == len(losses(whole))
    assert found == batches(whole.with_name("batches"))


def test_kill_9_while_a_batch_is_read(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    body = (
        "import os; from ctclip.preprocessing.store import VolumeStore; real, calls = VolumeStore.read_into, []\n"
        "def dying(self, *a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 22: os.kill(os.getpid(), 9)\n"
        "    return real(self, *a, **k)\n"
        "VolumeStore.read_into = dying"
    )
    assert run(command(store, output, "data.workers=0"), body).returncode == -signal.SIGKILL
    assert losses(output)
    assert run(command(store, output)).returncode == 0
    same_curve(output, whole)


def test_kill_9_while_a_checkpoint_is_written(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    body = (
        "import os; import ctclip.training.checkpoints as c; real, calls = c.save_file, []\n"
        "def dying(state, path):\n"
        "    calls.append(1); real(state, path)\n"
        "    if len(calls) == 2: os.truncate(path, 1000); os.kill(os.getpid(), 9)\n"
        "c.save_file = dying"
    )
    assert run(command(store, output), body).returncode == -signal.SIGKILL
    assert list((output / "checkpoints").glob(".step_*.partial"))
    done = run(command(store, output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((output / "checkpoints").glob(".step_*"))
    same_curve(output, whole)


@pytest.mark.parametrize("how", ["missing", "corrupt", "cut short"])
def test_a_bad_newest_checkpoint_falls_back_to_the_one_before(
    store: Path, whole: Path, tmp_path: Path, how: str
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    newest = sorted((output / "checkpoints").glob("step_*"))[-1]
    state = newest / "state.safetensors"
    if how == "missing":
        state.unlink()
    else:
        content = bytearray(state.read_bytes())
        content[-1000] ^= 1
        state.write_bytes(content if how == "corrupt" else content[:-1000])
    done = run(command(store, output))
    assert f"{newest} is damaged" in done.stderr
    assert "using the previous one" in done.stderr
    same_curve(output, whole)


@pytest.mark.parametrize(("number", "stage", "tolerance"), [(signal.SIGTERM, 1, 1e-6), (signal.SIGUSR1, 3, 1e-5)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_asks_to_be_requeued(
    store: Path, whole: Path, tmp_path: Path, number: signal.Signals, stage: int, tolerance: float
) -> None:
    output = tmp_path / "run"
    process = Command(command(store, output, "training.checkpoint_every=1000"))
    wait_for_step(output, 3)
    os.kill(process.pid, number)
    done = process.wait()
    assert done.returncode == 75
    assert "the same command resumes" in done.stdout
    assert len(list((output / "checkpoints").glob("step_*"))) == 1
    # It may continue at another ZeRO stage, where sums are rounded differently.
    assert run(command(store, output, f"training.zero.stage={stage}")).returncode == 0
    same_curve(output, whole, tolerance)


def test_a_reading_process_that_dies_is_one_line(store: Path, tmp_path: Path) -> None:
    body = (
        "import os; from ctclip.preprocessing.store import VolumeStore; real, calls = VolumeStore.read_into, []\n"
        "def dying(self, *a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 6: os.kill(os.getpid(), 9)\n"
        "    return real(self, *a, **k)\n"
        "VolumeStore.read_into = dying"
    )
    done = run(command(store, tmp_path / "run", "data.workers=1"), body)
    assert "a data-loading process died" in last_line(done)


def test_a_volume_that_vanished_is_named(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(store, mine)
    victim = sorted((mine / "volumes").glob("train*.b2nd"))[3]
    body = (
        "import os; import ctclip.training.loop as l; real = l._next\n"
        f"def vanished(stream):\n    os.path.exists({str(victim)!r}) and os.unlink({str(victim)!r})\n    return real(stream)\n"
        "l._next = vanished"
    )
    done = run(command(mine, tmp_path / "run", "data.workers=1"), body)
    said = last_line(done)
    assert victim.name in said
    assert "run `ctclip preprocess` again" in said


def test_a_full_disk_keeps_the_checkpoint_before(store: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the second checkpoint ends in the middle."""
    body = (
        "import resource as r, signal; import ctclip.training.checkpoints as c; real, calls = c.save_file, []\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def full(state, path):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: r.setrlimit(r.RLIMIT_FSIZE, (20000, r.RLIM_INFINITY))\n"
        "    try: real(state, path)\n"
        "    finally: r.setrlimit(r.RLIMIT_FSIZE, (r.RLIM_INFINITY, r.RLIM_INFINITY))\n"
        "c.save_file = full"
    )
    output = tmp_path / "run"
    said = last_line(run(command(store, output), body))
    assert "File too large" in said
    assert "resumes from the previous checkpoint" in said
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_full_disk_leaves_no_half_model(whole: Path, tmp_path: Path) -> None:
    body = (
        "import resource as r, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "r.setrlimit(r.RLIMIT_FSIZE, (20000, r.RLIM_INFINITY))"
    )
    said = last_line(run(["export", str(whole), "--output", str(tmp_path / "model")], body))
    assert f"{tmp_path / 'model'}: the model could not be written" in said
    assert not list(tmp_path.iterdir())


NOT_FINITE = [
    ("loss is nan", 1, 3, 1),
    *(("gradient is not finite", stage, 3, 1) for stage in (0, 1, 3)),
    # Losses are read from the device only before a checkpoint, by when another step has been made.
    ("gradient is not finite", 0, 2, 1000),
]


@pytest.mark.parametrize(("what", "stage", "step", "log_every"), NOT_FINITE)
def test_what_is_not_a_number_stops_the_run_before_it_is_kept(
    store: Path, tmp_path: Path, what: str, stage: int, step: int, log_every: int
) -> None:
    """In the third or fourth step, before the second checkpoint would be written."""
    body = (
        "import ctclip.objectives.clip as l; real, calls, nan = l.clip, [], float('nan')\n"
        "def bad(*a, **k):\n"
        f"    calls.append(1); loss = real(*a, **k); now = len(calls) == {step + 1}\n"
        f"    if now and {'gradient' in what}: loss.register_hook(lambda gradient: gradient * nan)\n"
        f"    return loss * nan if now and {'loss' in what} else loss\n"
        "l.clip = bad"
    )
    output = tmp_path / "run"
    more = ("training.text_warmup.steps=0", f"training.zero.stage={stage}", f"training.log_every={log_every}")
    line = last_line(run(command(store, output, *more), body))
    assert f"the {what} at step {step}" in line
    kept = output / "checkpoints" / "step_00000002"
    assert f"the last good checkpoint is {kept}" in line
    assert list((output / "checkpoints").iterdir()) == [kept]
    assert all(value.isfinite().all() for value in load_file(kept / "state.safetensors").values())


def test_a_loss_that_grows_stops_the_run(store: Path, tmp_path: Path) -> None:
    """A loss that is ten times larger from step 23 on is noticed a few steps later, and later checkpoints do not count
    as good."""
    body = (
        "import ctclip.objectives.clip as l; real, calls = l.clip, []\n"
        "def growing(*a, **k): calls.append(1); return real(*a, **k) * (10 if len(calls) > 22 else 1)\n"
        "l.clip = growing"
    )
    output = tmp_path / "run"
    more = (
        "training.text_warmup.steps=0",
        "training.epochs=24",
        "training.checkpoint_every=1",
        "training.keep_checkpoints=20",
    )
    said = last_line(run(command(store, output, *more), body))
    found = re.search(
        r"the loss has grown to \S+ at step (\d+) .*the last good checkpoint is (\S+): remove the later ones", said
    )
    assert found, said
    assert 23 <= int(found[1]) < 40
    good = int(Path(found[2]).name.removeprefix("step_"))
    assert 22 <= good < int(found[1])
    assert Path(found[2]).is_dir()


def test_objectives_that_join_after_the_labels_are_no_rise(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = (
        "training.text_warmup.steps=0",
        "training.epochs=24",
        "objectives={clip: {weight: 5, begin: 0.5}, labels: 1}",
    )
    done = run(command(store, output, *more))
    assert done.returncode == 0, done.stderr[-2000:]
    found = list(losses(output).values())
    alone, joined = found[: len(found) // 2], found[len(found) // 2 :]
    # If the check compared both losses as one, it would have stopped the run.
    watch = Divergence()
    assert any(watch.seen(loss) > 1 for loss in found)
    assert max(alone) < min(joined)


def test_what_a_rise_of_the_loss_is() -> None:
    watch = Divergence()
    assert all(watch.seen(3.5 - 0.01 * step) <= 0 for step in range(200))
    assert not any(watch.seen(loss) > 0.5 for loss in (9.0, 2.0, 2.0))
    assert any(watch.seen(12.0) > 1 for _ in range(40))


def test_a_checkpoint_of_another_spec_is_refused(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for facts in (output / "checkpoints").glob("*/checkpoint.json"):
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "spec": "000000000000"}))
    assert "was trained on volumes of spec 000000000000" in last_line(run(command(store, output)))


def test_another_configuration_is_refused_unless_forced(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    changed = command(store, output, "training.gradient_clip=0.5", "training.epochs=5")
    said = last_line(run(changed))
    assert "differs in training.epochs, training.gradient_clip" in said
    assert "--force" in said
    assert run([*changed, "--force"]).returncode == 0
    assert len(losses(output)) > len(losses(whole))


def test_a_second_training_in_one_process(store: Path, tmp_path: Path) -> None:
    """As in a notebook: DeepSpeed would look for process groups of the first training that no longer exist."""
    first = (
        "from pathlib import Path; from ctclip.config_files import load_config; from ctclip.training.loop import train; "
        f"train(load_config('phantom_tiny', {SETTINGS}, {{'data.store': {str(store)!r}}}), Path({str(tmp_path / 'first')!r}))"
    )
    typed = (
        f"from ctclip.cli import main; assert main({command(store, tmp_path / 'typed')!r}) == 0; print('still here')"
    )
    done = run(command(store, tmp_path / "second"), f"{first}; {typed}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "still here" in done.stdout
    assert losses(tmp_path / "second") == losses(tmp_path / "typed") == losses(tmp_path / "first")


def test_other_data_are_refused_unless_forced(store: Path, whole: Path, tmp_path: Path) -> None:
    """The model card then counts the volumes from before and after the change."""
    output, fewer = tmp_path / "run", tmp_path / "fewer"
    shutil.copytree(whole, output)
    shutil.copytree(store, fewer)
    table = pd.read_parquet(store / "cohort.parquet")
    training = table.index[table["split"] == "train"]
    table.drop(training[:2]).to_parquet(fewer / "cohort.parquet")
    longer = "training.epochs=5"
    said = last_line(run(command(fewer, output)))
    assert "2 volumes are gone" in said
    assert "--force" in said
    assert run(command(fewer, output, longer, "--force")).returncode == 0
    assert f"Trained on {len(training)} volumes" in (output / "model" / "model_card.md").read_text()


def test_reports_that_are_all_the_same_are_refused_at_the_start(store: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(store, same)
    table = pd.read_parquet(store / "cohort.parquet")
    table["findings"], table["impression"] = "Normal chest CT.", "No acute disease."
    table.to_parquet(same / "cohort.parquet")
    said = last_line(run(command(same, tmp_path / "run")))
    assert "have the same text" in said
    assert "learning_rate" not in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_prompts_that_are_not_there_are_named_before_the_first_step(store: Path, tmp_path: Path) -> None:
    """The model folder includes them at the end."""
    said = run(command(store, tmp_path / "run", "prompts=reportstyle"))
    assert said.returncode == 2
    assert "'reportstyle'" in last_line(said)
    assert "report_style" in last_line(said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


CANNOT_BE = [
    ("fewer scans than a batch", ["training.batch=500"], "training.batch="),
    ("a batch that cannot be cut", ["training.micro_batch=3"], "training.micro_batch=3"),
    ("no such split", ["training.validate_every=1", "data.valid_split=dev"], "data.valid_split"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "reason"), [row[1:] for row in CANNOT_BE], ids=[row[0] for row in CANNOT_BE])
def test_what_cannot_be_trained_is_told_before_the_warm_up(
    settings: list[str], reason: str, store: Path, tmp_path: Path
) -> None:
    done = run(command(store, tmp_path / "run", *settings))
    assert done.returncode == 2, done.stderr[-3000:]
    assert reason in last_line(done)
    assert "text warm-up" not in done.stderr


def test_a_checkpoint_of_another_model_is_one_line(store: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    newest = sorted((output / "checkpoints").iterdir())[-1]
    save_file({"a": torch.zeros(2)}, newest / "state.safetensors")
    facts = json.loads((newest / "checkpoint.json").read_text())
    facts["crc32"] = zlib.crc32((newest / "state.safetensors").read_bytes())
    (newest / "checkpoint.json").write_text(json.dumps(facts))
    said = last_line(run(command(store, output)))
    assert str(output / "checkpoints") in said
    assert "does not fit" in said


def test_a_run_is_exported_from_another_folder_without_the_prompts_it_was_given(store: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    prompts = "name: mine\ntemplates:\n  positive: {findings: ['Here is {x}.']}\n  negative: {findings: ['Here is no {x}.']}\n"
    (tmp_path / "here" / "mine.yaml").write_text(prompts)
    there = f"import os; os.chdir({str(tmp_path / 'here')!r})"
    done = run(command(store, tmp_path / "run", "prompts=mine.yaml", "training.epochs=0.5"), there)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "here" / "mine.yaml").unlink()
    done = run(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model")])
    assert done.returncode == 0, done.stderr[-3000:]
    head = "heads/prompts/prompts.yaml"
    assert "Here is no {x}." in (tmp_path / "model" / head).read_text()
    assert (tmp_path / "model" / head).read_text() == (tmp_path / "run" / "model" / head).read_text()


def test_a_second_run_in_one_folder_is_refused(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ("training.epochs=3000", "training.checkpoint_every=100")
    process = Command(command(store, output, *more))
    wait_for_step(output, 1)
    said = last_line(run(command(store, output, *more)))
    assert "another run is using this folder" in said
    assert f"process {process.pid}" in said
    # A model can be exported while the run is in progress.
    wait_for_step(output, 101)
    exported = run(["export", str(output), "--output", str(tmp_path / "model")])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert exported.returncode == 0, exported.stderr
    assert Model.from_pretrained(str(tmp_path / "model"))


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
    # Validation does not change the training.
    assert losses(output) == pytest.approx(losses(whole), abs=1e-6)
    exported = run(["export", str(output), "--checkpoint", "best", "--output", str(tmp_path / "m")])
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "m" / "model.safetensors").is_file()
    absent = run(["export", str(whole), "--checkpoint", "best", "--output", str(tmp_path / "n")])
    assert absent.returncode == 2
    assert "validate_every" in absent.stderr
