"""After kill -9 at any moment of preprocessing, each volume is complete or absent, and the next run resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from ctclip.preprocessing.store import VolumeStore


def test_preprocessing_survives_kill_9(cohort: Path, store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctclip", "preprocess", str(cohort), "--output", str(tmp_path / "s"), "--spec", "phantom", "--workers", "2"]  # fmt: skip
    volumes = tmp_path / "s" / "volumes"
    reached = 0
    for kill_at in (2, 9, 15):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        ends = time.monotonic() + 90
        while time.monotonic() < ends and process.poll() is None:
            if volumes.is_dir() and len(list(volumes.glob("[!.]*.b2nd"))) >= kill_at:
                break
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        opened = VolumeStore(tmp_path / "s")
        there = opened.volumes
        assert all(opened.intact(name) for name in there)
        assert len(there) >= reached
        reached = len(there)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    done, whole = VolumeStore(tmp_path / "s"), VolumeStore(store)
    assert done.volumes == whole.volumes
    assert all(done.intact(name) and (done.read(name) == whole.read(name)).all() for name in done.volumes)
    assert set(pd.read_csv(tmp_path / "s" / "outcomes.csv")["outcome"]) == {"done"}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(cohort: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: writing fails in the middle of a file."""
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv[0] = 'ctclip'; from ctclip.cli import command; command()"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", limit, "preprocess", str(cohort), "--output", str(tmp_path / "s"), "--spec", "phantom", "--workers", "1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-500:]
    assert "File too large" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    left = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert not [path for path in left if "partial" in path.name]


def test_workers_end_with_a_command_that_is_killed() -> None:
    """Only the command itself is killed; its workers must end too, otherwise they would hold its locks for ever."""
    script = "import time; from ctclip.preprocessing.workers import worker_pool\nwith worker_pool(3) as pool: list(pool.map(time.sleep, [0.1] * 6)); print(*pool._processes, flush=True); time.sleep(60)"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 3
    process.kill()
    process.wait()
    ends = time.monotonic() + 20
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < ends
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
