"""Worker processes, or threads on machines where processes cannot communicate."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """A pool of ``workers`` processes, or of threads, with a warning, if /dev/shm is missing or not writable.

    Processes need semaphores, which Linux keeps there; threads are slower. The processes end when this one ends,
    however it ends. When the context is left, tasks that have not started are cancelled.
    """
    pool: Executor
    try:
        pool = ProcessPoolExecutor(workers, initializer=_begin)
    except OSError as error:
        print(
            f"warning: no worker processes can be started ({error.strerror}): /dev/shm is missing or not writable. "
            f"Working with {workers} threads, which is slower",
            file=sys.stderr,
        )
        pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        # After a full disk or Ctrl-C, do not wait for tens of thousands of queued tasks.
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    end_with_parent()
    # An idle worker would print a traceback of KeyboardInterrupt; either exception lets a busy one tidy up.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))


def end_with_parent() -> None:
    """End this child process as soon as its parent is gone; otherwise a worker would wait forever and hold the parent's
    locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
