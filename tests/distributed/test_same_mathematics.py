"""Real DeepSpeed processes: two ranks, every ZeRO stage and two-pass gradients compute what one process does.

Three launches run all cases: one process, two ranks, and one process again to resume what two ranks left. What they
agree to here is some ten times finer than the bar of 1e-5, so that another processor's rounding does not matter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.integration

WORKER = Path(__file__).with_name("worker.py")
ONE_STEP = {"linear": True, "steps": [0, 1]}
LABELLED = {"objectives": {"clip": 1, "labels": 1, "prompts": 1}}
SENTENCES = {"objectives": {"clip": 1, "sentences": 3}}
QUEUE = {"objectives": {"clip": {"queue": 12}}}
CLIPPED = {**ONE_STEP, "gradient_clip": 0.01}
ALONE: list[dict[str, Any]] = [
    {"name": "alone"},
    {"name": "alone linear", "linear": True},
    {"name": "alone warm", "warm_up": True},
    {"name": "alone with queue", **QUEUE},
    {"name": "alone labelled", **LABELLED},
    {"name": "plain labelled", **LABELLED, **ONE_STEP},
    {"name": "alone sentences", **SENTENCES},
    {"name": "alone locked sentences", **SENTENCES, "locked": True},
    {"name": "refused", "micro_batch": 2},
    {"name": "plain", **ONE_STEP},
    {"name": "chunks", **ONE_STEP, "micro_batch": 2},
    {"name": "clipped", **CLIPPED},
    {"name": "codes", "codes": True},
    {"name": "codes once", "codes": True, **ONE_STEP},
    *({"name": f"one at {stage}", "stage": stage, "steps": [0, 3]} for stage in (0, 1)),
]
TOGETHER: list[dict[str, Any]] = [
    *({"name": f"stage {stage}", "stage": stage} for stage in (0, 1, 2, 3)),
    *({"name": f"offload {stage}", "stage": stage, "offload": True} for stage in (2, 3)),
    *({"name": f"chunks at {stage}", **ONE_STEP, "micro_batch": 2, "stage": stage} for stage in (0, 2, 3)),
    *({"name": f"clipped at {stage}", **CLIPPED, "stage": stage} for stage in (0, 1, 2, 3)),
    {"name": "clipped in chunks", **CLIPPED, "micro_batch": 2, "stage": 2},
    {"name": "clipped and offloaded", **CLIPPED, "stage": 3, "offload": True},
    {"name": "chunks for long", "linear": True, "micro_batch": 1, "stage": 1},
    *({"name": f"two at {stage}", "stage": stage, "steps": [0, 3]} for stage in (2, 3)),
    {"name": "one at 0, two at 3", "resume": "one at 0", "stage": 3, "steps": [3, 5]},
    {"name": "one at 1, two at 2", "resume": "one at 1", "stage": 2, "steps": [3, 5]},
    {"name": "warm", "warm_up": True},
    {"name": "queue", **QUEUE, "stage": 2},
    {"name": "queue before", **QUEUE, "stage": 3, "steps": [0, 3]},
    *({"name": f"labelled {stage}", **LABELLED, "stage": stage} for stage in (1, 3)),
    {"name": "labelled chunks", **LABELLED, **ONE_STEP, "micro_batch": 2, "stage": 3},
    *({"name": f"sentences {stage}", **SENTENCES, "stage": stage} for stage in (1, 3)),
    {"name": "locked sentences", **SENTENCES, "locked": True, "stage": 3},
    {"name": "locked sentences before", **SENTENCES, "locked": True, "stage": 2, "steps": [0, 3]},
    {"name": "codes on two", "codes": True, "stage": 2},
    {"name": "codes in chunks", "codes": True, **ONE_STEP, "micro_batch": 2, "stage": 3, "checkpointed": True},
    {"name": "bf16", "precision": "bf16", "stage": 2},
    {"name": "checkpointed", "checkpointed": True, "stage": 2},
    {"name": "compiled", "compile": True, "stage": 2},
]
ALONE_AGAIN: list[dict[str, Any]] = [
    {
        "name": "locked sentences after",
        **SENTENCES,
        "locked": True,
        "resume": "locked sentences before",
        "steps": [3, 5],
    },
    {"name": "queue after", **QUEUE, "resume": "queue before", "steps": [3, 5]},
    {"name": "two at 3, one at 0", "resume": "two at 3", "stage": 0, "steps": [3, 5]},
    {"name": "two at 2, one at 3", "resume": "two at 2", "stage": 3, "steps": [3, 5]},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, cases in (([], ALONE), (torchrun, TOGETHER), ([], ALONE_AGAIN)):
        (folder / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(folder / "cases.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses(results: Path, name: str) -> list[float]:
    found: list[float] = json.loads((results / f"{name}.json").read_text())["losses"]
    return found


def state(results: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(results / f"{name}.safetensors")


def gradients(results: Path, name: str) -> dict[str, torch.Tensor]:
    """After one step Adam's first moment is a tenth of the gradient: rounding has not been amplified yet."""
    return {moment: 10 * value for moment, value in state(results, name).items() if moment.startswith("exp_avg/")}


