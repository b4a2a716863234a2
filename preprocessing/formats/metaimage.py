"""MetaImage, attached (.mha) and detached (.mhd), raw or zlib: https://itk.org/Wiki/ITK/MetaIO/Documentation."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import streams, text_header
from ctclip.preprocessing.formats.voxels import byte_count, detached, native, volume_shape
from ctclip.preprocessing.geometry_check import is_blank
from ctclip.preprocessing.volume import Volume

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
# Names of the same field, the current one first.
ALIASES = {
    "Offset": ("Offset", "Position", "Origin"),
    "TransformMatrix": ("TransformMatrix", "Orientation", "Rotation"),
    "BinaryDataByteOrderMSB": ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
    "ElementSpacing": ("ElementSpacing", "ElementSize"),
}
SYNONYMS = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
SYNONYMS["ElementSize"] = "ElementSize"
# All other fields are ignored; programs may add any field.
FIELDS = {
    "ObjectType", "NDims", "DimSize", "BinaryData", "CompressedData", "HeaderSize", "ElementNumberOfChannels",
    "ElementType", "ElementDataFile", "DistanceUnits", "AnatomicalOrientation", *SYNONYMS,
}  # fmt: skip
BOOLEAN = {"true": True, "false": False, "1": True, "0": False, "t": True, "f": False}


def read(path: Path, source: str, largest: int) -> Volume:
    """A volume [slice, row, column]: the file's axes from the slowest to the fastest. Raises PreprocessingError."""
    with streams.open_regular(path, source) as stream:
        fields = _fields(stream, source)
        _drop_axis_of_one(fields, source)
        shape, dtype, packed = _layout(fields, source)
        affine, doubt, warnings = _geometry(fields, source)
        skip = text_header.integers(fields.get("HeaderSize", "0"), 1, "HeaderSize", source)[0]
        size, name = byte_count(shape, dtype), fields["ElementDataFile"]
        local = name.upper() == "LOCAL"
        if local:
            content, notes = _content(stream, size, packed, 0, largest, source)
    if not local:
        if name.upper().split()[0] == "LIST":
            raise PreprocessingError(f"{source}: its voxels lie in several files; save it as one .mha")
        with streams.open_regular(detached(path, name, source), source) as stream:
            content, notes = _content(stream, size, packed, skip, largest, source)
    array = content.view(dtype).reshape(shape[::-1])
    return Volume(native(array), affine, source, [*warnings, *notes], doubt)


def is_header(block: bytes) -> bool:
    """Whether the first bytes of a file are those of a MetaImage header."""
    return block.lstrip().startswith((b"ObjectType", b"NDims"))


def _fields(stream: BinaryIO, source: str) -> dict[str, str]:
    """The known fields, up to ElementDataFile, which ends the header."""
    fields: dict[str, str] = {}
    for line in text_header.lines(stream, source):
        name, equals, value = line.partition("=")
        name = SYNONYMS.get(name.strip(), name.strip())
        if not equals and line.strip():
            break
        if name not in FIELDS:
            continue
        value = text_header.bounded(value, name, source)
        if not value:
            raise PreprocessingError(f"{source}: field {name!r} of its header is empty; it is damaged")
        if fields.setdefault(name, value) != value:
            raise PreprocessingError(
                f"{source}: field {name!r} appears twice in its header with different values; it is damaged"
            )
        if name == "ElementDataFile":
            return fields
    raise PreprocessingError(
        f"{source}: not a MetaImage file, or its header was cut short (ElementDataFile is missing)"
    )


def _drop_axis_of_one(fields: dict[str, str], source: str) -> None:
    """Remove a fourth axis of size 1 from the fields that describe axes."""
    if fields.get("NDims") != "4" or text_header.integers(fields.get("DimSize", ""), 4, "DimSize", source)[3] != 1:
        return
    fields["NDims"] = "3"
    for name, count in (
        ("DimSize", 4),
        ("ElementSpacing", 4),
        ("ElementSize", 4),
        ("Offset", 4),
        ("TransformMatrix", 16),
    ):
        values = fields.get(name, "").split()
        if name in fields and len(values) != count:
            raise PreprocessingError(f"{source}: field {name!r} of its header is not of 4 axes; it is damaged")
        if name in fields:
            fields[name] = " ".join(value for place, value in enumerate(values) if place % 4 < 3 and place < 12)


