"""What an interrupted training of a locator resumes from: the locator after its last complete stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ctclip.errors import CheckpointError
from ctclip.heads.head import DAMAGED
from ctclip.heads.locator import Locator, built
from ctclip.preprocessing.files import written_beside

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
    tensors = {name: value.cpu().contiguous() for name, value in stages.locator.state_dict().items()}
    with written_beside(path) as partial:
        save_file(tensors, partial, {"key": key, "facts": json.dumps(facts)})


def resumed(path: Path, key: str, device: torch.device) -> Stages | None:
    """The stages of an interrupted run with the same ``key``; None if there is none. Raises CheckpointError if the file
    is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as state:
            kept = state.metadata() or {}
            if kept.get("key") != key:
                return None
            facts = json.loads(kept["facts"])
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118 (not a dict)
        locator = built(facts["size"], tensors).to(device)
        return Stages(locator, [tuple(row) for row in facts["losses"]], facts["rounds"], facts["refused"])  # type: ignore[misc]
    except DAMAGED as error:
        raise CheckpointError(f"{path}: damaged; delete it and run the same command again") from error
