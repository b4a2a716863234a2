"""The settings of a service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ctclip.inference.precision import Asked
from ctclip.preprocessing.pipeline import Reading

GB = 1e9
# How long the worker keeps an encoded scan: until its scores are sent, until the single question that came with it is
# answered, or as long as there is room.
Lifetime = Literal["scored", "answered", "room"]


@dataclass(frozen=True)
class Settings:
    """``model``: a model folder; ``store``, ``index``: outputs of `ctclip preprocess` and `ctclip index`, or None.

    ``largest_gb``: limit of an upload and of its decompressed size; ``queue``: maximum number of scans in progress;
    ``keep``: number of encoded scans kept in memory for questions; ``seconds``: time limit for one scan; ``batch``:
    maximum number of scans encoded together; ``precision``: see ``ctclip.inference.precision``; ``token``: token that
    requests must send, or None; ``hosts``: host names that are allowed; ``dicomweb``: address of the PACS, or None;
    ``dicomweb_token``: token for the PACS, or None.
    """

    model: str
    store: Path | None = None
    index: Path | None = None
    device: str = "cpu"
    precision: Asked = "auto"
    reading: Reading = field(default_factory=Reading)
    largest_gb: float = 4.0
    queue: int = 256
    keep: int = 8
    seconds: float = 600.0
    batch: int = 4
    token: str | None = None
    dicomweb: str | None = None
    dicomweb_token: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")

    @property
    def largest_bytes(self) -> int:
        """The maximum size of a request body, in bytes."""
        return round(self.largest_gb * GB)
