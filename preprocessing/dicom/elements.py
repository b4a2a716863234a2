"""The data elements of a DICOM file (PS3.5, chapter 7), found without recursion and within bounds.

Libraries parse nested sequences recursively: a file nested 20,000 levels deep crashes some and stalls others. Here
sequences are skipped, at most ``DEEPEST`` levels deep, and only the requested values are kept.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

DEEPEST = 64
# Headers of enhanced multi-frame images have kilobytes per frame; other headers fit the first block.
FIRST_BLOCK = 2**16
LONGEST_HEADER = 2**27
LONGEST_VALUE = 2**16

IMPLICIT_LITTLE, EXPLICIT_LITTLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, EXPLICIT_BIG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
TRANSFER_SYNTAX = 0x00020010
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
ITEM, END_OF_ITEM, END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
SHORT_VR = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VR = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


class Element(NamedTuple):
    """The position of an element's value: ``start`` and ``length`` in bytes; ``length`` is UNDEFINED if not stated."""

    tag: int
    vr: str | None
    start: int
    length: int


class NotDicom(Exception):
    """The bytes are not a DICOM data set, or are damaged."""


class _Short(Exception):
    """More bytes are needed."""


@dataclass
class Encoding:
    """The encoding of elements: explicit or implicit types, and byte order."""

    implicit: bool
    little: bool

    def __post_init__(self) -> None:
        order = "<" if self.little else ">"
        self.tag, self.short, self.long = (struct.Struct(order + word) for word in ("HH", "H", "L"))


@dataclass
class Parsed:
    """The requested values of a file, by tag; ``pixels`` is the position of its pixel data (in the inflated stream of a
    deflated file)."""

    encoding: Encoding
    meta: dict[int, tuple[str | None, bytes]] = field(default_factory=dict)
    values: dict[int, tuple[str | None, bytes]] = field(default_factory=dict)
    sequences: dict[int, bytes] = field(default_factory=dict)
    pixels: Element | None = None

    @property
    def syntax(self) -> str:
        """The transfer syntax as the file states it, empty if it does not."""
        return self.meta.get(TRANSFER_SYNTAX, ("UI", b""))[1].decode("ascii", "replace").strip("\0 ")


def parse(stream: BinaryIO, tags: Collection[int], sequences: Collection[int] = ()) -> Parsed:
    """The values of ``tags`` in a DICOM file, with or without a preamble, up to its pixels. Raises NotDicom."""
    data, whole = b"", False
    while len(data) < LONGEST_HEADER:
        size = max(FIRST_BLOCK, 7 * len(data))
        more = stream.read(size)
        data, whole = data + more, len(more) < size
        try:
            return _parse(data, whole, tags, sequences)
        except _Short:
            if whole:
                break
    raise NotDicom("cut short, or its header is too long")


def _parse(data: bytes, whole: bool, tags: Collection[int], sequences: Collection[int]) -> Parsed:
    at = 132 if data[128:132] == b"DICM" else 0
    explicit = Encoding(False, True)
    parsed = Parsed(explicit)
    if at == 0 and not _plausible(data):
        raise NotDicom("no DICOM data set")
    while data[at : at + 2] == b"\2\0":
        element = _element(data, at, explicit)
        at = _after(data, element, explicit)
        parsed.meta[element.tag] = element.vr, data[element.start : element.start + element.length]
    if parsed.syntax == DEFLATED:
        data, whole = _inflated_start(data[at:])
        at = 0
    else:
        parsed.encoding = _encoding(data, at, parsed.syntax)
    _values(data, at, parsed, tags, sequences)
    if parsed.pixels is None and not whole:
        raise _Short
    return parsed


def _values(data: bytes, at: int, parsed: Parsed, tags: Collection[int], sequences: Collection[int]) -> None:
    for element in elements(data, at, parsed.encoding):
        if element.tag in PIXELS:
            parsed.pixels = element
            return
        if element.tag in tags and element.length <= LONGEST_VALUE:
            parsed.values[element.tag] = element.vr, data[element.start : element.start + element.length]
        elif element.tag in sequences:
            parsed.sequences[element.tag] = data[element.start : _after(data, element, parsed.encoding)]


def elements(data: bytes, at: int, encoding: Encoding) -> Iterator[Element]:
    """The elements of one level in file order, up to and including the pixels."""
    while len(data) - at >= 8:
        element = _element(data, at, encoding)
        if element.tag in (END_OF_ITEM, END_OF_SEQUENCE):
            return
        if element.tag not in PIXELS:
            at = _after(data, element, encoding)
        yield element
        if element.tag in PIXELS:
            return


