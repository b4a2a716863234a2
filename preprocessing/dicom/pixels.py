"""Pixels of one slice in HU. Uncompressed pixels are decoded here, compressed ones by GDCM."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing.child import decode_in_child
from ctclip.preprocessing.dicom.codestreams import RLE, Undecodable, decoded, frame_streams, stated_size
from ctclip.preprocessing.dicom.elements import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    PIXELS,
    UNDEFINED,
    NotDicom,
    follows_pixels,
    inflate,
)
from ctclip.preprocessing.dicom.headers import Image
from ctclip.preprocessing.dicom.padding import padded
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.hounsfield import OUTSIDE_FIELD_OF_VIEW
from ctclip.preprocessing.identifiers import masked

NATIVE = ("", IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED)
LOSSY = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81))
LARGEST_SIDE = 8192


class UndecodableSlices(PreprocessingError):
    """``images``: the images whose pixels cannot be decoded; the message is that of the first."""

    def __init__(self, message: str, images: list[Image]) -> None:
        super().__init__(message)
        self.images = images


@dataclass(frozen=True)
class Layout:
    """The bit layout of a pixel: ``high`` is the highest of the ``stored`` bits among the ``allocated`` bits."""

    rows: int
    columns: int
    allocated: int
    stored: int
    high: int
    signed: bool

    @property
    def size(self) -> int:
        """Bytes of one frame."""
        return self.rows * self.columns * self.allocated // 8


def hounsfield(source: str, image: Image) -> np.ndarray:
    """One slice [row, column] in HU: int16 if all values are integers that fit, else float32.

    Stored values are rescaled by the slice's own slope and intercept. PhotometricInterpretation is ignored, because it
    concerns display only. Padding becomes air. Raises UndecodableSlices.
    """
    try:
        slope, intercept = _rescale(image.header)
        layout = _layout(image.header)
        raw = _native(image, layout) if image.syntax in NATIVE else _compressed(image, layout)
        stored = _used_bits(raw, layout)
        padding = padded(stored, raw, image.header, slope, intercept)
    except Undecodable as error:
        file = masked(image.path.name, image.header)
        remedy = (
            "it is damaged: copy or export the series again"
            if image.syntax in NATIVE
            else f"it is damaged, or its transfer syntax ({named(image.syntax)}) is not supported: export the series "
            f"again, uncompressed"
        )
        message = f"{source}: slice {file} cannot be decoded ({error}); {remedy}"
        raise UndecodableSlices(message, [image]) from error
    values = _rescaled(stored, slope, intercept, padding)
    if padding is not None:
        values[padding] = OUTSIDE_FIELD_OF_VIEW
    return values


def _rescaled(stored: np.ndarray, slope: float, intercept: float, padding: np.ndarray | None) -> np.ndarray:
    measured = stored if padding is None else stored[~padding]
    stored_ends = [int(measured.min()), int(measured.max())] if measured.size else [0]
    ends = sorted(end * slope + intercept for end in stored_ends)
    whole = slope == int(slope) and intercept == int(intercept) and abs(slope) < 2**15 and abs(intercept) < 2**31
    if whole and ends[0] >= -32768 and ends[-1] <= 32767:
        # 16-bit arithmetic wraps around, but results that fit are correct.
        values = stored.astype(np.int16)
        if slope != 1:
            values *= np.int16(slope)
        values += np.array(int(intercept)).astype(np.int16)
        return values
    return (stored * float(slope) + float(intercept)).astype(np.float32)


def _rescale(header: Any) -> tuple[float, float]:
    values = []
    for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = header.get(keyword, None)
        try:
            values.append(default if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise Undecodable(f"its {keyword} is not a number") from None
        if not np.isfinite(values[-1]) or abs(values[-1]) > 1e9:
            raise Undecodable(f"its {keyword} is not a number")
    if values[0] == 0:
        raise Undecodable("its RescaleSlope is 0")
    return values[0], values[1]


def _layout(header: Any) -> Layout:
    try:
        allocated = int(header.get("BitsAllocated", 16) or 16)
        stored = int(header.get("BitsStored", allocated) or allocated)
        high = header.get("HighBit", None)
        high = stored - 1 if high is None else int(high)
        signed = int(header.get("PixelRepresentation", 0) or 0)
        layout = Layout(int(header["Rows"]), int(header["Columns"]), allocated, stored, high, signed == 1)
    except (KeyError, TypeError, ValueError):
        raise Undecodable("its header does not state how pixels are stored") from None
    if allocated not in (8, 16, 32) or not 1 <= stored <= high + 1 <= allocated or signed not in (0, 1):
        raise Undecodable(f"{allocated} bits allocated, {stored} stored, high bit {high}")
    if max(layout.rows, layout.columns) > LARGEST_SIDE:
        raise Undecodable(f"{layout.rows} x {layout.columns} pixels, too many for a CT")
    return layout


def _dtype(layout: Layout) -> np.dtype:
    return np.dtype(f"{'i' if layout.signed else 'u'}{layout.allocated // 8}")


def _used_bits(raw: np.ndarray, layout: Layout) -> np.ndarray:
    """Clear the bits above and below the stored ones, which hold overlays or nothing."""
    unused, high = layout.allocated - layout.stored, layout.high
    if unused == 0:
        return raw
    below = high + 1 - layout.stored
    if below and (raw & (2**below - 1)).any():
        # Bits that the header declares unused are used: assume that values start at the lowest bit, as in nearly all
        # files.
        if (raw.view(raw.dtype.str.replace("i", "u")) >> layout.stored).any():
            raise Undecodable(f"{layout.stored} bits stored below high bit {high}, and others used")
        high = layout.stored - 1
    # Shift to the top and back; for signed values, the arithmetic shift extends the sign into the unused bits.
    return raw << (layout.allocated - 1 - high) >> unused


def _native(image: Image, layout: Layout) -> np.ndarray:
    """An uncompressed frame, in native byte order."""
    assert image.pixels is not None
    tag, _, start, length = image.pixels
    if tag != PIXELS[-1]:
        raise Undecodable("its pixels are floating-point numbers, which are not allowed in a CT")
    if length == UNDEFINED:
        raise Undecodable("its pixels are compressed, but its transfer syntax is uncompressed")
    due = image.frames * layout.size
    if length not in (due, due + due % 2):
        raise Undecodable(f"{length} bytes of pixels, but its header states {due}")
    start += image.frame * layout.size
    if image.syntax == DEFLATED:
        data = _inflated(image.path, image.path.stat().st_mtime_ns, image.pixels.start + length)
        data = data[start : start + layout.size]
    else:
        with image.path.open("rb", buffering=0) as stream:
            stream.seek(start)
            data = stream.read(layout.size) or b""
    if len(data) < layout.size:
        raise Undecodable("cut short")
    dtype = _dtype(layout).newbyteorder("<" if image.little else ">")
    return np.frombuffer(data, dtype).reshape(layout.rows, layout.columns).astype(_dtype(layout), copy=False)


@lru_cache(maxsize=1)
def _inflated(path: Path, modified: int, length: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return inflate(stream, length)
    except NotDicom as error:
        raise Undecodable(str(error)) from error


def _compressed(image: Image, layout: Layout) -> np.ndarray:
    """A compressed frame, decoded."""
    assert image.pixels is not None
    if image.pixels.length != UNDEFINED:
        raise Undecodable("its pixels are not compressed, but its transfer syntax is compressed")
    streams = frame_streams(image.path, image.path.stat().st_mtime_ns, image.pixels.start, image.frames)
    if image.frame >= len(streams):
        raise Undecodable(f"{len(streams)} frames, but its header states {image.frames}")
    stream = streams[image.frame]
    stated_size(stream, image.syntax, layout.rows, layout.columns)
    array = _decoded(stream, image.syntax, layout)
    if array.shape != (layout.rows, layout.columns):
        raise Undecodable(f"an image of {array.shape}, but its header states {(layout.rows, layout.columns)}")
    return array.astype(_dtype(layout), copy=False)


def _decoded(stream: bytes, syntax: str, layout: Layout) -> np.ndarray:
    """Decode one codestream: RLE in this process, others by GDCM in a child process, which a damaged stream may
    crash."""
    if syntax == RLE:
        return decoded(stream, syntax, asdict(layout))
    try:
        array, _ = decode_in_child(
            "ctclip.preprocessing.dicom.codestreams:decoded", stream, syntax, asdict(layout), source="the frame"
        )
    except PreprocessingError as error:
        raise Undecodable(str(error)) from error
    return array


def bytes_behind(image: Image) -> bool:
    """Whether bytes that are neither padding nor elements follow a file's uncompressed pixels, so that bytes may have
    been inserted before."""
    pixels = image.pixels
    if pixels is None or pixels.length == UNDEFINED or image.syntax not in NATIVE or image.syntax == DEFLATED:
        return False
    end = pixels.start + pixels.length
    if image.path.stat().st_size <= end:
        return False
    with image.path.open("rb") as stream:
        stream.seek(end)
        return not follows_pixels(stream.read(2**16), image.little)


def lossy(image: Image) -> bool:
    """Whether a slice has lossy compression, by its syntax or by its header."""
    return image.syntax in LOSSY or str(image.header.get("LossyImageCompression", "")).strip() == "01"


def named(syntax: str) -> str:
    """A transfer syntax by name and UID."""
    import pydicom

    if not syntax:
        return "none"
    # pydicom's warnings quote values.
    name = pydicom.uid.UID(syntax, validation_mode=pydicom.config.IGNORE).name
    return syntax[:64] if name == syntax else f"{name}, {syntax}"
