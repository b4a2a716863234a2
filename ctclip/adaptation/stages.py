"""What an interrupted training of a locator resumes from: the locator after its last complete stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ctclip.adaptation.state import read_state, write_state
from ctclip.heads.locator import Locator, built

STATE = "locate.state.safetensors"


@dataclass(frozen=True)
class Stages:
    """The locator after its first stage and ``rounds`` rounds, the rows of ``locate.csv`` so far, and the reasons why
    volumes were refused."""

    locator: Locator
    losses: list[tuple[str, float, float, float]]
    rounds: int
    refused: dict[str, str]


def save_stages(path: Path, key: str, stages: Stages) -> None:
    """Write the stages of the run ``key``, atomically."""
    facts = {"size": stages.locator.size, "losses": stages.losses, "rounds": stages.rounds, "refused": stages.refused}
    write_state(path, key, stages.locator.state_dict(), facts)


def resumed(path: Path, key: str, device: torch.device) -> Stages | None:
    """The stages of an interrupted run with the same ``key``; None if there is none. Raises CheckpointError if the file
    is damaged."""
    kept = read_state(path, key)
    if kept is None:
        return None
    tensors, facts = kept
    losses = [(str(stage), *numbers) for stage, *numbers in facts["losses"]]
    return Stages(built(facts["size"], tensors).to(device), losses, facts["rounds"], facts["refused"])
