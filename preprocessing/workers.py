"""Worker processes, or threads on machines where processes cannot communicate."""

from __future__ import annotations

import sys
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor


def worker_pool(workers: int) -> Executor:
    """``workers`` processes; threads, and a warning, where /dev/shm is missing or not writable.

    Processes need semaphores, which Linux keeps there. Threads do the same work more slowly.
    """
    try:
        return ProcessPoolExecutor(workers)
    except OSError as error:
        print(
            f"warning: no worker processes can be started ({error.strerror}): /dev/shm is missing or not writable. "
            f"Working with {workers} threads, which is slower",
            file=sys.stderr,
        )
        return ThreadPoolExecutor(workers)
