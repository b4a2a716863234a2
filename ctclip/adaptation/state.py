"""Tensors that an interrupted run resumes from, with a checksum: a file may lie on a disk for days."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.head import DAMAGED
from ctclip.preprocessing.files import written_beside


def write_state(path: Path, key: str, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """Write tensors and ``facts`` (for JSON) of the run ``key``, atomically."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    kept = {"key": key, "facts": facts}
    kept["sha256"] = _sha256(plain, kept)
    with written_beside(path) as partial:
        # One entry: safetensors writes several in any order, and equal states are to be equal files.
        save_file(plain, partial, {"state": json.dumps(kept)})


def read_state(path: Path, key: str) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors and facts of the run ``key``; None if there are none. Raises CheckpointError if the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as state:
            kept = json.loads((state.metadata() or {})["state"])
            if kept["key"] != key:
                return None
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118 (not a dict)
        if kept.pop("sha256") != _sha256(tensors, kept):
            raise ValueError("its contents do not match its SHA-256")
        return tensors, kept["facts"]
    except DAMAGED as error:
        raise damaged(path) from error


def damaged(path: Path) -> CheckpointError:
    """The error for a state that cannot be used."""
    return CheckpointError(f"{path}: damaged; delete it and run the same command again")


def _sha256(tensors: Mapping[str, Tensor], kept: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
