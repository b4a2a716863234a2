"""NRRD, attached (.nrrd) and detached (.nhdr), raw, gzip or bzip2: https://teem.sourceforge.net/nrrd/format.html."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import streams, text_header
from ctclip.preprocessing.formats.voxels import byte_count, detached, native, volume_shape
from ctclip.preprocessing.geometry_check import is_blank, millimetres
from ctclip.preprocessing.volume import Volume

TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
DTYPES = {name: kind for kind, names in TYPES.items() for name in names.split(", ")}
ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
FIELDS = {
    "type", "dimension", "sizes", "spacings", "thicknesses", "axis mins", "axismins", "axis maxs", "axismaxs", "centers",
    "centerings", "labels", "units", "kinds", "space", "space dimension", "space units", "space origin",
    "space directions", "measurement frame", "endian", "encoding", "byte skip", "byteskip", "line skip", "lineskip",
    "data file", "datafile", "content", "number", "min", "max", "old min", "oldmin", "old max", "oldmax", "block size",
    "blocksize", "sample units", "sampleunits",
}  # fmt: skip
# Kinds of spatial axes; other axes hold components of a value.
KINDS = {"domain", "space", "none", "???"}
SPACES = {
    "left-posterior-superior": (1.0, 1.0, 1.0), "lps": (1.0, 1.0, 1.0),
    "right-anterior-superior": (-1.0, -1.0, 1.0), "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0), "las": (1.0, -1.0, 1.0),
}  # fmt: skip


def read(path: Path, source: str, largest: int) -> Volume:
    """A volume [slice, row, column]: the file's axes from the slowest to the fastest. Raises PreprocessingError."""
    with streams.open_regular(path, source) as stream:
        fields, ended = _fields(stream, source)
        _drop_axis_of_one(fields, source)
        shape, dtype, encoding, skip = _layout(fields, source)
        affine, doubt, warnings = _geometry(fields, source)
        name = fields.get("data file")
        if name is None and not ended:
            raise PreprocessingError(f"{source}: cut short (its header does not end); copy it again")
        if name is None:
            content, notes = _content(stream, byte_count(shape, dtype), encoding, skip, largest, source)
    if name is not None:
        if name.split()[0] == "LIST":
            raise PreprocessingError(f"{source}: its voxels lie in several files; save it as one .nrrd")
        with streams.open_regular(detached(path, name, source), source) as stream:
            content, notes = _content(stream, byte_count(shape, dtype), encoding, skip, largest, source)
    array = content.view(dtype).reshape(shape[::-1])
    return Volume(native(array), affine, source, [*warnings, *notes], doubt)


def _fields(stream: BinaryIO, source: str) -> tuple[dict[str, str], bool]:
    """Fields by name in lower case, and whether an empty line ended the header. Keys and comments are ignored."""
    fields: dict[str, str] = {}
    lines = text_header.lines(stream, source)
    if not re.fullmatch(r"NRRD000[1-5]", next(lines, "")):
        raise PreprocessingError(f"{source}: not an NRRD file, whatever its name says")
    for number, line in enumerate(lines, start=2):
        if not line:
            return fields, True
        if line.startswith("#") or ":=" in line.partition(": ")[0]:
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or name not in FIELDS:
            raise PreprocessingError(f"{source}: line {number} of its header is not an NRRD field; it is damaged")
        name = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}.get(name, name)
        if name in fields:
            raise PreprocessingError(f"{source}: field {name!r} appears twice in its header; it is damaged")
        fields[name] = text_header.bounded(value, name, source)
        if name == "data file" and not fields[name]:
            raise PreprocessingError(f"{source}: field 'data file' of its header is empty; it is damaged")
    return fields, False


def _drop_axis_of_one(fields: dict[str, str], source: str) -> None:
    """Remove one axis of size 1 (a list or a time axis with one volume) from the fields that describe each of four
    axes."""
    if fields.get("dimension") != "4" or "sizes" not in fields:
        return
    sizes = text_header.integers(fields["sizes"], 4, "sizes", source)
    if sizes.count(1) != 1:
        raise PreprocessingError(
            f"{source}: has four axes ({fields['sizes']}): several volumes, or several values per voxel; save one volume "
            f"with one value per voxel"
        )
    fields["dimension"] = "3"
    for name in ("sizes", "kinds", "spacings", "space directions"):
        values = re.findall(r"\([^()]*\)|[^\s()]+", fields.get(name, ""))
        if name in fields and len(values) != 4:
            raise PreprocessingError(f"{source}: field {name!r} of its header is not of 4 axes; it is damaged")
        if name in fields:
            del values[sizes.index(1)]
            fields[name] = " ".join(values)


