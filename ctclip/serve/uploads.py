"""Multipart uploads, written to disk as they arrive, with a size limit and safe file names."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from python_multipart import MultipartParser
from python_multipart.multipart import parse_options_header

from ctclip.errors import CtclipError

MOST_FILES = 20_000
MOST_FIELDS = 20
# A slower sender would occupy a place in the queue.
IDLE_SECONDS, GRACE_SECONDS, LEAST_BYTES_A_SECOND = 30, 60, 50_000
LONGEST_FIELD = 4096
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class BadUpload(CtclipError):
    """The body is not an upload of files."""


class TooLarge(CtclipError):
    """The body is over the limit."""


class TooSlow(CtclipError):
    """The body arrives too slowly."""


async def receive(content_type: str, body: AsyncIterator[bytes], folder: Path, largest: int) -> dict[str, str]:
    """Write the files of a multipart body to ``folder``; return its other fields. Raises BadUpload, TooLarge,
    TooSlow."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise BadUpload("send the scan as multipart/form-data: curl -F scan=@scan.nii.gz")
    parts = _Parts(folder)
    parser = MultipartParser(options[b"boundary"], parts.callbacks())
    received = 0
    try:
        async for chunk in _fast_enough(body):
            received += len(chunk)
            if received > largest:
                raise TooLarge(f"the upload is larger than {largest / 1e9:g} GB; --largest-gb raises the limit")
            parser.write(chunk)
        parser.finalize()
        if not parts.ended:
            raise BadUpload("the upload is incomplete; send it again")
    except ValueError as error:
        raise BadUpload("the upload is damaged, or not multipart/form-data; send it again") from error
    finally:
        parts.close()
    return parts.fields


async def _fast_enough(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks of ``body``. Raises TooSlow."""
    chunks, began, received = aiter(body), time.monotonic(), 0
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks), IDLE_SECONDS)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise TooSlow(f"no data of the upload arrived for {IDLE_SECONDS} seconds") from None
        received += len(chunk)
        elapsed = time.monotonic() - began
        if elapsed > GRACE_SECONDS and received < LEAST_BYTES_A_SECOND * elapsed:
            raise TooSlow(f"the upload is slower than {LEAST_BYTES_A_SECOND / 1000:.0f} kB a second")
        yield chunk


class _Parts:
    """Callbacks of the parser for headers and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fields: dict[str, str] = {}
        self.count = 0
        self.ended = False
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._file: BinaryIO | None = None
        self._field, self._text = "", b""

    def callbacks(self) -> Any:
        names = (
            "part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished", "end",
        )  # fmt: skip
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end(self) -> None:
        self.ended = True

    def _part_begin(self) -> None:
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._field, self._text = options.get(b"name", b"").decode("utf-8", "replace")[:100], b""
        if b"filename" not in options:
            return
        self.count += 1
        if self.count > MOST_FILES:
            raise BadUpload(f"more than {MOST_FILES} files")
        name = safe_name(options[b"filename"].decode("utf-8", "replace"))
        path = self.folder / name
        if path.exists():
            path = self.folder / f"{self.count:05d}-{name}"
        self._file = path.open("xb")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
        elif len(self._text) + end - start > LONGEST_FIELD:
            raise BadUpload(f"a field longer than {LONGEST_FIELD} bytes")
        else:
            self._text += data[start:end]

    def _part_end(self) -> None:
        if self._file is None and self._field:
            if len(self.fields) == MOST_FIELDS:
                raise BadUpload(f"more than {MOST_FIELDS} fields")
            self.fields[self._field] = self._text.decode("utf-8", "replace")
        self.close()


def safe_name(name: str) -> str:
    """A safe file name: letters, digits and ``._-`` only, without a path, with the suffix kept."""
    last = UNSAFE.sub("_", PurePosixPath(name.replace("\\", "/")).name).lstrip(".-")
    return last[-120:] or "scan"
