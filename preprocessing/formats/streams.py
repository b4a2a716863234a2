"""Read exactly the number of bytes that a header states, from plain and compressed streams.

A compressed stream is read to its end, where its own checksum (CRC-32, Adler-32) is compared.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import igzip_lib, isal_zlib

from ctclip.preprocessing.errors import UNFIT, PreprocessingError

GZIP = b"\x1f\x8b"
CHUNK = 1 << 20
# Chosen by measurement: a block of this size stays in the cache until it is copied.
PACKED_CHUNK, INFLATED_CHUNK = 1 << 17, 1 << 18
# No deflate stream expands more than 1032-fold; if a header claims more, it is wrong, or the file is truncated.
LARGEST_EXPANSION = 1100
TRAILING = "bytes follow the end of its compressed stream: left out"

# What the readers of compressed streams, archives and numpy's arrays raise for damaged files. The last are Python's own, as
# numpy parses a header as Python; TypeError: an array instead of an archive.
DAMAGE: tuple[type[Exception], ...] = (  # type: ignore[assignment]
    *UNFIT, EOFError, zlib.error, isal_zlib.error, igzip_lib.IsalError, lzma.LZMAError, struct.error,
    zipfile.BadZipFile, tarfile.TarError, RuntimeError, SyntaxError, tokenize.TokenError, MemoryError,
)  # fmt: skip


def open_regular(path: Path, source: str) -> BinaryIO:
    """Open a regular file; pipes and devices, which could block forever, are refused."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise PreprocessingError(f"{source}: cannot be opened ({error.strerror})") from error
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise PreprocessingError(f"{source}: not a file")
    return stream


def size_of(stream: Any) -> int:
    """Size in bytes of an open regular file, or of the compressed file behind a stream."""
    return os.fstat(stream.fileno()).st_size


def is_packed(stream: Any) -> bool:
    """Whether a stream is one that ``inflated`` returned."""
    return isinstance(stream, _Deflated | bz2.BZ2File)


def is_gzip(path: Path) -> bool:
    """Whether a file's content is a gzip stream, whatever it is called."""
    with open_regular(path, str(path)) as stream:
        return stream.read(2) == GZIP


def compression(block: bytes) -> str:
    """The compression of a file that begins with ``block``, or an empty string."""
    return "gzip" if block[:2] == GZIP else "bzip2" if block[:3] == b"BZh" else ""


def start(path: Path, source: str, size: int = 512) -> tuple[str, bytes]:
    """The compression of a file, if any, and the first bytes of its content; no bytes if it is damaged."""
    with open_regular(path, source) as stream:
        block = stream.read(size)
        if kind := compression(block):
            stream.seek(0)
            try:
                block = inflated(stream, kind).read(size)
            except DAMAGE:
                block = b""
        return kind, block


def inflated(stream: BinaryIO, kind: str) -> Any:
    """A reader of the content of a compressed stream, from its current position: ``gzip``, ``zlib`` or ``bzip2``.

    Closing it closes the stream.
    """
    return bz2.BZ2File(stream) if kind == "bzip2" else _Deflated(stream, kind)


def exactly(stream: Any, size: int, source: str) -> tuple[np.ndarray, list[str]]:
    """The next ``size`` bytes of a stream, uint8, and warnings; the stream must end there, with a good checksum.

    Raises PreprocessingError if the stream is damaged, ends earlier or continues.
    """
    content = np.empty(size, np.uint8)
    view, length = memoryview(content.data), 0
    try:
        while length < size:
            count = stream.readinto(view[length : length + INFLATED_CHUNK])
            if not count:
                raise PreprocessingError(f"{source}: cut short ({length} of {size} bytes of voxels); copy it again")
            length += count
    except DAMAGE as error:
        raise _damaged(source) from error
    try:
        # Reading to the end makes the stream compare its checksum.
        more = stream.read(1)
    except DAMAGE as error:
        raise _damaged(source) from error
    if more:
        raise PreprocessingError(
            f"{source}: holds more bytes than the {size} that its header states: one of the two is wrong; convert it "
            f"again"
        )
    return content, [TRAILING] if getattr(stream, "trailing", False) else []


def plausible(size: int, file_size: int, largest: int, source: str) -> None:
    """Refuse an implausible size stated by a header before memory is allocated; sizes in bytes."""
    if size > largest:
        raise PreprocessingError(
            f"{source}: its header claims {size / 1e9:.1f} GB of voxels, more than {largest / 1e9:g} GB; "
            f"--largest-gb raises the limit"
        )
    if size > LARGEST_EXPANSION * file_size:
        raise PreprocessingError(f"{source}: cut short, or its header is wrong; copy it again")


def _damaged(source: str) -> PreprocessingError:
    return PreprocessingError(f"{source}: its compressed stream is damaged or cut short; copy it again")


class _Deflated(io.RawIOBase):
    """A zlib stream, or the members of a gzip stream, inflated on demand.

    ISA-L compares the checksum (and gzip's length) at the end of a stream. ``trailing`` is set if bytes that are
    neither zeros nor another member follow the end; Python's own gzip reader loses voxels because of them.
    """

    def __init__(self, stream: BinaryIO, kind: str) -> None:
        self._stream, self._kind = stream, kind
        flag = igzip_lib.DECOMP_GZIP if kind == "gzip" else igzip_lib.DECOMP_ZLIB
        self._start = lambda: igzip_lib.IgzipDecompressor(flag=flag)
        self._inflater = self._start()
        self._rest = b""
        self.trailing = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
        super().close()

    def read(self, size: int = -1) -> bytes:
        """Read ``size`` bytes, or fewer if the stream ends before."""
        blocks = []
        while size > 0 and (block := self._next(size)):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def readinto(self, buffer: Any) -> int:
        block = self._next(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def _next(self, size: int) -> bytes:
        while not self._inflater.eof or self._another():
            packed = b""
            if self._inflater.needs_input:
                packed = self._rest or self._stream.read(PACKED_CHUNK)
                self._rest = b""
                if not packed:
                    raise EOFError
            block: bytes = self._inflater.decompress(packed, size)
            if block:
                return block
        return b""

    def _another(self) -> bool:
        """Whether another gzip member follows the last one."""
        rest = self._inflater.unused_data
        if self._kind == "gzip":
            while len(rest := rest.lstrip(b"\0")) < 2 and (more := self._stream.read(PACKED_CHUNK)):
                rest += more
            if rest[:2] == GZIP:
                self._inflater, self._rest = self._start(), rest
                return True
        self.trailing = self.trailing or bool(rest or self._stream.read(1))
        return False
