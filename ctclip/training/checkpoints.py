"""Checkpoints: one safetensors file of whole tensors, so that any number of ranks and any ZeRO stage can resume.

Batches, report views and dropout are functions of (seed, step), so parameters, optimizer moments and the step
are all there is to keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctclip import distributed

NAME = re.compile(r"step_(\d{8})")


class Checkpoints:
    """``folder/step_00000500/``: ``state.safetensors`` and ``checkpoint.json``; the newest ``keep`` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, torch.Tensor]) -> None:
        """Write the state after ``step`` steps, whole or not at all, and remove those too old. For rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".step_", suffix=".partial", dir=self.folder))
        try:
            save_file(state, partial / "state.safetensors")
            facts = {"step": step, "crc32": _crc32(partial / "state.safetensors")}
            (partial / "checkpoint.json").write_text(json.dumps(facts))
            partial.chmod(0o755)
            final = self.folder / f"step_{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for _, old in self._found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Step and state of the newest whole checkpoint; (0, {}) if there is none.

        A damaged one is named on stderr and the one before it is taken. Every rank reads the same one.
        """
        for step, path in distributed.broadcast_object(self._found()):
            fault = distributed.broadcast_object(_fault(path) if distributed.is_main() else None)
            if fault is None:
                return step, load_file(path / "state.safetensors")
            if distributed.is_main():
                print(
                    f"warning: checkpoint {path} is damaged ({fault}); going back to the one before",
                    file=sys.stderr,
                )
        return 0, {}

    def _found(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        named = [(NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _fault(path: Path) -> str | None:
    state = path / "state.safetensors"
    try:
        facts = json.loads((path / "checkpoint.json").read_text())
        if facts["crc32"] != _crc32(state):
            return "its checksum does not match"
        load_file(state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