def items(data: bytes, encoding: Encoding) -> Iterator[bytes]:
    """The items of a sequence's value, each a data set."""
    at = 0
    while len(data) - at >= 8:
        element = _element(data, at, encoding)
        if element.tag != ITEM:
            return
        at = _after(data, element, encoding)
        yield data[element.start : at]


def inflate(stream: BinaryIO, length: int) -> bytes:
    """The ``length`` bytes of the data set of a deflated file, which few other bytes may follow.

    Raises NotDicom if the stream is damaged, which, without a checksum, only its end reveals.
    """
    data = stream.read()
    at, explicit = 132 if data[128:132] == b"DICM" else 0, Encoding(False, True)
    try:
        while data[at : at + 2] == b"\2\0":
            at = _after(data, _element(data, at, explicit), explicit)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        content = inflater.decompress(data[at:], length + LONGEST_VALUE)
        behind = content[length:]
        if not inflater.eof or inflater.unused_data.strip(b"\0") or not follows_pixels(behind, True):
            raise NotDicom("damaged")
        return content[:length]
    except (zlib.error, _Short) as error:
        raise NotDicom("damaged") from error


def follows_pixels(content: bytes, little: bool) -> bool:
    """Whether ``content`` may follow the pixels: nothing, padding, or elements of higher groups (signatures,
    padding)."""
    return not content.strip(b"\0") or int.from_bytes(content[:2], "little" if little else "big") > PIXELS[-1] >> 16


def _inflated_start(data: bytes) -> tuple[bytes, bool]:
    """The first bytes of a deflated stream, enough for a header, and whether the stream ends there."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        start = inflater.decompress(data, max(2**20, 16 * len(data)))
    except zlib.error as error:
        raise NotDicom("damaged") from error
    return start, inflater.eof


def _plausible(data: bytes) -> bool:
    """Whether bytes without a preamble begin like a data set: with an element of group 2 or 8 and a plausible
    length."""
    if len(data) < 16 or data[:2] not in (b"\2\0", b"\x08\0", b"\0\x08"):
        return False
    known = data[4:6] in SHORT_VR or data[4:6] in LONG_VR
    return known or int.from_bytes(data[4:8], "little" if data[0] else "big") < 1024


def _encoding(data: bytes, at: int, syntax: str) -> Encoding:
    """The encoding of the first element, because some files state another syntax in their header."""
    if len(data) < at + 8:
        raise NotDicom("empty")
    little = syntax != EXPLICIT_BIG if syntax else data[at] != 0
    vr = data[at + 4 : at + 6]
    return Encoding(vr not in SHORT_VR and vr not in LONG_VR, little)


def _element(data: bytes, at: int, encoding: Encoding) -> Element:
    try:
        group, number = encoding.tag.unpack_from(data, at)
        tag = group << 16 | number
        if not encoding.implicit and group != 0xFFFE:
            vr = data[at + 4 : at + 6]
            if vr in SHORT_VR:
                return Element(tag, vr.decode(), at + 8, encoding.short.unpack_from(data, at + 6)[0])
            if vr in LONG_VR:
                return Element(tag, vr.decode(), at + 12, encoding.long.unpack_from(data, at + 8)[0])
        return Element(tag, None, at + 8, encoding.long.unpack_from(data, at + 4)[0])
    except struct.error:
        raise _Short from None


def _after(data: bytes, element: Element, encoding: Encoding) -> int:
    """The position of the next element."""
    if element.length != UNDEFINED:
        if element.start + element.length > len(data):
            raise _Short
        return element.start + element.length
    return _sequence_end(data, element, encoding)


def _sequence_end(data: bytes, element: Element, encoding: Encoding) -> int:
    """The end of a sequence or item whose length is not stated, without recursion."""
    # Open levels: True for a sequence of items, False for an item of elements; everything inside UN is implicit.
    within = Encoding(True, encoding.little) if element.vr == "UN" else encoding
    opened = [(element.tag != ITEM, within)]
    at = element.start
    while opened:
        # A sequence and its item are two levels.
        if len(opened) > 2 * DEEPEST:
            raise NotDicom(f"sequences nested more than {DEEPEST} deep")
        sequence, within = opened[-1]
        inner = _element(data, at, within)
        at = inner.start
        if inner.tag == (END_OF_SEQUENCE if sequence else END_OF_ITEM):
            opened.pop()
        elif sequence and inner.tag != ITEM:
            raise NotDicom("a sequence without items")
        elif inner.length == UNDEFINED:
            opened.append((not sequence, Encoding(True, within.little) if inner.vr == "UN" else within))
        else:
            at += inner.length
            if at > len(data):
                raise _Short
    return at
