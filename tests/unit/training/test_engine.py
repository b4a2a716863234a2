"""A step with a non-finite gradient changes no parameter, and is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import json, math, sys
import torch
from ctclip import distributed
from ctclip.config import Config
from ctclip.data.batch import Batch
from ctclip.objectives.objective import Context
from ctclip.training.engine import Engine
from ctclip.training.step import TrainingStep
from tests.unit.small import REPORTS, dual_encoder

def state(engine):
    return {name: value.clone() for name, value in engine.state().items()}

def moved(before, after):
    return [name for name in after if name not in before or not torch.equal(before[name], after[name])]

with distributed.process_group() as device:
    said = {}
    for stage in (0, 1):
        model = dual_encoder()
        training = {"batch": 3, "learning_rate": 1e-3, "zero": {"stage": stage}}
        config = Config.model_validate({"training": training})
        engine = Engine(TrainingStep(Context(model), config.objectives), config, device)
        tokens = [model.text_encoder.tokenise(REPORTS)]
        volumes = torch.rand(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        identities = torch.arange(3)
        # The optimizer has no moments before its first step.
        states = [{name: value.clone() for name, value in engine.parameters().items()}]
        for number, value in enumerate((0.5, math.nan, 0.5)):
            shown = volumes.clone()
            shown[1, 0, 2, 2, 2] = value
            engine.step(Batch(shown, tokens, identities, identities), number, 5)
            states.append(state(engine))
        steps = engine.read()
        said[stage] = {
            "moved": [len(moved(*pair)) for pair in zip(states, states[1:])],
            "parameters": [
                sum(name.startswith("state/") for name in moved(*pair)) for pair in zip(states, states[1:])
            ],
            "finite": all(value.isfinite().all().item() for value in states[-1].values()),
            "losses": [step["loss"] for step in steps],
            "norms": [step["gradient_norm"] for step in steps],
            "rest": engine.read(),
        }
    print(json.dumps(said), file=open(sys.argv[1], "w"))
distributed.leave(0)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Three steps at stages 0 and 1, the second on a volume with a voxel that is not a number."""
    path = tmp_path_factory.mktemp("engine") / "said.json"
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, dict[str, list[float]]] = json.loads(path.read_text())
    return told


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_loss_that_is_no_number_moves_nothing_and_is_told(
    results: dict[str, dict[str, list[float]]], stage: str
) -> None:
    told = results[stage]
    first, wrong, after = told["parameters"]
    assert first > 0
    assert wrong == 0
    assert after > 0
    assert told["moved"][1] == 0, "nor the optimizer's moments"
    assert told["finite"]
    for name in ("losses", "norms"):
        values = told[name]
        assert values[1] != values[1], "NaN"
        assert values[0] == values[0]
        assert values[2] == values[2]
    assert told["rest"] == [], "what was read is not told again"
