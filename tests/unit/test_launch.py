"""Which processes a launch starts: all cards of a machine, or two on its processor."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import pytest
import torch

from ctclip import distributed
from ctclip.demo import default_processes


class Recorded:
    """Stands for the launcher's process; keeps what it was started with."""

    pid = 0
    started: tuple[list[str], dict[str, str]] | None = None

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        Recorded.started = command, env

    def wait(self) -> int:
        return 0


@pytest.mark.parametrize(("cards", "expected"), [(4, ["--num_gpus", "4"]), (0, ["--num_accelerators", "2"])])
def test_a_launch_takes_every_card_or_two_processes(cards: int, expected: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["ctclip", "train", "--config", "phantom_tiny"])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert distributed.launch(default_processes(), "ctclip.train") == 0
    assert Recorded.started is not None
    command, environment = Recorded.started
    place = command.index(expected[0])
    assert command[place : place + 2] == expected
    assert command[-4:] == ["--module", "ctclip.train", "--config", "phantom_tiny"]
    assert ("DS_ACCELERATOR" in environment) == (cards == 0)
