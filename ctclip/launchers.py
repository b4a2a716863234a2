"""Detect whether this process was started alone or by a launcher as one of several ranks.

The same command runs under ``deepspeed``, ``torchrun``, ``srun`` and ``mpirun``. Each sets environment variables with
names of its own, which are converted here to torch's names.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping

import torch

from ctclip.errors import ConfigError, TrainingError
from ctclip.preprocessing.whole_numbers import whole_number

LOOPBACK = "127.0.0.1"
# Each launcher's variables for rank, world size, local rank and local world size. MPI comes first, because mpirun may
# have started its helpers as tasks of a Slurm step.
LAUNCHERS = {
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "mpirun": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip
# Variables that are equal for all ranks of one mpirun and unique to it.
MPI_JOB = (
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
    "PMI_KVS",
    "PMI_JOBID",
    "PMI_ID",
    "HYDI_CONTROL_FD",
    "SLURM_JOB_ID",
)
# Slurm numbers srun steps from 0; batch scripts and interactive shells have special step ids above this value.
FIRST_SPECIAL_STEP = 0xFFFFFFF0


def prepare_environment() -> None:
    """Set the environment variables that a launcher did not set; to be called before DeepSpeed is imported.

    The names of Slurm and MPI become torch's; without a launcher, this process is the only rank, with a warning if
    Slurm has allocated more tasks. Raises TrainingError if the launcher's variables do not identify the rank.
    """
    environment = os.environ
    if "RANK" in environment:
        _check_ranks(environment)
    else:
        ranks = _of_mpi(environment) or _of_slurm(environment)
        if ranks is None:
            say_unused_tasks()
        environment.update(ranks or _alone())
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ or _of_mpi(os.environ) is not None or _of_slurm(os.environ) is not None


def refuse_ranks(what: str) -> None:
    """Raise ConfigError if a launcher started several processes for ``what``, which trains in one."""
    environment = os.environ
    ranks = environment if "RANK" in environment else _of_mpi(environment) or _of_slurm(environment) or {}
    if str(ranks.get("WORLD_SIZE", 1)) != "1":
        raise ConfigError(f"{what} trains in one process: start it without a launcher")


def say_unused_tasks() -> None:
    """Print a warning if this process runs alone in a Slurm allocation with several tasks."""
    tasks = _allocated(os.environ)
    if tasks > 1:
        print(
            f"warning: Slurm has allocated {tasks} tasks, but this process is not one of them and runs alone. To use "
            f"all, put `srun` before the command: srun --ntasks={tasks} python -m ctclip ...",
            file=sys.stderr,
            flush=True,
        )


def _check_ranks(environment: Mapping[str, str]) -> None:
    """Check that all variables of torch's launchers are set, which is not so for a leftover RANK."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise TrainingError(
                f"RANK={environment['RANK']} is set in the environment but {name} is not: unset RANK to run as one process, or "
                f"start the ranks with torchrun, deepspeed or srun"
            )
        if name != "MASTER_ADDR" and whole_number(environment[name]) is None:
            raise TrainingError(f"{name}={environment[name]} in the environment is not a number: unset RANK and {name}")


def _of_mpi(environment: Mapping[str, str]) -> dict[str, str] | None:
    """torch's variables for a rank that mpirun started as one of several; None elsewhere."""
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        ranks = _number(environment, size)
        if ranks is None or ranks < 2:
            continue
        if local_rank not in environment and _is_task(environment, _number(environment, rank), ranks):
            # srun itself, which sets MPI's variables with --mpi=pmi2, except the local ones.
            continue
        if _number(environment, rank) is None:
            raise TrainingError(
                f"{size}={ranks} is set in the environment but {rank} is not: unset {size} to run as one process, or start "
                f"{ranks} ranks with torchrun, deepspeed or srun"
            )
        here = _number(environment, local_size)
        if "MASTER_ADDR" not in environment and here != ranks:
            raise TrainingError(
                f"{launcher} started {ranks} ranks, which may be on several machines: export MASTER_ADDR, the name "
                f"of the first machine, to all of them"
            )
        known = {"LOCAL_WORLD_SIZE": str(here)} if here is not None else {}
        job = next((environment[name] for name in MPI_JOB if name in environment), "")
        return {
            "RANK": environment[rank],
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": environment.get(local_rank, environment[rank]),
            "MASTER_ADDR": environment.get("MASTER_ADDR", LOOPBACK),
            "MASTER_PORT": environment.get("MASTER_PORT", _port_of(job)),
            **known,
        }
    return None


def _is_task(environment: Mapping[str, str], rank: int | None, ranks: int) -> bool:
    """Whether this rank is a task of a Slurm step with the same number of tasks."""
    task = _of_slurm(environment)
    return task is not None and (task["RANK"], task["WORLD_SIZE"]) == (str(rank), str(ranks))


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str] | None:
    """torch's variables for a task of a step that srun started with several; None elsewhere.

    An allocation alone (salloc, an interactive shell, the batch script itself) also states the number of tasks, but
    runs this process once.
    """
    step, task = _number(environment, "SLURM_STEP_ID"), _number(environment, "SLURM_PROCID")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS") or 1
    if step is None or step >= FIRST_SPECIAL_STEP or task is None or task >= tasks or tasks < 2:
        return None
    # srun --pty gives a terminal to one task; a shell there is not a rank of this program.
    if "SLURM_PTY_PORT" in environment and environment.get("SLURM_TASK_PID") != str(os.getpid()):
        return None
    return {
        "RANK": str(task),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", LOOPBACK)),
        # The port depends on the job id, so that two jobs on one node do not collide.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000),
    }


def _alone() -> dict[str, str]:
    """torch's variables for a world of one."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
    }


def _allocated(environment: Mapping[str, str]) -> int:
    """Number of tasks of the current Slurm allocation; 1 without an allocation, or in a step with one task."""
    step = _number(environment, "SLURM_STEP_ID")
    if step is not None and step < FIRST_SPECIAL_STEP and "SLURM_PTY_PORT" not in environment:
        return _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    tasks = _number(environment, "SLURM_NTASKS") or _number(environment, "SLURM_NPROCS")
    nodes = _number(environment, "SLURM_JOB_NUM_NODES") or 1
    return tasks or nodes * (_number(environment, "SLURM_NTASKS_PER_NODE") or 1)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    return whole_number(environment.get(name, ""))


def _port_of(job: str) -> str:
    return str(20000 + zlib.crc32(job.encode()) % 20000)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-05,9]-ib,x`` is ``gpu03-ib``."""
    return re.sub(r"\[(\w*)[^]]*\]", r"\1", nodes).split(",")[0]
