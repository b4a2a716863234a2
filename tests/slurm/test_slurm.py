"""The sbatch files on a real Slurm: an array of shards, a two-node training that is requeued half-way, zero-shot."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from ctclip.preprocessing.cohort_run import merge_shards
from ctclip.preprocessing.store import VolumeStore

from ..end_to_end.conftest import TINY
from .cluster import Cluster, cluster, missing

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SMALL = ("--cpus-per-task=1", "--mem=0", f"--chdir={ROOT}")
PER_RANK = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with cluster() as made:
        yield made


def given(**more: object) -> dict[str, str]:
    return {**PER_RANK, "PYTHON": sys.executable, **{name: str(value) for name, value in more.items()}}


def test_from_shards_to_predictions(slurm: Cluster, cohort: Path, store: Path, tmp_path: Path) -> None:
    stored, run, found = tmp_path / "store", tmp_path / "run", tmp_path / "predictions"
    log = tmp_path / "job-%j.log"
    array = slurm.submit(*SMALL, "--array=1-3", f"--output={tmp_path}/shard-%a.log", ROOT / "slurm" / "preprocess.sbatch",
                         **given(COHORT=cohort, STORE=stored, SPEC="phantom"))  # fmt: skip
    assert slurm.wait(array, 180) == "COMPLETED", _logs(tmp_path)
    assert len(merge_shards(stored)) == 24
    assert VolumeStore(stored).volumes == VolumeStore(store).volumes

    settings = [*TINY, "training.epochs=30", "training.checkpoint_every=1000"]
    job = slurm.submit(*SMALL, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={log}", ROOT / "slurm" / "train.sbatch",
                       *settings, **given(CONFIG="phantom_tiny", STORE=stored, OUTPUT=run))  # fmt: skip
    _wait_for_lines(run / "metrics.jsonl", 6, slurm, job)
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait(job, 300) == "COMPLETED", _logs(tmp_path)
    told = slurm.run("scontrol", "show", "job", job)
    assert "Restarts=1" in told
    said = _logs(tmp_path)
    assert "interrupted: stopped after step" in said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))
    assert (run / "model" / "model.safetensors").is_file()

    job = slurm.submit(*SMALL, "--nodes=1", "--ntasks=2", "--gpus=0", f"--output={log}", ROOT / "slurm" / "zero_shot.sbatch",
                       **given(MODEL=run / "model", STORE=stored, SPLIT="valid", OUTPUT=found))  # fmt: skip
    assert slurm.wait(job, 180) == "COMPLETED", _logs(tmp_path)
    table = pd.read_csv(found / "predictions.csv")
    cohort_table = VolumeStore(stored).cohort
    assert set(table["volume"]) == set(cohort_table.loc[cohort_table["split"] == "valid", "volume"])


def _wait_for_lines(path: Path, count: int, slurm: Cluster, job: str) -> None:
    ends = time.monotonic() + 180
    while time.monotonic() < ends:
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        assert "FAILED" not in slurm.state(job), _logs(path.parents[1])
        time.sleep(0.05)
    raise TimeoutError(_logs(path.parents[1]))


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
