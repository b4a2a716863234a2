"""Checkpoints are written beside training, whole or not at all; the newest and the best are kept."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ctclip.training import checkpoints as module
from ctclip.training.checkpoints import Checkpoints

STATE = {"weight": torch.arange(6.0)}


def steps(checkpoints: Checkpoints) -> list[int]:
    return [step for step, _ in checkpoints.found()]


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, real = threading.Event(), module.save_file

    def slow(*given: Any) -> None:
        assert disk.wait(30)
        real(*given)

    monkeypatch.setattr(module, "save_file", slow)
    checkpoints = Checkpoints(tmp_path, 2, "spec")
    checkpoints.save(5, STATE)
    assert steps(checkpoints) == []
    disk.set()
    checkpoints.wait()
    step, state = checkpoints.newest()
    assert step == 5
    assert torch.equal(state["weight"], STATE["weight"])


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, "spec")
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 2.5, None), start=1):
        checkpoints.save(step, STATE, loss)
    checkpoints.wait()
    assert steps(checkpoints) == [6, 5, 2]
    assert checkpoints.best() == tmp_path / "step_00000002"


def test_a_write_that_failed_is_told_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", 2, "spec")
    checkpoints.save(1, STATE)
    with pytest.raises(OSError, match="file"):
        checkpoints.save(2, STATE)
