"""Small runs on the cohort of the tests: their commands and their outputs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ..end_to_end.conftest import TINY
from .processes import Command, Done

# A low learning rate keeps rounding errors small.
SETTINGS = [*TINY, "training.epochs=4", "training.learning_rate=1e-4", "training.text_learning_rate=1e-4"]
# Records every batch that the engine receives.
RECORDED = """
import json, os, zlib; from ctclip.training.engine import Engine; step_ = Engine.step
def recording(self, batch, number, steps):
    seen = [number, zlib.crc32(batch.volumes.numpy().tobytes()), batch.text_identities.tolist(), batch.scans.tolist()]
    with open(os.environ["BATCHES"], "a") as stream: stream.write(json.dumps(seen) + "\\n")
    return step_(self, batch, number, steps)
Engine.step = recording
"""


def command(store: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--config", "phantom_tiny", "--store", str(store), "--output", str(output), *SETTINGS, *more]


def run(arguments: list[str], patch: str = "") -> Done:
    return Command(arguments, patch).wait()


def recorded(path: Path) -> str:
    return f"import os; os.environ['BATCHES'] = {str(path)!r}{RECORDED}"


def batches(path: Path) -> dict[int, list[object]]:
    """The last batch of each step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {number: rest for number, *rest in lines}


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for_step(output: Path, step: int) -> None:
    ends = time.monotonic() + 600
    while time.monotonic() < ends:
        path = output / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") > step:
            return
        time.sleep(0.01)
    raise AssertionError("the training ended before this step")


def last_line(done: Done) -> str:
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def same_curve(output: Path, whole: Path, tolerance: float = 1e-6) -> None:
    assert losses(output).keys() == losses(whole).keys()
    assert losses(output) == pytest.approx(losses(whole), abs=tolerance)
    assert (output / "model" / "model.safetensors").is_file()
