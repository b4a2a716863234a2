"""What a service is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ctclip.preprocessing.pipeline import Reading

GB = 1e9


@dataclass(frozen=True)
class Settings:
    """``model``: a model folder; ``store``, ``index``: those of `ctclip preprocess` and `ctclip index`, if there are any.

    ``largest_gb`` bounds an upload, and what it inflates to; ``queue`` how many scans wait or are worked on at once; ``keep``
    how many encoded scans stay in memory for questions; ``seconds`` how long one scan may take; ``batch`` how many are
    encoded together. ``token``: what requests must bear, if anything. ``hosts``: names under which the service answers.
    """

    model: str
    store: Path | None = None
    index: Path | None = None
    device: str = "cpu"
    reading: Reading = field(default_factory=Reading)
    largest_gb: float = 4.0
    queue: int = 256
    keep: int = 8
    seconds: float = 600.0
    batch: int = 4
    token: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")

    @property
    def largest_bytes(self) -> int:
        """Of the body of a request."""
        return round(self.largest_gb * GB)
