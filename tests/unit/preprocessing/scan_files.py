"""Small volume files built byte by byte, valid and invalid, and the truth that they contain."""

from __future__ import annotations

import bz2
import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

# [slice, row, column] in which no two voxels are alike, and an affine to LPS+ mm in which no two axes are exchangeable.
HU = (np.arange(7 * 6 * 5, dtype=np.int16).reshape(7, 6, 5) * 9 - 1000).astype(np.int16)
SINE, COSINE = np.sin(0.2), np.cos(0.2)
AFFINE = np.eye(4)
AFFINE[:3, :3] = np.array([[COSINE, 0, SINE], [0, 1, 0], [-SINE, 0, COSINE]])[:, ::-1] * [2.5, 0.9, 0.8]
AFFINE[:3, 3] = -31, 7, 55
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Offsets of NIfTI-1 (nifti1.h): the fields that rows patch.
AT = {
    "dim": 40, "datatype": 70, "bitpix": 72, "qfac": 76, "pixdim": 80, "vox_offset": 108, "slope": 112, "inter": 116,
    "units": 123, "qform_code": 252, "sform_code": 254, "quatern": 256, "qoffset": 268, "srow": 280, "magic": 344,
}  # fmt: skip


def nifti(
    hu: np.ndarray = HU, affine: np.ndarray = AFFINE, *, codes: tuple[int, int] = (1, 1), kind: type = nib.Nifti1Image,
    order: str = "<",
) -> bytes:  # fmt: skip
    """A NIfTI file's bytes, by nibabel; ``codes`` of sform and qform."""
    header = nib.Nifti1Header(endianness=order) if kind is nib.Nifti1Image else nib.Nifti2Header(endianness=order)
    header.set_data_dtype(hu.dtype)
    image = kind(hu.transpose(2, 1, 0), None, header)
    along = RAS @ affine[:, [2, 1, 0, 3]]
    image.header.set_qform(along, codes[1])
    image.header.set_sform(along, codes[0])
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def patched(content: bytes, **fields: tuple) -> bytes:  # type: ignore[type-arg]
    """NIfTI-1 bytes with fields replaced: ``name=(format, value, ...)``."""
    changed = bytearray(content)
    for name, (layout, *values) in fields.items():
        struct.pack_into("<" + layout, changed, AT[name], *values)
    return bytes(changed)


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def vector(values: np.ndarray) -> str:
    return ",".join(f"{value:.9g}" for value in values)


def nrrd_header(**changes: str | None) -> str:
    """An NRRD header; ``space_directions=None`` omits this field, other values replace or add it."""
    columns = AFFINE[:3, 2::-1].T
    fields: dict[str, str | None] = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "5 6 7",
        "space directions": " ".join(f"({vector(column)})" for column in columns), "kinds": "domain domain domain",
        "endian": "little", "encoding": "raw", "space origin": f"({vector(AFFINE[:3, 3])})",
        **{name.replace("_", " "): value for name, value in changes.items()},
    }  # fmt: skip
    return "NRRD0004\n# comment\n" + "".join(f"{k}: {v}\n" for k, v in fields.items() if v is not None)


def nrrd(content: bytes | None = None, **changes: str | None) -> bytes:
    raw = HU.tobytes()
    packed = {"gzip": gzip.compress, "bzip2": bz2.compress}.get(str(changes.get("encoding")), bytes)(raw)
    return (nrrd_header(**changes) + "\n").encode() + (packed if content is None else content)


def meta_header(**changes: str | None) -> str:
    fields: dict[str, str | None] = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(f"{v:.9g}" for v in (AFFINE[:3, 2::-1] / [0.8, 0.9, 2.5]).T.ravel()),
        "Offset": " ".join(f"{v:.9g}" for v in AFFINE[:3, 3]), "ElementSpacing": "0.8 0.9 2.5", "DimSize": "5 6 7",
        "ElementType": "MET_SHORT", **{k: v for k, v in changes.items() if k != "ElementDataFile"},
        "ElementDataFile": changes.get("ElementDataFile", "LOCAL"),
    }  # fmt: skip
    return "".join(f"{k} = {v}\n" for k, v in fields.items() if v is not None)


def meta(content: bytes | None = None, **changes: str | None) -> bytes:
    packed = zlib.compress(HU.tobytes()) if changes.get("CompressedData") == "True" else HU.tobytes()
    return meta_header(**changes).encode() + (packed if content is None else content)


def flipped(content: bytes, at: int, bit: int = 1) -> bytes:
    changed = bytearray(content)
    changed[at] ^= bit
    return bytes(changed)


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return memory.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return memory.getvalue()
