"""NIfTI-1 and NIfTI-2: single files and .hdr/.img pairs, compressed or not, by content rather than by name.

Layout and the meaning of its fields: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h and nifti2.h.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import streams
from ctclip.preprocessing.formats.nifti_geometry import geometry_of
from ctclip.preprocessing.formats.voxels import byte_count, native, volume_shape
from ctclip.preprocessing.geometry_check import Geometry
from ctclip.preprocessing.volume import Volume

# Field: (numpy format, offset) of the two headers, of 348 and 540 bytes.
FIELDS = {
    348: {
        "dim": ("8i2", 40), "datatype": ("i2", 70), "bitpix": ("i2", 72), "pixdim": ("8f4", 76), "vox_offset": ("f4", 108),
        "scl_slope": ("f4", 112), "scl_inter": ("f4", 116), "xyzt_units": ("u1", 123), "qform_code": ("i2", 252),
        "sform_code": ("i2", 254), "quatern": ("3f4", 256), "qoffset": ("3f4", 268), "srow": ("(3,4)f4", 280),
    },
    540: {
        "dim": ("8i8", 16), "datatype": ("i2", 12), "bitpix": ("i2", 14), "pixdim": ("8f8", 104), "vox_offset": ("i8", 168),
        "scl_slope": ("f8", 176), "scl_inter": ("f8", 184), "xyzt_units": ("i4", 500), "qform_code": ("i4", 344),
        "sform_code": ("i4", 348), "quatern": ("3f8", 352), "qoffset": ("3f8", 376), "srow": ("(3,4)f8", 400),
    },
}  # fmt: skip
# Offset of the magic, its value in a single file and in a pair; that of NIfTI-2 ends with bytes that a text-mode
# transfer corrupts.
MAGIC = {348: (344, b"n+1\0", b"ni1\0"), 540: (4, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}
TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
DAMAGED = "its header is damaged; convert it from DICOM again"


def read(path: Path, source: str, geometry: Geometry, largest: int) -> Volume:
    """Read a volume [i, j, k] as stored, with the header's slope and intercept applied if they are set.

    ``path`` is a single file, or either file of a pair. Raises PreprocessingError.
    """
    with _opened(_header_file(path, source), source) as stream:
        size, order, single, block = _header_block(stream, source)
        header = np.frombuffer(block, _layout(size, order))[0]
        shape, dtype = _voxels(header, order, source)
        offset = _offset(header, size if single else 0, source)
        if single:
            content, warnings = _content(stream, len(block), offset, byte_count(shape, dtype), largest, source)
    if not single:
        with _opened(_voxel_file(path, source), source) as stream:
            content, warnings = _content(stream, 0, offset, byte_count(shape, dtype), largest, source)
    slope, intercept = _rescaling(header, source)
    array = content.view(dtype).reshape(shape, order="F")
    if (slope, intercept) != (1.0, 0.0):
        array = array.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            array *= np.float32(slope)
            array += np.float32(intercept)
    affine, doubt, notes = geometry_of(header, geometry)
    return Volume(native(array), affine, source, [*warnings, *notes], doubt, columns_first=True)


def is_header(block: bytes) -> bool:
    """Whether the first bytes of a file are those of a NIfTI header."""
    return any(
        int.from_bytes(block[:4], order) == size and block[at : at + len(magics[0])] in magics  # type: ignore[arg-type]
        for size, (at, *magics) in MAGIC.items()
        for order in ("little", "big")
    )


def _opened(path: Path, source: str) -> Any:
    stream = streams.open_regular(path, source)
    packed = stream.read(2) == streams.GZIP
    stream.seek(0)
    return streams.inflated(stream, "gzip") if packed else stream


def _header_block(stream: Any, source: str) -> tuple[int, str, bool, bytes]:
    """Size, byte order and bytes of the header, and whether the voxels follow it in the same file."""
    try:
        block = stream.read(348)
        for name, order in (("little", "<"), ("big", ">")):
            size = int.from_bytes(block[:4], name)  # type: ignore[arg-type]
            if size not in MAGIC:
                continue
            block += stream.read(size - 348)
            place, single, pair = MAGIC[size]
            magic = block[place : place + len(single)]
            if len(block) == size and magic in (single, pair):
                return size, order, magic == single, block
            if size == 348 and not magic.strip(b"\0"):
                raise PreprocessingError(
                    f"{source}: has an Analyze 7.5 header, which states no orientation; convert the scan from DICOM again"
                )
    except streams.DAMAGE as error:
        raise PreprocessingError(f"{source}: its compressed stream is damaged or cut short; copy it again") from error
    if block[:2] == streams.GZIP:
        raise PreprocessingError(f"{source}: is compressed twice (gzip in gzip); decompress it once")
    if len(block) < 348:
        raise PreprocessingError(f"{source}: cut short ({len(block)} bytes of its header); copy it again")
    raise PreprocessingError(f"{source}: not a NIfTI file, whatever its name says")


def _layout(size: int, order: str) -> np.dtype:
    fields = FIELDS[size]
    kinds = [np.dtype(kind).newbyteorder(order) for kind, _ in fields.values()]  # type: ignore[arg-type]
    return np.dtype(
        {"names": list(fields), "formats": kinds, "offsets": [at for _, at in fields.values()], "itemsize": size}
    )


def _voxels(header: Any, order: str, source: str) -> tuple[tuple[int, int, int], np.dtype]:
    code, axes = int(header["datatype"]), int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise PreprocessingError(f"{source}: {DAMAGED}")
    shape = volume_shape(header["dim"][1 : axes + 1], source)
    if code not in TYPES:
        raise PreprocessingError(f"{source}: voxels of NIfTI type {code} are not a CT")
    dtype = np.dtype(TYPES[code]).newbyteorder(order)  # type: ignore[arg-type]
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise PreprocessingError(
            f"{source}: its header contradicts itself: {int(header['bitpix'])} bits per voxel, but a type of "
            f"{8 * dtype.itemsize}; convert it from DICOM again"
        )
    return shape, dtype


def _offset(header: Any, header_size: int, source: str) -> int:
    """The offset of the voxels, after the header and the four bytes that state whether extensions follow.

    0 in a single file means the first possible offset, as in nibabel.
    """
    value = float(header["vox_offset"])
    first = header_size + 4 if header_size else 0
    if value == 0:
        return first
    if not first <= value < 2**40 or value != int(value):
        raise PreprocessingError(
            f"{source}: its header says that the voxels begin at byte {value:g}, but they cannot begin before byte {first}; "
            f"convert it from DICOM again"
        )
    return int(value)


def _content(stream: Any, at: int, offset: int, size: int, largest: int, source: str) -> tuple[np.ndarray, list[str]]:
    """The bytes of the voxels, from ``offset`` to the end of the file; ``at`` bytes have been read already."""
    length = streams.size_of(stream)
    streams.plausible(size, length, largest, source)
    if not streams.is_packed(stream) and length < offset + size:
        raise PreprocessingError(f"{source}: cut short ({length} of {offset + size} bytes); copy it again")
    try:
        # Skip header extensions, which are small, whatever size a header claims.
        if offset - at > streams.CHUNK * 64:
            raise PreprocessingError(f"{source}: {DAMAGED}")
        stream.read(offset - at)
    except streams.DAMAGE as error:
        raise PreprocessingError(f"{source}: its compressed stream is damaged or cut short; copy it again") from error
    return streams.exactly(stream, size, source)


def _rescaling(header: Any, source: str) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 if the slope is 0 or NaN, which means that none are set."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        raise PreprocessingError(f"{source}: {DAMAGED}")
    return slope, intercept


def _header_file(path: Path, source: str) -> Path:
    return _partner(path, ".hdr", source) if _stem(path, ".img") else path


def _voxel_file(path: Path, source: str) -> Path:
    return path if _stem(path, ".img") else _partner(path, ".img", source)


def _stem(path: Path, suffix: str) -> str:
    """The name without ``suffix`` (or ``suffix`` and .gz), in any case; empty if it has another."""
    for ending in (suffix, f"{suffix}.gz"):
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return ""


def _partner(path: Path, suffix: str, source: str) -> Path:
    """The other file of a pair, in the same folder."""
    stem = _stem(path, ".hdr") or _stem(path, ".img") or path.stem
    partners = (f"{stem}{suffix}".lower(), f"{stem}{suffix}.gz".lower())
    beside = sorted(file for file in path.parent.iterdir() if file.name.lower() in partners)
    # Names may differ only in case; an exact match comes first.
    beside.sort(key=lambda file: not file.name.startswith(stem))
    if not beside:
        raise PreprocessingError(
            f"{source}: the other file of the pair, {stem}{suffix}, is missing; copy it beside this one"
        )
    return beside[0]
