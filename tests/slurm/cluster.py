"""A real Slurm of two nodes on this machine: its own munge, controller and two daemons, which stop when the block ends.

Needs Debian's slurm-wlm and munge, and root. By hand: ``python -m tests.slurm.cluster`` starts one and opens a shell.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

CONFIG = """
ClusterName=ctclip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1
MailProg=/bin/true
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Cluster:
    """Where its files are, and the environment that its commands need."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object, **more: str) -> str:
        """Output of a Slurm command; raises with its error if it fails."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60,
            env={**self.environment, **more},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}{self.logs()}")
        return done.stdout.strip()

    def submit(self, *arguments: object, **more: str) -> str:
        """Run ``sbatch``; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **more).partition(";")[0]

    def state(self, job: str) -> str:
        """The state of a job, or of all tasks of an array together, such as COMPLETED or FAILED,RUNNING."""
        told = self.run("scontrol", "show", "job", "-o", job)
        states = {word.partition("=")[2] for word in told.split() if word.startswith("JobState=")}
        return ",".join(sorted(states))

    def wait(self, job: str, seconds: float) -> str:
        """Wait until a job has ended; returns its state."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            state = self.state(job)
            if not set(state.split(",")) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}:
                return state
            time.sleep(0.3)
        raise TimeoutError(
            f"job {job} is still {self.state(job)}: {self.run('scontrol', 'show', 'job', job)}{self.logs()}"
        )

    def logs(self) -> str:
        parts = [f"\n{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log"))]
        return "".join(parts)


def missing() -> str | None:
    """The reason why no cluster can run here, or None."""
    absent = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of its own needs root"


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start munge, a controller and two nodes; stop all of them at the end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    ports = dict(zip(("controller_port", "port1", "port2"), _free_ports(3), strict=True))
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, **ports))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    for name in [name for name in environment if name.startswith(("SLURM_J", "SLURM_P", "SLURM_N", "SBATCH_"))]:
        del environment[name]
    made = Cluster(folder, environment)
    files = {name: str(folder / f"munge.{name}") for name in ("key", "socket", "log", "pid", "seed")}
    options = [f"--{name}-file={files[name]}" for name in ("key", "log", "pid", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={files['socket']}", *options],
        ["slurmctld", "-D", "-i"],
    ]
    daemons += [["slurmd", "-D", "-N", node] for node in ("node1", "node2")]
    running: list[subprocess.Popen[bytes]] = []
    # If the tests are ended by a signal (as ``timeout`` does), no daemons may remain: it is treated like Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for command in daemons:
            # A separate session: the signal that ends the tests goes to their whole process group, and jobs
            # must be ended first.
            apart = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
            running.append(subprocess.Popen(command, env=environment, **apart))  # type: ignore[call-overload]
            if command[0] == "munged":
                _until(lambda: Path(files["socket"]).exists(), made)
        _until(lambda: made.run("sinfo", "--noheader", "-o", "%T %D").split() == ["idle", "2"], made)
        yield made
    finally:
        # Jobs first: without daemons nothing would end them.
        with contextlib.suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            made.run("scancel", "-u", "root")
            _until(lambda: not made.run("squeue", "--noheader"), made, 20)
        for process in reversed(running):
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _until(condition, made: Cluster, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(RuntimeError):
            if condition():
                return
        time.sleep(0.2)
    raise TimeoutError(f"the cluster did not come so far{made.logs()}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _path() -> str:
    # Debian installs daemons in a folder that is not in a plain user's PATH.
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


if __name__ == "__main__":
    with cluster() as here:
        subprocess.run([os.environ.get("SHELL", "bash")], env=here.environment, check=False)
