"""One tiny run that every end-to-end test shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import made_once
from ..robustness.processes import Command, Done

TINY = ["training.text_warmup.steps=3", "training.text_warmup.batch=8", "training.epochs=2", "training.batch=4", "training.log_every=1", "training.checkpoint_every=2",
        "model.volume.stages=[[8,0],[16,0]]", "model.volume.width=24", "model.volume.heads=2", "model.text.width=16",
        "model.text.heads=2", "model.text.depth=1", "data.workers=0"]  # fmt: skip


def run(*words: object, folder: Path | None = None) -> Done:
    """Run ``ctclip WORDS`` in a separate process, in ``folder`` if the folder matters."""
    return Command([str(word) for word in words], f"import os; os.chdir({str(folder or '.')!r})").wait(900)


def typed(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE WORDS`` in a new interpreter, which takes ten seconds more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


@pytest.fixture(scope="session")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def train(output: Path) -> None:
        done = typed("ctclip.train", "--config", "phantom_tiny", "--store", store, "--output", output, *TINY)
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once(tmp_path_factory, "run", train)
