"""One progress display for every long stage: a live bar on a terminal, an occasional line in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

LOG_EVERY_SECONDS = 10.0


def track(
    items: Iterable[T], total: int, what: str, unit: str = "volumes", status: Callable[[], str] | None = None
) -> Iterator[T]:
    """Yield ``items``, showing how many of ``total`` are done, the rate and the estimated time left.

    ``status`` says what else to show beside them.
    """
    status_text = status or (lambda: "")
    if sys.stderr.isatty():
        yield from _live(items, total, what, unit, status_text)
    else:
        yield from _logged(items, total, what, unit, status_text)


def _live(items: Iterable[T], total: int, what: str, unit: str, status: Callable[[], str]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, status="")
        for item in items:
            yield item
            bar.update(task, advance=1, status=status())


def _logged(items: Iterable[T], total: int, what: str, unit: str, status: Callable[[], str]) -> Iterator[T]:
    started = reported = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - reported >= LOG_EVERY_SECONDS or done == total:
            reported = now
            elapsed = now - started
            left = elapsed / done * (total - done)
            more = f"; {status()}" if status() else ""
            rate = f"{done / max(elapsed, 1e-9):.1f} a second"
            print(f"{what}: {done}/{total} {unit}, {rate}, {left:.0f} s left{more}", file=sys.stderr, flush=True)
