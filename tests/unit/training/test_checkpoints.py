"""Checkpoints are written atomically during training; the newest and the best are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctclip.errors import CheckpointError
from ctclip.training import checkpoints as module
from ctclip.training.checkpoints import Checkpoints
from ctclip.training.state import check_fits

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


@pytest.mark.parametrize("facts", ["[]", "null", "3", '"text"', "{}", f'{{"valid_loss": {10**400}}}'])
def test_facts_of_another_kind_are_damage(facts: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, "spec")
    for step in (1, 2):
        checkpoints.save(step, STATE)
    checkpoints.wait()
    (tmp_path / "step_00000002" / "checkpoint.json").write_text(facts)
    assert checkpoints.newest()[0] == 1
    assert checkpoints.best() is None


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3, "spec")
    for step, loss in ((1, 2.0), (2, 1.0), (3, float("nan"))):
        checkpoints.save(step, STATE, loss)
    checkpoints.wait()
    assert checkpoints.best() == tmp_path / "step_00000002"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.update({"state/bias": torch.zeros(4)}), "bias"),
        (lambda state: state.pop("state/weight"), "weight"),
        (lambda state: state.update({"state/other": torch.zeros(1)}), "other"),
        (lambda state: state.pop("optimizer_step"), "optimizer_step"),
    ],
)
def test_a_whole_checkpoint_of_another_model_is_named(change: Callable[[dict], object], named: str) -> None:
    module = torch.nn.Linear(2, 3)
    state = {f"state/{name}": value for name, value in module.state_dict().items()} | {"optimizer_step": torch.ones(())}
    check_fits(module, state, "RUN")
    change(state)
    with pytest.raises(CheckpointError, match=rf"^RUN: .*\({named}\)") as refused:
        check_fits(module, state, "RUN")
    assert "\n" not in str(refused.value)


def test_a_write_that_failed_is_told_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", 2, "spec")
    checkpoints.save(1, STATE)
    with pytest.raises(OSError, match="file"):
        checkpoints.save(2, STATE)
