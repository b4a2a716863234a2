"""Read headers of DICOM files, and find the images of a folder among its other files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ctclip.preprocessing.dicom.elements import Element, Encoding, NotDicom, Parsed, parse
from ctclip.preprocessing.errors import PreprocessingError

MOST_FILES = 20000
DIRECTORY = "1.2.840.10008.1.3.10"
# Tags needed to decode the pixels of a slice.
VALUES = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
          "PixelPaddingValue", "PixelPaddingRangeLimit")  # fmt: skip
# Tags in which two acquisitions or reconstructions of one series differ.
ACQUISITION = ("SeriesNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex",
               "ConvolutionKernel", "ImageType", "SeriesDescription", "SliceThickness", "AcquisitionTime",
               "ReconstructionDiameter", "NominalPercentageOfCardiacPhase", "KVP", "ContrastBolusAgent", "SeriesTime",
               "ProtocolName", "FilterType", "ReconstructionAlgorithm", "PatientPosition")  # fmt: skip
IMAGE_TAGS = (
    "SpecificCharacterSet", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "Modality", "SOPClassUID", "SamplesPerPixel", "NumberOfFrames", "PatientIdentityRemoved", "LossyImageCompression",
    "PhotometricInterpretation", "RescaleType", "InstanceNumber", "ImagesInAcquisition", "PatientID",
    "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ConcatenationFrameOffsetNumber", "StudyID",
    *VALUES, *ACQUISITION,
)  # fmt: skip
# Patient and study tags that derived objects copy, besides ``identifiers.TAGS``.
STUDY = ("PatientSex", "PatientAge", "StudyTime", "StudyDescription", "PositionReferenceIndicator")
FUNCTIONAL_GROUPS = (0x52009229, 0x52009230)
# First bytes of programs, images and pages on a patient's CD.
OTHER_FILES = (
    b"MZ", b"PK", b"%PDF", b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"\0\0\1\0", b"\x7fELF", b"\xca\xfe",
    b"\xd0\xcf\x11\xe0", b"\x00\x05\x16\x07", b"\0\0\0\1Bud1", b"SQLite", b"\x1f\x8b", b"7z", b"Rar!", b"MSCF", b"ITSF",
    b"\xfe\xff", b"\xff\xfe", b"OTTO", b"\0\1\0\0", b"ID3", b"II*\0", b"MM\0*",
)  # fmt: skip


class Header(dict[str, Any]):
    """Values by keyword, as pydicom converts them, and ``file_meta`` likewise."""

    file_meta: dict[str, Any]


@dataclass
class Image:
    """One image of a file: ``header`` with its values of ``IMAGE_TAGS``, and the position of its pixels.

    ``frames`` is the number of images in the file, ``frame`` the index of this one.
    """

    path: Path
    header: Header
    syntax: str
    little: bool
    pixels: Element | None
    frame: int = 0
    frames: int = 1


def read_header(source: Path | BinaryIO, tags: Iterable[str]) -> Header | None:
    """The requested tags (keywords) of a DICOM file, and its ``file_meta``; None if it is not a DICOM file."""
    parsed = _parsed(source, tuple(tags), ())
    return None if parsed is None else header_of(parsed)


def is_directory_record(header: Any) -> bool:
    """Whether a header is that of a DICOMDIR, whatever the file name."""
    return str(getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID", "")) == DIRECTORY


def files_below(folder: Path) -> Iterator[Path]:
    """The files below a folder. Links to folders are followed, except to parent folders; each folder is listed once."""
    top, seen = os.path.realpath(folder), set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen or (real != top and Path(top).is_relative_to(real)):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(root, name) for name in sorted(names))


def images(folder: Path, extra: Iterable[str]) -> tuple[list[Image], set[Path]]:
    """The images below a folder, with the additional tags ``extra`` but without pixels; and all DICOM files."""
    from ctclip.preprocessing.dicom.frames import expanded

    files = sorted(islice(files_below(folder), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise PreprocessingError(
            f"{folder}: holds more than {MOST_FILES} files, more than one study; name a series' folder"
        )
    tags = tuple(dict.fromkeys([*IMAGE_TAGS, *extra]))
    known, dicom = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in files:
            parsed = None if path.name.startswith("._") else _parsed(path, tags, FUNCTIONAL_GROUPS)
            if parsed is None:
                continue
            dicom.add(path)
            header = header_of(parsed)
            if "Rows" in header and not is_directory_record(header):
                image = Image(path, header, parsed.syntax, parsed.encoding.little, parsed.pixels)
                known += expanded(image, parsed)
    return known, dicom


def damaged_files(folder: Path, slices: list[Image], dicom: set[Path]) -> int:
    """The number of files below ``folder`` that have a DICOM preamble, or look like the slices, but could not be
    read."""
    usual = float(np.median([image.path.stat().st_size for image in slices])) if slices else float("inf")
    beside = {(image.path.parent, image.path.suffix, _pattern(image.path)) for image in slices}
    places = {(parent, suffix) for parent, suffix, _ in beside}
    count = 0
    for path in files_below(folder):
        if path in dicom or path.name.startswith("._") or not path.is_file():
            continue
        with path.open("rb") as stream:
            head = stream.read(512)
        if head[128:132] == b"DICM":
            count += 1
        elif (path.parent, path.suffix) in places and not _other(head):
            # A preamble consists of zeros, and so do slices that were truncated within it or lost.
            called_alike = bool(path.suffix) or (path.parent, path.suffix, _pattern(path)) in beside
            lost = not head.strip(b"\0") and (bool(head) or called_alike)
            count += lost or usual / 2 < path.stat().st_size < 2 * usual
    return count


def _pattern(path: Path) -> str:
    return re.sub(r"\d+", "0", path.name)


def _other(head: bytes) -> bool:
    """Whether bytes are the beginning of a file of another known type, or of a text."""
    text = bool(head) and not head.translate(None, bytes([9, 10, 12, 13, *range(32, 127), *range(160, 256)]))
    return text or head.startswith(OTHER_FILES)


def _parsed(source: Path | BinaryIO, tags: tuple[str, ...], sequences: tuple[int, ...]) -> Parsed | None:
    try:
        if not isinstance(source, Path):
            return parse(source, _numbers(tags), sequences)
        if not source.is_file():
            return None
        with source.open("rb", buffering=0) as stream:
            return parse(stream, _numbers(tags), sequences)
    except (NotDicom, OSError):
        return None


@cache
def _numbers(tags: tuple[str, ...]) -> frozenset[int]:
    from pydicom.datadict import tag_for_keyword

    numbers = [tag_for_keyword(tag) for tag in tags]
    return frozenset(int(number) for number in numbers if number is not None)


def header_of(parsed: Parsed) -> Header:
    """The values as converted by pydicom. Values that cannot be converted are left out silently, because pydicom's
    messages quote them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = converted(parsed.values, parsed.encoding)
        header.file_meta = converted({t: v for t, v in parsed.meta.items() if t == 0x00020002}, Encoding(False, True))
    return header


