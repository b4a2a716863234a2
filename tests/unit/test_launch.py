"""The processes that a launch starts, and the detection of the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ctclip import distributed
from ctclip.cli import main, options_first
from ctclip.demo import default_processes
from ctclip.errors import TrainingError

from ..conftest import ROOT


class Recorded:
    """A substitute for the launcher's process; keeps its arguments."""

    pid = 0
    started: tuple[list[str], dict[str, str]] | None = None

    def __init__(self, command: list[str], env: dict[str, str], process_group: int) -> None:
        assert process_group == 0  # Ctrl-C in a terminal does not reach it
        Recorded.started = command, env

    def wait(self) -> int:
        return 0


@pytest.mark.parametrize(("cards", "expected"), [(4, ["--num_gpus", "4"]), (0, ["--num_accelerators", "2"])])
def test_a_launch_takes_every_card_or_two_processes(cards: int, expected: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert distributed.launch(default_processes(), "ctclip.train", ["--config", "phantom_tiny"]) == 0
    assert Recorded.started is not None
    command, environment = Recorded.started
    place = command.index(expected[0])
    assert command[place : place + 2] == expected
    assert command[-4:] == ["--module", "ctclip.train", "--config", "phantom_tiny"]
    assert ("DS_ACCELERATOR" in environment) == (cards == 0)


MORE = ["--processes", "2", "--output", "run"]
COMMAND_LINES = [
    (["train", "--config", "a"], ["--config", "a"]),
    (["--debug", "train", "--config", "a"], ["--debug", "--config", "a"]),
    (["train", "--config", "a", "--debug"], ["--debug", "--config", "a"]),
    (["--plugin", "csv", "train", "seed=1", "--config", "train"], ["--plugin", "csv", "seed=1", "--config", "train"]),
]


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(("words", "passed_on"), COMMAND_LINES)
def test_ranks_are_given_all_but_the_command_itself(
    words: list[str], passed_on: list[str], typed: bool, monkeypatch: Any
) -> None:
    """Whether the command was typed or called from Python, whose own command line is different."""
    started: list[Any] = []
    monkeypatch.setattr(distributed, "launch", lambda *given: started.append(given) or 0)
    monkeypatch.setattr(distributed, "launched", lambda: False)
    monkeypatch.setattr(
        "sys.argv", ["ctclip", *words, *MORE] if typed else ["ipykernel_launcher.py", "-f", "kernel.json"]
    )
    assert main(None if typed else [*words, *MORE]) == 0
    assert started == [(2, "ctclip.train", [*passed_on, *MORE])]


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (
            ["train", "--local_rank=0", "--debug", "--config", "a"],
            ["--debug", "train", "--local_rank=0", "--config", "a"],
        ),
        (["train", "--plugin", "mine", "--config", "a"], ["--plugin", "mine", "train", "--config", "a"]),
        (["--plugin=mine", "train"], ["--plugin=mine", "train"]),
        (["train", "--", "--debug"], ["train", "--", "--debug"]),
        (["train", "--plugin"], ["--plugin", "train"]),
        ([], []),
    ],
)
def test_options_of_every_command_may_stand_anywhere(given: list[str], ordered: list[str]) -> None:
    first, rest = options_first(given)
    assert [*first, *rest] == ordered


STEP = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]"}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

