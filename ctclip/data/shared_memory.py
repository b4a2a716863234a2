"""Check the space in /dev/shm for the batches of reader processes, which containers often limit.

Docker's default is 64 MB. A batch that does not fit kills a worker with a bus error, at the first step or hours later.
The available space is therefore compared with what readers will need before they start.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# torch's DataLoader prefetches this many batches per worker.
PREFETCH = 2


def shared_memory_room(folder: Path = Path("/dev/shm")) -> int:
    """Bytes that can be written to shared memory; 0 if it is missing or read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def usable_workers(workers: int, batch_bytes: int, *, ranks: int = 1, room: int | None = None) -> tuple[int, str]:
    """How many of ``workers`` reader processes a rank can start, and a warning (empty if all of them).

    ``batch_bytes``: size of a rank's batch as it is read (int16 HU). ``ranks``: number on this machine, which share
    the space. Each worker holds the batches requested from it, and each rank holds two more; a rank without workers
    reads the data itself.
    """
    room = shared_memory_room() if room is None else room
    needed = _needed(workers, batch_bytes, ranks)
    if workers == 0 or needed <= room:
        return workers, ""
    fitting = max(0, (room // ranks // batch_bytes - 2) // PREFETCH)
    has = f"has {_size(room)} of space" if room else "is missing or not writable"
    instead = (
        f"{fitting} of them are started" if fitting else "the training process reads the data itself, which is slower"
    )
    return fitting, (
        f"/dev/shm {has}, and {workers} readers per process need {_size(needed)}: {instead}. Give the container more "
        f"(docker run --shm-size={-(-needed // 2**30)}g), or set data.workers={fitting}"
    )


def _needed(workers: int, batch_bytes: int, ranks: int) -> int:
    return ranks * (workers * PREFETCH + 2) * batch_bytes


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
