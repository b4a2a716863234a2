"""Compressed frames (PS3.5, A.4): the stream of each, what it claims of its size, and a bare file for the decoder."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70))
JPEG_LS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (80, 81))
JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))


class Undecodable(Exception):
    """Pixels that cannot be decoded; the message says what is wrong with them."""


@lru_cache(maxsize=1)
def frame_streams(path: Path, modified: int, start: int, frames: int) -> list[bytes]:
    """The streams of the frames whose encapsulated pixels begin at a byte of a file (``modified`` at a time, for the
    cache). Raises Undecodable if their fragments are damaged."""
    from pydicom.encaps import generate_frames

    with path.open("rb") as stream:
        stream.seek(start)
        data = stream.read()
    try:
        return list(generate_frames(data, number_of_frames=frames))
    except Exception as error:
        # pydicom parses bytes of strangers, and raises whatever they make it raise.
        raise Undecodable("its fragments are damaged") from error


def stated_size(stream: bytes, syntax: str, rows: int, columns: int) -> None:
    """Raises Undecodable if a stream claims another size than the header, or a precision that ends a decoder."""
    if syntax in JPEG or syntax in JPEG_LS:
        precision, stated = _jpeg_frame(stream)
        if not 2 <= precision <= 16:
            # In a lossless stream GDCM ends the process over it.
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
        raise Undecodable(f"a picture of {stated[0]} x {stated[1]}, its header says {rows} x {columns}")


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


@contextlib.contextmanager
def bare_file(stream: bytes, syntax: str, layout: Mapping[str, int]) -> Iterator[str]:
    """The path of a DICOM file that holds one frame and nothing else, in memory where the system allows it."""
    from pydicom import Dataset, dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, CTImageStorage

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = UID("2.25.1")
    data.file_meta.TransferSyntaxUID = UID(syntax)
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CT", "MONOCHROME2", 1
    data.Rows, data.Columns, data.PixelRepresentation = layout["rows"], layout["columns"], int(layout["signed"])
    data.BitsAllocated, data.BitsStored, data.HighBit = layout["allocated"], layout["stored"], layout["high"]
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    with _in_memory() as (file, path):
        dcmwrite(file, data, enforce_file_format=True)
        file.flush()
        yield path


@contextlib.contextmanager
def _in_memory():  # type: ignore[no-untyped-def]
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("frame"), "wb") as file:
            yield file, f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
            yield file, file.name