def assert_same(results: Path, name: str, other: str = "alone", before: str | None = None) -> None:
    """Losses, parameters, buffers and moments agree to 1e-5; ``before`` ran the steps before those of ``name``."""
    found = (losses(results, before) if before else []) + losses(results, name)
    assert found == pytest.approx(losses(results, other), rel=1e-5)
    assert_near(state(results, name), state(results, other), 1e-5)


def assert_near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == two.keys()
    apart = {name: float((value.double() - two[name].double()).abs().max()) for name, value in one.items()}
    assert {name: value for name, value in apart.items() if not value <= tolerance} == {}


def test_the_toy_learns_enough_for_a_difference_to_show(results: Path) -> None:
    """Parameters move far more than the tolerance, so agreement is not due to a lack of change."""
    start, end = state(results, "plain"), state(results, "alone linear")
    moved = [float((end[name] - start[name]).abs().max()) for name in end if name.startswith("state/")]
    assert sorted(moved)[len(moved) // 2] > 5e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_one_process(results: Path, stage: int) -> None:
    assert_same(results, f"stage {stage}")


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_to_the_host_is_the_same(results: Path, stage: int) -> None:
    assert_same(results, f"offload {stage}")


@pytest.mark.parametrize(("before", "after"), [("one at 0", "two at 3"), ("one at 1", "two at 2"), ("two at 3", "one at 0"), ("two at 2", "one at 3")])  # fmt: skip
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(results: Path, before: str, after: str) -> None:
    """Three steps before, two steps after."""
    assert_same(results, f"{before}, {after}", before=before)


def test_texts_of_earlier_steps_are_remembered_alike(results: Path) -> None:
    assert_same(results, "queue", "alone with queue")
    assert_same(results, "queue after", "alone with queue", before="queue before")
    assert losses(results, "queue")[1] > losses(results, "alone")[1] + 0.1


@pytest.mark.parametrize("stage", [1, 3])
def test_labels_are_learned_alike(results: Path, stage: int) -> None:
    assert_same(results, f"labelled {stage}", "alone labelled")
    assert losses(results, f"labelled {stage}")[0] > losses(results, "alone")[0] + 0.1


def test_two_pass_gradients_of_labels_are_the_plain_step(results: Path) -> None:
    assert_near(gradients(results, "labelled chunks"), gradients(results, "plain labelled"), 1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_sentences_are_contrasted_alike(results: Path, stage: int) -> None:
    assert_same(results, f"sentences {stage}", "alone sentences")
    assert losses(results, f"sentences {stage}")[0] > losses(results, "alone")[0] + 0.1


def test_sentences_of_a_locked_text_encoder_are_contrasted_alike(results: Path) -> None:
    """Also in a run that was resumed."""
    assert_same(results, "locked sentences", "alone locked sentences")
    assert_same(results, "locked sentences after", "alone locked sentences", before="locked sentences before")


def test_bfloat16_is_near_and_keeps_float32_masters(results: Path) -> None:
    assert losses(results, "bf16") == pytest.approx(losses(results, "alone"), rel=0.05)
    assert losses(results, "bf16") != losses(results, "alone")
    assert all(value.dtype != torch.bfloat16 for value in state(results, "bf16").values())


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_activation_checkpointing_and_compilation_change_nothing(results: Path, how: str) -> None:
    assert_same(results, how)


def test_the_text_warm_up_is_the_same_on_two_ranks(results: Path) -> None:
    assert_same(results, "warm", "alone warm")
    assert losses(results, "warm")[0] != pytest.approx(losses(results, "alone")[0], rel=1e-4)


def test_codes_move_by_the_whole_batch(results: Path) -> None:
    assert_same(results, "codes on two", "codes")


def test_codes_move_once_for_all_parts_of_a_batch(results: Path) -> None:
    assert_near(gradients(results, "codes in chunks"), gradients(results, "codes once"), 1e-6)
    rows = "state/model.volume_encoder.codebook.rows"
    found, whole = state(results, "codes in chunks")[rows], state(results, "codes once")[rows]
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, state(results, "codes")[rows], atol=1e-3)


def test_two_pass_gradients_are_refused_where_they_would_not_be_exact(results: Path) -> None:
    assert "batch norm" in json.loads((results / "refused.json").read_text())["refused"]


@pytest.mark.parametrize("chunks", ["chunks", "chunks at 0", "chunks at 2", "chunks at 3"])
def test_two_pass_gradients_are_the_plain_step(results: Path, chunks: str) -> None:
    assert losses(results, chunks) == pytest.approx(losses(results, "plain"), rel=1e-6)
    found, plain = gradients(results, chunks), gradients(results, "plain")
    assert len(plain) > 20
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 0.1
    assert_near(found, plain, 1e-6)


@pytest.mark.parametrize("how", ["", *(f" at {stage}" for stage in (0, 1, 2, 3)), " in chunks", " and offloaded"])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(results: Path, how: str) -> None:
    found, plain = gradients(results, f"clipped{how}"), gradients(results, "plain")
    whole = float(torch.cat([gradient.flatten() for gradient in plain.values()]).norm())
    assert whole > 0.1
    # torch and DeepSpeed add a millionth to the norm before the division by it.
    assert_near({name: gradient * whole / 0.01 for name, gradient in found.items()}, plain, 1e-5 * whole)


def test_two_pass_steps_of_single_volumes_go_on_like_plain_ones(results: Path) -> None:
    assert_same(results, "chunks for long", "alone linear")
