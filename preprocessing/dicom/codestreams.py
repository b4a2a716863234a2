"""Compressed frames (PS3.5, A.4): the stream of each, the size it states, and its decoding from a minimal file."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError

RLE = "1.2.840.10008.1.2.5"
# Tags of a fragment and of the end of all of them, little endian.
ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70))
JPEG_LS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (80, 81))
JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))


class Undecodable(PreprocessingError):
    """Pixels that cannot be decoded; the message states the reason."""


@lru_cache(maxsize=1)
def frame_streams(path: Path, modified: int, start: int, frames: int) -> list[bytes]:
    """The streams of the frames whose encapsulated pixels begin at byte ``start`` of a file (``modified``: its
    modification time, for the cache). Raises Undecodable if their fragments are damaged."""
    from pydicom.encaps import generate_frames

    with path.open("rb") as stream:
        stream.seek(start)
        data = stream.read()
    _check_end(data)
    try:
        return list(generate_frames(data, number_of_frames=frames))
    except Exception as error:
        # pydicom parses untrusted bytes, which can make it raise any exception.
        raise Undecodable("its fragments are damaged") from error


def _check_end(data: bytes) -> None:
    """Raises Undecodable unless the fragments end with their delimiter (PS3.5, A.4): otherwise bytes were lost, and
    later data are shifted."""
    at = 0
    while data[at : at + 4] == ITEM:
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    if data[at : at + 4] != END:
        raise Undecodable("its fragments do not end where they should")


def stated_size(stream: bytes, syntax: str, rows: int, columns: int) -> None:
    """Raises Undecodable if a stream states another size than the header, or a precision that crashes the decoder."""
    if syntax in JPEG or syntax in JPEG_LS:
        precision, stated = _jpeg_frame(stream)
        if not 2 <= precision <= 16:
            # Such a precision in a lossless stream crashes GDCM.
            raise Undecodable("JPEG of an impossible precision")
    elif syntax in JPEG_2000:
        at = stream.find(b"\xff\x4f\xff\x51")
        if at < 0 or len(stream) < at + 24:
            raise Undecodable("no JPEG 2000 stream")
        right, bottom, left, top = struct.unpack_from(">4L", stream, at + 8)
        stated = bottom - top, right - left
    else:
        return
    if stated != (rows, columns):
        raise Undecodable(f"an image of {stated[0]} x {stated[1]}, but its header states {rows} x {columns}")


def _jpeg_frame(stream: bytes) -> tuple[int, tuple[int, int]]:
    """Bits a sample and (rows, columns) by a JPEG stream's frame header (ITU-T T.81, B.2.2; T.87); 0 without one."""
    at = stream.find(b"\xff\xd8")
    while 0 <= at < len(stream) - 9 and stream[at] == 0xFF:
        marker = stream[at + 1]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return stream[at + 4], (rows, columns)
        alone = {0xD8: 2, 0xFF: 1}.get(marker)
        at += alone or 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return 0, (0, 0)


def decoded(stream: bytes, syntax: str, layout: Mapping[str, int]) -> np.ndarray:
    """Stored values [row, column] of one compressed frame: RLE by pydicom, in Python, all else by GDCM.

    GDCM gets only this stream of the file. ``layout``: fields of ``pixels.Layout``. All arguments can be pickled.
    Raises Undecodable.
    """
    if syntax == RLE:
        return _rle(stream, layout)
    import SimpleITK as sitk

    with _in_memory(_bare_file(stream, syntax, layout)) as path:
        try:
            array = sitk.GetArrayFromImage(sitk.ReadImage(path))
        except RuntimeError as error:
            raise Undecodable("its decoder refuses it") from error
    return array[0] if array.ndim == 3 else array


def _rle(stream: bytes, layout: Mapping[str, int]) -> np.ndarray:
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    options: Any = {
        "number_of_frames": 1, "rows": layout["rows"], "columns": layout["columns"], "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2", "bits_allocated": layout["allocated"],
        "bits_stored": layout["stored"], "pixel_representation": int(layout["signed"]), "pixel_keyword": "PixelData",
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            # A segment that decodes to more bytes than its pixels has inserted bytes or a lengthened run; pydicom only
            # warns. An odd number of pixels may have one byte of padding.
            warnings.simplefilter("ignore" if layout["rows"] * layout["columns"] % 2 else "error")
            array, _ = get_decoder(RLELossless).as_array(
                encapsulate([stream]), raw=True, decoding_plugin="pydicom", **options
            )
    except Exception as error:
        # pydicom parses untrusted bytes, which can make it raise any exception.
        raise Undecodable("its RLE stream is damaged") from error
    return np.array(array)


def _bare_file(stream: bytes, syntax: str, layout: Mapping[str, int]) -> bytes:
    """A minimal DICOM file (PS3.10, 7.1) with one frame and the attributes that its decoder needs."""

    def element(group: int, number: int, vr: bytes, value: bytes | int) -> bytes:
        value = struct.pack("<H", value) if isinstance(value, int) else value + b"\0" * (len(value) % 2)
        return struct.pack("<HH2sH", group, number, vr, len(value)) + value

    ct_image = b"1.2.840.10008.5.1.4.1.1.2"
    meta = element(2, 0x02, b"UI", ct_image) + element(2, 0x03, b"UI", b"2.25.1")
    meta += element(2, 0x10, b"UI", syntax.encode("ascii", "replace"))
    image = element(8, 0x16, b"UI", ct_image) + element(8, 0x18, b"UI", b"2.25.1") + element(8, 0x60, b"CS", b"CT")
    image += element(0x28, 0x02, b"US", 1) + element(0x28, 0x04, b"CS", b"MONOCHROME2 ")
    for number, keyword in ((0x10, "rows"), (0x11, "columns"), (0x100, "allocated"), (0x101, "stored"), (0x102, "high"),
                            (0x103, "signed")):  # fmt: skip
        image += element(0x28, number, b"US", int(layout[keyword]))
    item = struct.Struct("<HHL")
    even = stream + b"\0" * (len(stream) % 2)
    pixels = struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
    pixels += item.pack(0xFFFE, 0xE000, 0) + item.pack(0xFFFE, 0xE000, len(even)) + even + item.pack(0xFFFE, 0xE0DD, 0)
    length = struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(meta))
    return b"\0" * 128 + b"DICM" + length + meta + image + pixels


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file with these bytes, anonymous in memory if the system supports it."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("frame"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
            file.write(content)
            file.flush()
            yield file.name
