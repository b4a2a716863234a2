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

    ``status`` returns additional text to show.
    """
    status_text = status or (lambda: "")
    if sys.stderr.isatty():
        yield from _live(items, total, what, unit, status_text)
    else:
        yield from _logged(items, total, what, unit, status_text)


def duration(seconds: float) -> str:
    """A length of time in words: ``5 s``, ``17 min``, ``2 h 5 min``, ``3 days``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{max(0, round(seconds))} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{round(minutes / 1440)} days"


def speed(done: int, seconds: float) -> str:
    """The rate in words: ``2.5 a second``, or ``17 s each`` if one item takes long."""
    return f"{duration(seconds / done)} each" if seconds > 10 * done else f"{done / max(seconds, 1e-9):.1f} a second"


def _live(items: Iterable[T], total: int, what: str, unit: str, status: Callable[[], str]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, status="", left="")
        started = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            left = (time.monotonic() - started) / done * (total - done)
            bar.update(task, advance=1, status=status(), left=f"{duration(left)} left")


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
            rate = speed(done, elapsed)
            print(f"{what}: {done}/{total} {unit}, {rate}, {duration(left)} left{more}", file=sys.stderr, flush=True)
