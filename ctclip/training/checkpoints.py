"""Checkpoints: one safetensors file of whole tensors, so that any number of ranks and any ZeRO stage can resume.

Batches, report views and dropout are functions of (seed, step), so only parameters, optimizer moments and the step must
be saved.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctclip import distributed
from ctclip.errors import CheckpointError
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import flush, regular

NAME = re.compile(r"step_(\d{8})")


class Checkpoints:
    """``folder/step_00000500/``: ``state.safetensors`` and ``checkpoint.json``.

    The ``keep`` newest checkpoints and the best (lowest ``valid_loss``) are kept. A thread writes the files while
    training continues; ``wait`` joins it.
    """

    def __init__(self, folder: Path, keep: int, spec: str) -> None:
        """``spec``: hash of the preprocessing spec of the run; checkpoints of another spec are refused."""
        self.folder = folder
        self.keep = keep
        self.spec = spec
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def save(self, step: int, state: dict[str, torch.Tensor], valid_loss: float | None = None) -> None:
        """Write the state after ``step`` steps atomically, and remove old checkpoints. Called on rank 0.

        ``state`` must not change afterwards, because it is written while training continues. Raises the error of the
        previous write, if any.
        """
        self.wait()
        self.pending = self.writer.submit(self._write, step, state, valid_loss)

    def wait(self) -> None:
        """Wait until the last write has ended; raises if it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for a write in progress to end, whether it succeeds or not."""
        self.writer.shutdown()

    def _write(self, step: int, state: dict[str, torch.Tensor], valid_loss: float | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step_*.partial"):
            # Temporary folders of a run that was killed while writing.
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".step_", suffix=".partial", dir=self.folder))
        try:
            save_file(state, partial / "state.safetensors")
            facts = {
                "step": step,
                "crc32": _crc32(partial / "state.safetensors"),
                "valid_loss": valid_loss,
                "spec": self.spec,
            }
            (partial / "checkpoint.json").write_text(json.dumps(facts))
            for path in partial.iterdir():
                flush(path)
            partial.chmod(0o755)
            final = self.folder / f"step_{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({' '.join(str(error).split())[-160:]}); "
                f"free some space and start the same command again: it resumes from the previous checkpoint"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        best = self.best()
        for _, old in self.found()[self.keep :]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss, or None if none was validated."""
        losses = {path: _valid_loss(path) for _, path in self.found()}
        known = {path: loss for path, loss in losses.items() if loss is not None}
        return min(known, key=lambda path: known[path]) if known else None

    def newest(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Step and state of the newest complete checkpoint; (0, {}) if there is none.

        A damaged one is named on stderr and the previous one is used. All ranks read the same one.
        """
        for step in distributed.broadcast_json([step for step, _ in self.found()]):
            path = self.folder / f"step_{step:08d}"
            fault = distributed.broadcast_json(_fault(path) if distributed.is_main() else None)
            if fault is None:
                learned = plain_json.read(path / "checkpoint.json").get("spec", self.spec)
                if learned != self.spec:
                    raise CheckpointError(
                        f"{path}: was trained on volumes of spec {learned}, but this store holds {self.spec}; name the store of "
                        f"the run, or another --output"
                    )
                return step, load_file(path / "state.safetensors")
            if distributed.is_main():
                print(
                    f"warning: checkpoint {path} is damaged ({fault}); using the previous one",
                    file=sys.stderr,
                )
        return 0, {}

    def found(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, the newest first."""
        if not self.folder.is_dir():
            return []
        named = [(NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state of one checkpoint folder. Raises CheckpointError if it is damaged."""
    fault = _fault(path)
    if fault is not None:
        raise CheckpointError(f"{path}: this checkpoint is damaged ({fault}); choose another one in the folder")
    return load_file(path / "state.safetensors")


def _valid_loss(path: Path) -> float | None:
    try:
        value = plain_json.read(path / "checkpoint.json").get("valid_loss")
    except UNFIT:
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _fault(path: Path) -> str | None:
    state = path / "state.safetensors"
    try:
        facts = plain_json.read(path / "checkpoint.json")
        if facts["crc32"] != _crc32(state):
            return "its checksum does not match"
        load_file(state)
    except (*UNFIT, SafetensorError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _crc32(path: Path) -> int:
    value = 0
    with regular(path).open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
