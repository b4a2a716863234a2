"""The space in /dev/shm is that reported by the kernel, and fewer readers start if it does not suffice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctclip.data.shared_memory import shared_memory_room, usable_workers

MB = 2**20


def test_room_is_what_df_says(tmp_path: Path) -> None:
    answer = subprocess.run(["df", "--output=avail", "-B1", tmp_path], capture_output=True, text=True, check=True)
    assert shared_memory_room(tmp_path) == pytest.approx(int(answer.stdout.split()[-1]), rel=0.05)
    assert not list(tmp_path.iterdir())
    assert shared_memory_room(tmp_path / "absent") == 0


@pytest.mark.parametrize(
    ("mount", "room"),
    [
        ("mount -t tmpfs -o size=64m tmpfs /dev/shm", 64 * MB),
        ("mount -t tmpfs -o size=64m,ro tmpfs /dev/shm", 0),
        ("mount -t tmpfs -o size=64m tmpfs /dev/shm && dd if=/dev/zero of=/dev/shm/x bs=1M count=60 status=none", 4 * MB),
    ],
)  # fmt: skip
def test_a_machine_with_another_shared_memory(mount: str, room: int) -> None:
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("only root can mount another /dev/shm")
    code = "from ctclip.data.shared_memory import shared_memory_room; print(shared_memory_room())"
    command = f"{mount} && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == room


def test_all_workers_where_their_batches_fit() -> None:
    assert usable_workers(4, 10 * MB, room=100 * MB) == (4, "")
    assert usable_workers(0, 10 * MB, room=0) == (0, "")


@pytest.mark.parametrize(
    ("workers", "ranks", "room", "fitting"), [(4, 1, 99, 3), (4, 1, 64, 2), (4, 2, 120, 2), (2, 1, 39, 0), (8, 8, 0, 0)]
)
def test_fewer_workers_where_they_do_not(workers: int, ranks: int, room: int, fitting: int) -> None:
    count, line = usable_workers(workers, 10 * MB, ranks=ranks, room=room * MB)
    assert count == fitting
    assert "\n" not in line
    assert f"data.workers={fitting}" in line
    assert "--shm-size=" in line
    assert ("is missing or not writable" in line) == (room == 0)
    # The offered number of readers fits, and one more would not.
    assert usable_workers(count, 10 * MB, ranks=ranks, room=room * MB) == (count, "")
    assert usable_workers(count + 1, 10 * MB, ranks=ranks, room=room * MB)[1]


def test_the_size_that_is_advised_suffices() -> None:
    gigabytes = int(usable_workers(8, 500 * MB, ranks=4, room=64 * MB)[1].partition("--shm-size=")[2].split("g")[0])
    assert usable_workers(8, 500 * MB, ranks=4, room=gigabytes * 2**30) == (8, "")
    assert usable_workers(8, 500 * MB, ranks=4, room=(gigabytes - 1) * 2**30)[0] < 8
