"""Parse lines and numbers of text headers (NRRD, MetaImage), within limits that no valid header reaches.

Libraries that parse these headers can crash on long values, so none is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ctclip.preprocessing.errors import PreprocessingError

LONGEST_LINE = 1000
LONGEST_COMMENT = 1 << 16
MOST_LINES = 10000
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?|[+-]?(nan|inf)", re.IGNORECASE)
DATA_FILE = re.compile(r"^(?:ElementDataFile\s*=|data ?file\s*:(?!=))(.{1,255})$", re.IGNORECASE | re.MULTILINE)
# Units of length in NRRD and MetaImage, in millimetres; the default is mm.
MM_PER_UNIT = {
    "": 1.0, "?": 1.0, "???": 1.0, "mm": 1.0, "dm": 100.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001, "μm": 0.001,
    "micron": 0.001, "microns": 0.001, "nm": 1e-6,
    **{f"{prefix}{word}": length for prefix, length in {"": 1000.0, "centi": 10.0, "milli": 1.0, "micro": 0.001}.items()
       for word in ("meter", "meters", "metre", "metres")},
}  # fmt: skip


def lines(stream: BinaryIO, source: str) -> Iterator[str]:
    """Lines of a header without line ends, up to the end of the file; the caller stops at the end of the header."""
    for _ in range(MOST_LINES):
        line = stream.readline(LONGEST_COMMENT + 1)
        if not line:
            return
        if len(line) > LONGEST_COMMENT:
            break
        yield line.decode("utf-8", "replace").rstrip("\r\n")
    raise PreprocessingError(f"{source}: its header does not end, or has a line that is too long; it is damaged")


def data_file(path: Path) -> str | None:
    """The voxel file that an NRRD or MetaImage header names, found by reading only its lines; None if it names none."""
    try:
        with path.open("rb") as stream:
            start = stream.read(LONGEST_COMMENT).decode("utf-8", "replace")
    except OSError:
        return None
    match = DATA_FILE.search(start)
    name = match[1].strip() if match else ""
    return name if name and "\0" not in name and name.split()[0].upper() not in ("LOCAL", "LIST") else None


def bounded(value: str, field: str, source: str) -> str:
    """The value of a field; refused if it is too long to be valid or contains a control character (one in place of a
    sign would change the number)."""
    value = value.strip(" \t")
    if len(value) > LONGEST_LINE:
        raise PreprocessingError(f"{source}: field {field!r} of its header has {len(value)} characters; it is damaged")
    if any(character < " " and character != "\t" for character in value):
        raise PreprocessingError(f"{source}: field {field!r} of its header holds a control character; it is damaged")
    return value


def numbers(value: str, count: int, field: str, source: str) -> list[float]:
    """Exactly ``count`` numbers of a field, separated by white space."""
    words = value.split()
    if len(words) != count or not all(NUMBER.fullmatch(word) for word in words):
        raise PreprocessingError(f"{source}: field {field!r} of its header is not {count} numbers; it is damaged")
    return [float(word) for word in words]


def integers(value: str, count: int, field: str, source: str) -> list[int]:
    """Exactly ``count`` whole numbers of a field."""
    words = value.split()
    if len(words) != count or not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words):
        raise PreprocessingError(f"{source}: field {field!r} of its header is not {count} whole numbers; it is damaged")
    return [int(word) for word in words]


def choice(value: str, choices: dict[str, bool], field: str, source: str) -> bool:
    """The value of a field with a fixed set of words, such as True and False."""
    if value.lower() not in choices:
        raise PreprocessingError(
            f"{source}: field {field!r} of its header is none of {', '.join(choices)}; it is damaged"
        )
    return choices[value.lower()]
