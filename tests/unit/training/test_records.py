"""The records of a run: ``metrics.jsonl``, TensorBoard events, and Weights & Biases if installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ctclip.cli import main
from ctclip.config import Config
from ctclip.config_files import load_config
from ctclip.errors import TrainingError
from ctclip.training.records import MetricsLog, open_run


def test_a_resumed_log_has_one_line_a_step_on_disk_and_in_tensorboard(tmp_path: Path) -> None:
    """Killed after step 3, and continued from a checkpoint before step 2; the last lines are damaged."""
    log = MetricsLog(tmp_path, 0)
    for step in range(4):
        log.write(step, {"loss": 10.0 + step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": Infinity}\n' + b"[" * 100_000 + b'\n\xff\xfe\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2)
    for step in (2, 3):
        log.write(step, {"loss": 20.0 + step, "note": "not a number"})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 10.0), (1, 11.0), (2, 22.0), (3, 23.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/total")] == [(0, 10), (1, 11), (2, 22), (3, 23)]


def test_scalars_are_grouped_and_hyper_parameters_kept(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, config=load_config("phantom_tiny"))
    log.write(0, {"loss": 2.0, "clip": 1.5, "learning_rate": 1e-3, "volumes_per_second": 3.0, "epoch": 0.0})
    log.write(0, {"valid_loss": 2.5, "valid_auroc": 0.6, "valid_recall@10": 0.2})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {
        "loss/total", "loss/clip", "optimiser/learning_rate", "speed/volumes_per_second", "progress/epoch",
        "valid/loss", "valid/auroc", "valid/recall@10",
    }  # fmt: skip
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["training.batch"].number_value == load_config("phantom_tiny").training.batch
    assert started.hparams["model.volume.kind"].string_value == "vit3d"


def test_a_run_records_the_words_that_were_passed_and_not_those_of_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in a notebook: ``sys.argv`` is the command line of its kernel."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])

    def recorded(config: Config, output: Path, *, force: bool = False) -> Path:
        open_run(output, config, force=force)
        return output

    def command(folder: Path) -> Any:
        return json.loads((folder / "run.json").read_text())["command"]

    monkeypatch.setattr("ctclip.training.loop.train", recorded)
    words = ["train", "--config", "phantom_tiny", "--store", "a store", "--output", str(tmp_path / "a"), "seed=3"]
    assert main([*words, "--debug"]) == 0
    assert command(tmp_path / "a") == ["ctclip", *words, "--debug"]
    recorded(load_config("phantom_tiny"), tmp_path / "b")
    assert command(tmp_path / "b") is None
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ctclip", *words[:-2], str(tmp_path / "c")])
    assert main() == 0
    assert command(tmp_path / "c") == ["ctclip", *words[:-2], str(tmp_path / "c")]


def test_weights_and_biases_gets_the_same_and_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsLog(tmp_path / "without", 0, "project").close()
    assert "wandb is not installed" in capsys.readouterr().err
    said: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: said.append((step, values)), finish=lambda: said.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: said.append(given) or run))
    log = MetricsLog(tmp_path / "with", 0, "project")
    log.write(7, {"loss": 1.5})
    log.close()
    assert said[0]["project"] == "project"
    assert said[1:] == [(7, {"loss": 1.5}), "finished"]
    for folder in (tmp_path / "with", tmp_path / "other" / "with"):
        MetricsLog(folder, 0, "project").close()
    identities = [given["id"] for given in said if isinstance(given, dict)]
    assert identities[0] == identities[1] != identities[2]


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.path = Path("/dev/full")
    with pytest.raises(TrainingError, match=r"full: could not be written \(No space left on device\); free some space"):
        log.write(0, {"loss": 1.0})
    log.close()
