"""The encoded scans that the worker keeps for questions, and those that were cancelled before they were encoded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from ctclip.errors import CtclipError
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.pipeline import Prepared
from ctclip.serve.settings import Lifetime


@dataclass
class EncodedScan:
    """A scan in memory: encoded, and prepared. ``volume``: its name in the store, if it is from there; ``lifetime``: see
    ``settings``."""

    encoded: Encoded
    prepared: Prepared
    volume: str | None = None
    lifetime: Lifetime = "room"


class Memory:
    """Encoded scans by id, thread-safe. At most ``most`` scans with lifetime "room" are kept; scans of a single
    question are kept until they are forgotten, because the service limits their number."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._scans: OrderedDict[str, EncodedScan] = OrderedDict()
        self._unfinished: set[str] = set()
        self._cancelled: set[str] = set()

    def begin(self, name: str) -> None:
        """Announce a scan that will be read and encoded; until ``finish``, ``forget`` cancels it."""
        with self._lock:
            self._unfinished.add(name)

    def finish(self, name: str) -> None:
        """A scan has been encoded, refused or cancelled."""
        with self._lock:
            self._unfinished.discard(name)
            self._cancelled.discard(name)

    def cancelled(self, name: str) -> bool:
        """Whether a scan was forgotten before it was finished."""
        with self._lock:
            return name in self._cancelled

    def add(self, name: str, scan: EncodedScan) -> None:
        """Keep a scan, unless it was cancelled or no question about it will follow; the least recently used scans are
        dropped."""
        with self._lock:
            if name in self._cancelled or scan.lifetime == "scored":
                return
            self._scans[name] = scan
            movable = [other for other, each in self._scans.items() if each.lifetime == "room"]
            for old in movable[: max(0, len(movable) - self.most)]:
                del self._scans[old]

    def get(self, name: str) -> EncodedScan:
        """Raises CtclipError if the scan is not there."""
        with self._lock:
            if name not in self._scans:
                raise CtclipError(f"the scan is no longer in memory (the service keeps {self.most}); send it again")
            self._scans.move_to_end(name)
            return self._scans[name]

    def forget(self, name: str) -> None:
        """Remove a scan, or cancel it."""
        with self._lock:
            self._scans.pop(name, None)
            if name in self._unfinished:
                self._cancelled.add(name)