def _layout(fields: dict[str, str], source: str) -> tuple[tuple[int, int, int], np.dtype, str, int]:
    """Sizes (fastest axis first), type, encoding and the bytes to skip (-1: the voxels end the file)."""
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise PreprocessingError(f"{source}: field {name!r} of its header is missing; it is damaged")
    axes = text_header.integers(fields["dimension"], 1, "dimension", source)[0]
    if axes != 3:
        raise PreprocessingError(f"{source}: has {axes} dimensions, not the three of a volume")
    sizes = volume_shape(text_header.integers(fields["sizes"], 3, "sizes", source), source)
    kinds = fields.get("kinds", "domain domain domain").lower().split()
    if len(kinds) != 3 or not set(kinds) <= KINDS:
        raise PreprocessingError(f"{source}: not all of its axes are spatial (kinds of its header): not a volume")
    if (name := fields["type"].lower()) not in DTYPES:
        raise PreprocessingError(f"{source}: its voxels have a type that no CT has")
    dtype = np.dtype(DTYPES[name])
    if dtype.itemsize > 1:
        big = text_header.choice(fields.get("endian", "missing"), {"little": False, "big": True}, "endian", source)
        dtype = dtype.newbyteorder(">" if big else "<")
    if (word := fields["encoding"].lower()) not in ENCODINGS:
        raise PreprocessingError(f"{source}: its voxels are encoded as text or unknown; save it as raw or gzip")
    encoding = ENCODINGS[word]
    skip = text_header.integers(fields.get("byte skip", "0"), 1, "byte skip", source)[0]
    lines = text_header.integers(fields.get("line skip", "0"), 1, "line skip", source)[0]
    if lines or skip < -1 or (skip and encoding != "raw"):
        raise PreprocessingError(
            f"{source}: skipping lines or compressed bytes before the voxels is not supported; save it again"
        )
    return sizes, dtype, encoding, skip


def _content(
    stream: BinaryIO, size: int, encoding: str, skip: int, largest: int, source: str
) -> tuple[np.ndarray, list[str]]:
    length = streams.size_of(stream)
    streams.plausible(size, length, largest, source)
    if encoding != "raw":
        return streams.exactly(streams.inflated(stream, encoding), size, source)
    begin = length - size if skip == -1 else stream.tell() + skip
    if begin < stream.tell() or begin + size > length:
        raise PreprocessingError(f"{source}: cut short ({length} of {stream.tell() + size} bytes); copy it again")
    stream.seek(begin)
    return streams.exactly(stream, size, source)


def _geometry(fields: dict[str, str], source: str) -> tuple[np.ndarray, str | None, list[str]]:
    """Affine (4, 4) from [slice, row, column] to LPS+ mm, the reason to doubt it (or None), and warnings."""
    steps, doubt = np.eye(3), None
    if "spacings" in fields:
        spacings = text_header.numbers(fields["spacings"], 3, "spacings", source)
        steps = np.diag(spacings) * _units(fields, "units", 3, source)
        doubt = "its header states spacings, but no orientation (space, space directions)"
        if not min(spacings) > 0:
            doubt = "its header states no usable spacings, and no orientation (space directions)"
    else:
        doubt = "its header states neither spacings nor directions"
    origin, signs, warnings = np.zeros(3), np.ones(3), list[str]()
    if "space directions" in fields:
        directions = _vectors(fields["space directions"], 3, "space directions", source)
        steps, plain = directions.T * _units(fields, "space units", 3, source), steps
        doubt = None
        if "spacings" in fields and not np.allclose(np.linalg.norm(steps, axis=0), np.diag(plain), rtol=0.01):
            doubt = (
                f"its header contradicts itself: directions of {millimetres(steps)}, spacings of {millimetres(plain)}"
            )
        space = fields.get("space", "").lower()
        if space not in SPACES:
            doubt = "its header states no anatomical space (such as left-posterior-superior) for its directions"
        signs = np.array(SPACES.get(space, (1.0, 1.0, 1.0)))
    if "space origin" in fields:
        origin = _vectors(fields["space origin"], 1, "space origin", source)[0]
        origin = origin * _units(fields, "space units", 3, source)
    else:
        warnings.append("its header states no space origin: the origin is assumed to be 0")
    affine = np.eye(4)
    affine[:3, :3] = (signs[:, None] * steps)[:, ::-1]
    affine[:3, 3] = signs * origin
    if doubt is None and is_blank(affine):
        doubt = "its geometry is exactly the identity (1 mm, straight axes, origin 0): no geometry was ever stated"
    return affine, doubt, warnings


def _vectors(value: str, count: int, field: str, source: str) -> np.ndarray:
    """Parse ``(a,b,c) (d,e,f) ...`` into (count, 3) numbers."""
    parts = re.findall(r"\(([^()]*)\)", value)
    if len(parts) != count or re.sub(r"\([^()]*\)", "", value).strip():
        raise PreprocessingError(f"{source}: field {field!r} of its header is not {count} vectors; it is damaged")
    return np.array([text_header.numbers(part.replace(",", " "), 3, field, source) for part in parts])


def _units(fields: dict[str, str], field: str, count: int, source: str) -> float:
    """Millimetres per unit of a field; all axes share one unit."""
    units = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', fields.get(field, ""))} or {""}
    known = {text_header.MM_PER_UNIT.get(unit, 0.0) for unit in units}
    if len(known) != 1 or 0.0 in known:
        raise PreprocessingError(
            f"{source}: field {field!r} of its header names no single unit of length; save it in mm"
        )
    return known.pop()
