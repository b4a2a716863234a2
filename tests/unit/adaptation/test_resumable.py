"""Training that can be killed: a resumed run produces identical files, and one that diverges keeps its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ctclip.adaptation import resumable
from ctclip.adaptation.resumable import Schedule, rows_of, train_resumably
from ctclip.errors import CheckpointError, TrainingError


def test_a_killed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "SAVE_EVERY_SECONDS", 0.0)
    inputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))

    def train(state: Path, key: str = "a", stop: int | None = None) -> list[float]:
        torch.manual_seed(1)
        network = nn.Linear(3, 1)
        calls = iter(range(1000))

        def loss(rows: torch.Tensor) -> torch.Tensor:
            if next(calls) == stop:
                raise KeyboardInterrupt
            return (network(inputs[rows] + 0.1 * torch.randn(len(rows), 3)) - inputs[rows, :1]).square().mean()

        def batches(begin: int) -> list[torch.Tensor]:
            return [torch.from_numpy(rows_of(step, 20, 6, 0)) for step in range(begin, 12)]

        schedule = Schedule(12, 0.1, 0.01, average=0.9)
        losses = train_resumably(network, loss, batches, schedule, state, key=key, seed=0, what="test")
        save_file(network.state_dict(), state.with_suffix(".end"))
        return losses

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", stop=7)
    assert len(load_file(tmp_path / "killed")["losses"]) == 7
    assert train(tmp_path / "killed") == whole
    for suffix in ("", ".end"):
        assert (tmp_path / f"killed{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert train(tmp_path / "killed", stop=0) == whole, "a run that has ended is not repeated"
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", key="b", stop=0)
    (tmp_path / "killed").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged; delete it"):
        train(tmp_path / "killed")


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_training_that_diverges_keeps_its_last_weights(part: str, tmp_path: Path) -> None:
    network, calls = nn.Linear(1, 1), iter(range(100))

    def loss(one: torch.Tensor) -> torch.Tensor:
        value = network(one).sum()
        if next(calls) < 2:
            return value
        # The gradient of a square root at 0 is infinite.
        return value * float("nan") if part == "loss" else (value - value).sqrt() + value.detach()

    with pytest.raises(
        TrainingError, match=r"^test: the loss or its gradient is not a number; set a learning rate below 0.0"
    ):
        train_resumably(
            network,
            loss,
            lambda _: [torch.ones(1)] * 5,
            Schedule(5, 0.1),
            tmp_path / "state",
            key="a",
            seed=0,
            what="test",
        )
    assert all(value.isfinite().all() for value in network.parameters())


def test_every_volume_is_learned_once_an_epoch() -> None:
    rows = np.concatenate([rows_of(step, 10, 4, 0) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
