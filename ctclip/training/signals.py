"""Signals that ask a training run to stop, in a rank and in its reading processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from ctclip import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Records SIGTERM and SIGUSR1 (a preempted or ending Slurm job) and Ctrl-C, which the loop checks between steps."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = number
        if number == signal.SIGINT:
            # The default handler ends this process at the second signal, even while it waits for other ranks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if distributed.launched_rank() == 0:
                print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)


def leave_signals(_: int) -> None:
    """Ignore signals in a reading process. Terminals, Slurm and launchers send them to it too, while its rank still
    needs a batch. It ends when its rank ends it or is gone."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    """Ignore SIGTERM unless the rank itself sends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