# Situation, environment, (rank, ranks, rank on this machine), tasks that the warning names.
SURROUNDINGS = [
    ("nothing", {}, ("0", "1", "0"), None),
    ("torchrun", TORCH, ("1", "2", "1"), None),
    ("torchrun inside an allocation", {**STEP, **TORCH}, ("1", "2", "1"), None),
    ("srun", STEP, ("2", "4", "0"), None),
    ("srun without the step's own count", {name: value for name, value in STEP.items() if name != "SLURM_STEP_NUM_TASKS"}, ("2", "4", "0"), None),
    ("srun of one task in an allocation of four", {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("0", "1", "0"), None),
    ("salloc", {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4"}, ("0", "1", "0"), 4),
    ("salloc with tasks a node", {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, ("0", "1", "0"), 8),
    ("salloc's interactive step", {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("0", "1", "0"), 4),
    ("a batch script", {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ("0", "1", "0"), 4),
    ("a shell of srun --pty", {**STEP, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "4", "SLURM_TASK_PID": "1"}, ("0", "1", "0"), 4),
    ("a submit host", {"SLURM_NTASKS": "8"}, ("0", "1", "0"), 8),
    ("a submit host, one task", {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ("0", "1", "0"), None),
    ("a variable that is no number", {"SLURM_NTASKS": "many"}, ("0", "1", "0"), None),
    ("Open MPI", MPI, ("1", "2", "1"), None),
    ("Open MPI, whose helpers are tasks of a Slurm step", {**STEP, **MPI}, ("1", "2", "1"), None),
    ("Open MPI over machines", {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "gpu03"}, ("1", "2", "1"), None),
    ("Open MPI of one", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ("0", "1", "0"), None),
    ("Intel MPI", {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, ("1", "2", "1"), None),
    ("MPICH", {"PMI_RANK": "3", "PMI_SIZE": "4", "MASTER_ADDR": "gpu03"}, ("3", "4", "3"), None),
    ("srun --mpi=pmi2", {**STEP, "PMI_RANK": "2", "PMI_SIZE": "4"}, ("2", "4", "0"), None),
    ("MPICH, whose helpers are tasks of a Slurm step", {**STEP, "PMI_RANK": "1", "PMI_SIZE": "8", "MASTER_ADDR": "a"}, ("1", "8", "1"), None),
    ("MVAPICH", {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, ("1", "2", "1"), None),
]  # fmt: skip


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without any launcher, for one test only."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI", "MPI", "MV2"))
    }
    for name in TORCH:
        kept.pop(name, None)
    monkeypatch.setattr(os, "environ", kept)
    return kept


@pytest.mark.parametrize(
    ("environment", "place", "tasks"), [row[1:] for row in SURROUNDINGS], ids=[row[0] for row in SURROUNDINGS]
)
def test_a_process_knows_which_one_it_is(
    environment: Any, place: Any, tasks: Any, surroundings: Any, capsys: Any
) -> None:
    surroundings.update(environment)
    assert distributed.launched() == (place[1] != "1")
    distributed.prepare_environment()
    assert tuple(surroundings[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == place
    assert surroundings["MASTER_PORT"].isdigit()
    assert surroundings["MASTER_ADDR"]
    said = capsys.readouterr().err
    assert said.count("\n") == (tasks is not None)
    assert tasks is None or (f"allocated {tasks} tasks" in said and f"srun --ntasks={tasks} " in said)


# The request to Slurm, (id, first, last, count) as a task receives it, SHARDS, the shard that is run (None: refused).
ARRAYS = [
    ("1-16", (3, 1, 16, 16), "", "3/16"),
    ("0-15", (0, 0, 15, 16), "", "1/16"),
    ("0-15, the last", (15, 0, 15, 16), "", "16/16"),
    ("1-16%4", (16, 1, 16, 16), "", "16/16"),
    ("0", (0, 0, 0, 1), "", "1/1"),
    ("no array", None, "", "1/1"),
    ("5-8", (5, 5, 8, 4), "", None),
    ("3,7", (7, 3, 7, 2), "", None),
    ("0-14:2", (2, 0, 14, 8), "", None),
    ("1,16", (1, 1, 16, 2), "", None),
    ("3,7 of 16", (7, 3, 7, 2), "16", "7/16"),
    ("5-8 of 16", (5, 5, 8, 4), "16", "5/16"),
]  # fmt: skip


@pytest.mark.parametrize(("array", "shards", "shard"), [row[1:] for row in ARRAYS], ids=[row[0] for row in ARRAYS])
def test_every_task_of_an_array_takes_its_own_shard(array: Any, shards: str, shard: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    environment |= {name: str(value) for name, value in zip(names, array or (), strict=bool(array))}
    environment |= {"SHARDS": shards, "PYTHON": "echo"}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "preprocess.sbatch")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if shard is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "SHARDS=N" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"--shard {shard} " in done.stdout


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("a,b[1-2]", "a"), ("gpu[03-05,9],x", "gpu03"), ("gpu[007],b", "gpu007"), ("gpu[01-04]-ib0", "gpu01-ib0"),
     ("rack[1-2]n[3-4,7]", "rack1n3")],
)  # fmt: skip
def test_ranks_of_a_step_meet_at_its_first_host(nodes: str, first: str, surroundings: Any) -> None:
    surroundings.update({**STEP, "SLURM_STEP_NODELIST": nodes})
    distributed.prepare_environment()
    assert surroundings["MASTER_ADDR"] == first


@pytest.mark.parametrize("common", [{"PMIX_NAMESPACE": "prterun-7"}, {"OMPI_MCA_ess_base_jobid": "3"}, {}])
def test_ranks_of_one_mpirun_meet_at_one_port(common: dict[str, str], surroundings: Any) -> None:
    ports = set()
    for rank in ("0", "1"):
        surroundings.update({**MPI, **common, "OMPI_COMM_WORLD_RANK": rank})
        distributed.prepare_environment()
        ports.add(surroundings["MASTER_PORT"])
        for name in TORCH:
            surroundings.pop(name)
    assert len(ports) == 1
    assert 1024 < int(ports.pop()) < 65536


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "3"}, "RANK=3 is set.*WORLD_SIZE is not"),
        ({**TORCH, "WORLD_SIZE": "two"}, "WORLD_SIZE=two.*not a number"),
        ({**TORCH, "RANK": ""}, "RANK=.*not a number"),
        ({**TORCH, "RANK": "²"}, "RANK=².*not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4.*OMPI_COMM_WORLD_RANK is not"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4.*PMI_RANK is not"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "export MASTER_ADDR"),
    ],
)
def test_half_a_launcher_is_refused(environment: dict[str, str], said: str, surroundings: Any) -> None:
    surroundings.update(environment)
    with pytest.raises(TrainingError, match=said) as refused:
        distributed.prepare_environment()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("thread", [False, True])
def test_a_launch_leaves_signals_as_they_were(thread: bool, monkeypatch: Any) -> None:
    """A notebook's kernel continues to run, and threads may not handle signals."""
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    codes: list[int] = []

    def launch() -> None:
        codes.append(distributed.launch(2, "ctclip.train", []))

    if thread:
        other = threading.Thread(target=launch)
        other.start()
        other.join()
    else:
        launch()
    assert codes == [0]
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_launch_removes_what_a_killed_one_left_and_leaves_nothing(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    (tmp_path / "ctclip-ranks-abcd1234").mkdir()
    assert distributed.launch(2, "ctclip.train", []) == 0
    assert Recorded.started is not None
    assert Path(Recorded.started[1][distributed.RENDEZVOUS]).is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("ctclip.cli.app", side_effect=BrokenProcessPool):
        assert main(["audit", "all"]) == 2
        assert capsys.readouterr().err.startswith("error: a worker process was killed, probably because memory ran out")
        with pytest.raises(BrokenProcessPool):
            main(["--debug", "audit", "all"])