def _layout(fields: dict[str, str], source: str) -> tuple[tuple[int, int, int], np.dtype, bool]:
    """Sizes (fastest axis first), type, and whether the voxels are compressed."""
    for name in ("NDims", "DimSize", "ElementType"):
        if name not in fields:
            raise PreprocessingError(f"{source}: field {name!r} of its header is missing; it is damaged")
    if fields.get("ObjectType", "Image") != "Image":
        raise PreprocessingError(f"{source}: does not hold an image")
    axes = text_header.integers(fields["NDims"], 1, "NDims", source)[0]
    if axes != 3:
        raise PreprocessingError(f"{source}: has {axes} dimensions, not the three of a volume; save one volume alone")
    sizes = volume_shape(text_header.integers(fields["DimSize"], 3, "DimSize", source), source)
    channels = text_header.integers(fields.get("ElementNumberOfChannels", "1"), 1, "ElementNumberOfChannels", source)[0]
    if channels != 1:
        raise PreprocessingError(f"{source}: has {channels} values per voxel: not a CT")
    if fields["ElementType"] not in TYPES:
        raise PreprocessingError(f"{source}: its voxels have a type that no CT has")
    if not _is(fields, "BinaryData", True, source):
        raise PreprocessingError(f"{source}: its voxels are written as text; save it as binary")
    order: Literal["<", ">"] = ">" if _is(fields, "BinaryDataByteOrderMSB", False, source) else "<"
    return (
        sizes,
        np.dtype(TYPES[fields["ElementType"]]).newbyteorder(order),
        _is(fields, "CompressedData", False, source),
    )


def _is(fields: dict[str, str], name: str, default: bool, source: str) -> bool:
    return text_header.choice(fields[name], BOOLEAN, name, source) if name in fields else default


def _content(
    stream: BinaryIO, size: int, packed: bool, skip: int, largest: int, source: str
) -> tuple[np.ndarray, list[str]]:
    length = streams.size_of(stream)
    streams.plausible(size, length, largest, source)
    if packed:
        begin = stream.tell()
        # MetaIO reads zlib and gzip streams, and older versions wrote the other.
        kind = "gzip" if stream.read(2) == streams.GZIP else "zlib"
        stream.seek(begin)
        return streams.exactly(streams.inflated(stream, kind), size, source)
    begin = length - size if skip == -1 else stream.tell() + skip
    if skip < -1 or begin < 0 or begin + size > length:
        raise PreprocessingError(f"{source}: cut short ({length} of {max(begin, 0) + size} bytes); copy it again")
    stream.seek(begin)
    return streams.exactly(stream, size, source)


def _geometry(fields: dict[str, str], source: str) -> tuple[np.ndarray, str | None, list[str]]:
    """Affine (4, 4) from [slice, row, column] to LPS+ mm, the reason to doubt it (or None), and warnings."""
    doubt, warnings = None, []
    spacing, turn, origin = np.ones(3), np.eye(3), np.zeros(3)
    field = "ElementSpacing" if "ElementSpacing" in fields else "ElementSize"
    if field in fields:
        spacing = np.array(text_header.numbers(fields[field], 3, field, source))
        if field == "ElementSize":
            warnings.append("its header has no ElementSpacing: ElementSize is used instead")
        if not (spacing > 0).all():
            doubt = f"{field} of its header is not positive"
    else:
        doubt = "its header states no spacing (ElementSpacing)"
    if "TransformMatrix" in fields:
        # Three numbers per axis of the file: the direction in which its index increases.
        turn = np.array(text_header.numbers(fields["TransformMatrix"], 9, "TransformMatrix", source)).reshape(3, 3).T
        if not np.allclose(np.linalg.norm(turn, axis=0), 1, atol=0.01):
            doubt = doubt or "TransformMatrix of its header holds no directions (their length is not 1)"
    elif fields.get("AnatomicalOrientation", "RAI") not in ("RAI", "???"):
        doubt = doubt or "its header states an AnatomicalOrientation, but no TransformMatrix"
    elif doubt is None:
        warnings.append(
            "its header states no TransformMatrix: columns are assumed to run to the left and rows to the back"
        )
    if "Offset" in fields:
        origin = np.array(text_header.numbers(fields["Offset"], 3, "Offset", source))
    else:
        warnings.append("its header states no Offset: the origin is assumed to be 0")
    unit = text_header.MM_PER_UNIT.get(fields.get("DistanceUnits", "mm").lower())
    if unit is None:
        doubt = doubt or "DistanceUnits of its header names an unknown unit"
    affine = np.eye(4)
    affine[:3, :3] = (turn * spacing)[:, ::-1] * (unit or 1.0)
    affine[:3, 3] = origin * (unit or 1.0)
    if doubt is None and is_blank(affine):
        doubt = "its geometry is exactly the identity (1 mm, straight axes, origin 0): no geometry was ever stated"
    return affine, doubt, warnings