def converted(values: dict[int, tuple[str | None, bytes]], encoding: Encoding) -> Header:
    """Convert raw values by tag to a header."""
    from pydicom.datadict import keyword_for_tag

    characters = values.get(0x00080005, (None, b""))[1]
    header = Header()
    for tag, (vr, raw) in values.items():
        value = _value(tag, vr, raw, encoding.implicit, encoding.little, characters)
        if value is not _UNREADABLE:
            header[keyword_for_tag(tag)] = value
    return header


_UNREADABLE = object()


@lru_cache(maxsize=8192)
def _value(tag: int, vr: str | None, raw: bytes, implicit: bool, little: bool, characters: bytes) -> Any:
    # The slices of a series share most values, so conversions are cached.
    from pydicom.charset import convert_encodings
    from pydicom.dataelem import RawDataElement, convert_raw_data_element
    from pydicom.tag import BaseTag

    try:
        encodings = convert_encodings(characters.decode("ascii").strip("\0 ").split("\\"))
    except Exception:
        encodings = ["iso8859"]
    try:
        element = RawDataElement(BaseTag(tag), vr, len(raw), raw, 0, implicit, little)
        value = convert_raw_data_element(element, encoding=encodings).value
    except Exception:
        # pydicom converts untrusted bytes, which can make it raise any exception.
        return _UNREADABLE
    if isinstance(value, bytes) and len(value) == 2:
        # "US or SS" without a stated type is read as unsigned, see ``padding``.
        return int.from_bytes(value, "little" if little else "big")
    return value
