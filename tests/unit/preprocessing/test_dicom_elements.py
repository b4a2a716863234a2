"""The parser of DICOM headers compared with pydicom's on pydicom's own files, and input that it refuses in bounded time
and memory."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.dicom.elements import DEEPEST, PIXELS, NotDicom, parse
from ctclip.preprocessing.dicom.headers import IMAGE_TAGS, read_header
from ctclip.preprocessing.readers import read
from tests.unit.preprocessing.dicom_builder import deflated, series, truth, write

FILES = sorted(p for p in (Path(pydicom.__file__).parent / "data" / "test_files").rglob("*") if p.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_values_are_those_of_pydicom(path: Path) -> None:
    ours = read_header(path, IMAGE_TAGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = pydicom.dcmread(path, stop_before_pixels=True)
        except Exception:
            # Files that pydicom reads only with force=True: those without a preamble are read here.
            assert ours is None or path.name.endswith(("NoMeta.dcm", "rtstruct.dcm"))
            return
        if path.name == "rtplan_truncated.dcm":
            assert ours is None, "a header that was cut is no header"
            return
        assert ours is not None
        for keyword in IMAGE_TAGS:
            try:
                value = theirs.get(keyword)
            except Exception:
                value = None
            if keyword.startswith("PixelPadding") and value is not None:
                assert int(ours[keyword]) % 2**16 == int(value) % 2**16
            else:
                assert str(ours.get(keyword)) == str(value), keyword


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".dcm"], ids=lambda path: path.name)
def test_pixels_begin_where_pydicom_finds_them(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            parsed = parse(stream, ())
        data = pydicom.dcmread(path)
    except (NotDicom, pydicom.errors.InvalidDicomError, EOFError):
        return
    stated = any(tag in data for tag in PIXELS)
    assert (parsed.pixels is not None) == stated
    if stated and parsed.pixels and parsed.pixels.length < 2**32 - 1 and not parsed.syntax.endswith(".99"):
        value = data[parsed.pixels.tag].value
        content = path.read_bytes()[parsed.pixels.start :][: parsed.pixels.length]
        assert content == value


def nested(depth: int, stated: bool = False) -> bytes:
    """A data set with a sequence nested to this depth, of stated or undefined lengths."""
    inner = b""
    if stated:
        for _ in range(depth):
            item = b"\xfe\xff\x00\xe0" + struct.pack("<L", len(inner)) + inner
            inner = b"\x09\x00\x01\x10SQ\0\0" + struct.pack("<L", len(item)) + item
    else:
        opening = b"\x09\x00\x01\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
        inner = opening * depth + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth
    rows = b"\x28\x00\x10\x00US\x02\0\x07\0"
    return b"\x08\x00\x05\x00CS\x0a\0ISO_IR 100" + inner + rows


@pytest.mark.parametrize(("depth", "fits"), [(DEEPEST, True), (DEEPEST + 1, False), (20000, False), (500000, False)])
def test_nesting_is_bounded(depth: int, fits: bool) -> None:
    start = time.process_time()
    content = io.BytesIO(b"\0" * 128 + b"DICM" + nested(depth))
    if fits:
        assert parse(content, {0x00280010}).values[0x00280010][1] == b"\x07\0"
    else:
        with pytest.raises(NotDicom):
            parse(content, {0x00280010})
    assert time.process_time() - start < 2


def test_sequences_of_stated_length_are_stepped_over() -> None:
    """At any depth: their contents are not parsed."""
    content = io.BytesIO(b"\0" * 128 + b"DICM" + nested(2000, stated=True))
    assert parse(content, {0x00280010}).values[0x00280010][1] == b"\x07\0"


def test_no_bytes_end_or_hold_up_the_parser() -> None:
    """Arbitrary bytes after the start of a data set, and arbitrary changes of a valid file."""
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, series(truth(1))[0], enforce_file_format=True)
    good = buffer.getvalue()
    start = time.process_time()
    for number in range(2000):
        if number % 2:
            content = b"\0" * 128 + b"DICM" + random.bytes(300)
        else:
            changed = bytearray(good)
            for place in random.integers(132, 1200, 5):
                changed[int(place)] = int(random.integers(256))
            content = bytes(changed)
        with contextlib.suppress(NotDicom):
            parse(io.BytesIO(content), {0x00280010})
    assert time.process_time() - start < 20


def test_a_deflated_bomb_is_inflated_no_further_than_its_header_says(tmp_path: Path) -> None:
    """Slices of 80 KB that would inflate to 80 MB each are refused as soon as they are longer than their headers
    state."""
    hu = truth(4)
    paths = sorted(write(tmp_path / "s", series(hu)).iterdir())
    for path in paths:
        content = path.read_bytes()
        deflated(path, content[content.index(b"\x08\x00\x08\x00CS") :] + bytes(80 * 2**20))
    tracemalloc.start()
    with pytest.raises(PreprocessingError, match="damaged"):
        read(tmp_path / "s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20


def test_headers_that_claim_more_than_their_files_hold(tmp_path: Path) -> None:
    """Slices of 8000 x 8000 pixels in 20 KB each, deflated: refused before anything is inflated."""
    for path in write(tmp_path / "s", series(truth(6), Rows=8000, Columns=8000)).iterdir():
        content = path.read_bytes()
        at = content.rindex(b"\xe0\x7f\x10\x00OW") + 8
        claim = content[content.index(b"\x08\x00\x08\x00CS") : at] + struct.pack("<L", 2 * 8000 * 8000)
        deflated(path, claim + bytes(20 * 2**20))
    with pytest.raises(PreprocessingError, match="6 x 8000 x 8000 voxels, more than its files hold"):
        read(tmp_path / "s")


@pytest.mark.parametrize("depth", [900, 20000])
def test_a_process_survives_deep_nesting_with_a_high_recursion_limit(tmp_path: Path, depth: int) -> None:
    """Other libraries raise Python's recursion limit; recursion would then crash the process."""
    for path in write(tmp_path / "s", series(truth(4))).iterdir():
        content = path.read_bytes()
        at = content.index(b"\x08\x00\x16\x00UI")
        path.write_bytes(content[:at] + nested(depth)[18:-10] + content[at:])
    script = (
        "import sys; sys.setrecursionlimit(10**6)\nfrom ctclip.preprocessing.readers import read\n"
        "from ctclip.preprocessing import PreprocessingError\n"
        f"try: read({str(tmp_path / 's')!r})\nexcept PreprocessingError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, env=os.environ)
    assert done.returncode == 0
    assert "4 DICOM files, none of which can be read" in done.stdout


def test_a_single_deep_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0" * 128 + b"DICM" + nested(20000))
    with pytest.raises(PreprocessingError, match="nested too deep"):
        read(tmp_path / "x")
