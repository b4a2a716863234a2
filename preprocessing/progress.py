"""One progress bar for every long stage: on a terminal a live bar, in a log file a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

LOG_EVERY_SECONDS = 10.0


def track(items: Iterable[T], total: int, what: str, unit: str = "volumes") -> Iterator[T]:
    """Yield ``items``, showing how many of ``total`` are done, the rate and the estimated time left."""
    if sys.stderr.isatty():
        yield from _live(items, total, what, unit)
    else:
        yield from _logged(items, total, what, unit)


def _live(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
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
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total)


def _logged(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    started = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= LOG_EVERY_SECONDS or done == total:
            shown = now
            elapsed = now - started
            left = elapsed / done * (total - done)
            print(
                f"{what}: {done}/{total} {unit}, {done / max(elapsed, 1e-9):.1f} a second, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
