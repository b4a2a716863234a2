"""Real DeepSpeed processes: two ranks, every ZeRO stage and two-pass gradients compute what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctclip.distributed import free_port

WORKER = Path(__file__).with_name("worker.py")


def train(tmp_path: Path, processes: int, name: str, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    output = tmp_path / f"{name}.safetensors"
    given = {"zero": {"stage": 0}, "steps": 5, "output": str(output), **settings}
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(free_port()),
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(WORKER), json.dumps(given)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return losses, load_file(output)


def assert_same(one, two, tolerance: float) -> None:
    assert one[0] == pytest.approx(two[0], rel=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, value in one[1].items():
        assert torch.allclose(value.float(), two[1][name].float(), atol=tolerance), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    return train(tmp_path_factory.mktemp("alone"), 1, "alone")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_one_process(tmp_path, alone, stage: int) -> None:
    assert_same(train(tmp_path, 2, "two", zero={"stage": stage}), alone, 1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_to_the_host_is_the_same(tmp_path, alone, stage: int) -> None:
    assert_same(train(tmp_path, 2, "offload", zero={"stage": stage, "offload": True}), alone, 1e-5)


@pytest.mark.parametrize(("before", "after"), [((1, 0), (2, 3)), ((2, 3), (1, 0)), ((2, 2), (1, 3)), ((1, 1), (2, 2))])
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(tmp_path, alone, before, after) -> None:
    """(ranks, ZeRO stage) of the first three steps, and of the last two."""
    losses, _ = train(tmp_path, before[0], "before", zero={"stage": before[1]}, until=3)
    resume = str(tmp_path / "before.safetensors")
    more, state = train(tmp_path, after[0], "after", zero={"stage": after[1]}, resume=resume, **{"from": 3})
    assert_same((losses + more, state), alone, 1e-5)


def test_bfloat16_is_near_and_keeps_float32_masters(tmp_path, alone) -> None:
    near = train(tmp_path, 2, "bf16", precision="bf16", zero={"stage": 2})
    assert near[0] == pytest.approx(alone[0], rel=0.05)
    assert near[0] != alone[0]
    assert all(value.dtype != torch.bfloat16 for value in near[1].values())


@pytest.mark.parametrize("how", ["checkpointed", "compile"])
def test_activation_checkpointing_and_compilation_change_nothing(tmp_path, alone, how: str) -> None:
    assert_same(train(tmp_path, 2, how, zero={"stage": 2}, **{how: True}), alone, 1e-5)


def test_the_text_warm_up_is_the_same_on_two_ranks(tmp_path, alone) -> None:
    one = train(tmp_path, 1, "one", warm_up=True)
    # Eight Adam steps in a row let rounding grow a little more than five do.
    assert_same(train(tmp_path, 2, "two", warm_up=True), one, 2e-4)
    assert one[0][0] != pytest.approx(alone[0][0], rel=1e-4)


def test_two_pass_gradients_are_refused_where_they_would_not_be_exact(tmp_path) -> None:
    with pytest.raises(AssertionError, match="batch norm"):
        train(tmp_path, 1, "refused", micro_batch=2)


def test_two_pass_gradients_are_the_plain_step(tmp_path) -> None:
    """After one step Adam's first moment is a tenth of the gradient: nothing has amplified rounding yet."""
    settings = {"linear": True, "steps": 1}
    plain = train(tmp_path, 1, "plain", **settings)
    for name, processes, stage in (("chunks", 1, 0), ("chunks2", 2, 2)):
        chunked = train(tmp_path, processes, name, micro_batch=2, zero={"stage": stage}, **settings)
        assert chunked[0] == pytest.approx(plain[0], rel=1e-6)
        moments = [key for key in plain[1] if key.startswith("exp_avg/")]
        assert len(moments) > 20
        for key in moments:
            assert torch.allclose(chunked[1][key], plain[1][key], atol=1e-6), key
