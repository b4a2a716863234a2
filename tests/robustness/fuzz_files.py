"""Valid files of every supported kind, built in memory, and ways to damage them."""

from __future__ import annotations

import bz2
import gzip
import io
import re
import struct
import tempfile
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom

from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from tests.unit.preprocessing import dicom_builder
from tests.unit.preprocessing.scan_files import meta, meta_header, nifti, nrrd, nrrd_header, tarred, zipped

SPEC = PreprocessingSpec("fuzz", (5.0, 4.0, 4.0), (12, 16, 20))
# Axis-aligned: an oblique volume would be resampled, and its voxels could not be compared.
AFFINE = np.array([[0, 0, 4.0, -80], [0, 4.0, 0, -70], [5.0, 0, 0, 30], [0, 0, 0, 1]])
NUMBERS = (b"-1", b"0", b"1", b"2", b"66", b"65536", b"4294967296", b"1e999", b"nan", b"", b"%s%n", b"A" * 2000, b"3.5")
INTEGERS = (0, 1, 2, -1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 1 << 16, 1 << 31)
FLOATS = (0.0, -1.0, 1.0, float("nan"), float("inf"), 1e30, 1e-30, 352.0)


@dataclass
class Good:
    """A scan as files. ``named``: the file given to the reader; ``spoiled``: the file to damage; ``header``: the number
    of its bytes before the voxels; ``kind``: the format."""

    files: dict[str, bytes]
    named: str
    spoiled: str
    header: int
    kind: str = "scan"
    text: bool = False
    weight: int = field(default=1)

    @property
    def content(self) -> bytes:
        return self.files[self.spoiled]


@cache
def truth() -> np.ndarray:
    """HU [slice, row, column], int16."""
    return make_scan(1, 1, scale=12.0).reconstructions[0].hu


@cache
def good() -> dict[str, Good]:
    hu = truth()
    size = " ".join(map(str, hu.shape[::-1]))
    geometry = {
        "sizes": size, "space_directions": "(4,0,0) (0,4,0) (0,0,5)", "space_origin": "(-80,-70,30)",
    }  # fmt: skip
    fields = {
        "DimSize": size, "ElementSpacing": "4 4 5", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "-80 -70 30",
    }  # fmt: skip
    raw, plain = hu.tobytes(), nifti(hu, AFFINE)
    packed = zlib.compress(raw)
    nifti2 = nifti(hu, AFFINE, kind=nib.Nifti2Image)
    npz = io.BytesIO()
    np.savez_compressed(npz, ct=hu)
    slices = _slices(hu)
    csv = b"path,volume,split,rescale_slope,Lung nodule\nscan.nii,a,train,1,0\nother.nii,b,valid,1,1\n"
    return {
        "nifti": _one("scan.nii", plain, 352),
        "nifti sform only": _one("scan.nii", nifti(hu, AFFINE, codes=(1, 0)), 352),
        "nifti2": _one("scan.nii", nifti2, 544),
        "nifti gzip": _one("scan.nii.gz", gzip.compress(plain), 400),
        "nifti pair": Good({"scan.hdr": plain[:108] + bytes(4) + plain[112:344] + b"ni1\0", "scan.img": plain[352:]}, "scan.hdr", "scan.hdr", 348),
        "nrrd": _one("scan.nrrd", nrrd(raw, **geometry), len(nrrd_header(**geometry)), text=True),
        "nrrd gzip": _one("scan.nrrd", nrrd(gzip.compress(raw), encoding="gzip", **geometry), 500, text=True),
        "nrrd bzip2": _one("scan.nrrd", nrrd(bz2.compress(raw), encoding="bzip2", **geometry), 500, text=True),
        "nhdr": Good({"scan.nhdr": nrrd(b"", data_file="scan.raw", **geometry), "scan.raw": raw}, "scan.nhdr", "scan.nhdr", 600, text=True),
        "mha": _one("scan.mha", meta(raw, **fields), len(meta_header(**fields)), text=True),
        "mha zlib": _one("scan.mha", meta(packed, CompressedData="True", CompressedDataSize=str(len(packed)), **fields), 500, text=True),
        "mhd": Good({"scan.mhd": meta(b"", ElementDataFile="scan.raw", **fields), "scan.raw": raw}, "scan.mhd", "scan.mhd", 600, text=True),
        "mhd zlib": Good({"scan.mhd": meta(b"", ElementDataFile="scan.zraw", CompressedData="True", **fields), "scan.zraw": packed}, "scan.mhd", "scan.zraw", len(packed)),
        "npz": _one("scan.npz", npz.getvalue(), 200),
        "dicom": _one_of("series/0004.dcm", slices, 850),
        "dicom rle": _one_of("series/0004.dcm", _slices(hu, "RLE"), 1000),
        "dicom deflated": _one_of("series/0004.dcm", _slices(hu, "deflated"), 900),
        "dicom multi-frame": Good({"series/frames.dcm": _frames(hu)}, "series", "series/frames.dcm", 10130),
        "zip of dicom": _one("scan.zip", zipped(slices), 400),
        "zip of nifti": _one("scan.zip", zipped({"scan.nii": plain}), 200),
        "tar.gz": _one("scan.tar.gz", tarred({"scan.nii": plain}), 200),
        "tar": _one("scan.tar", tarred({"scan.nii": plain}, "w"), 1000),
        "csv": Good({"table.csv": csv, "scan.nii": plain, "other.nii": plain}, "table.csv", "table.csv", len(csv), "csv", True),
        "parquet": Good({"table.parquet": _parquet(csv), "scan.nii": plain, "other.nii": plain}, "table.parquet", "table.parquet", 4000, "csv"),
        "store": Good({"store/volumes/a.b2nd": _stored(), "store/spec.yaml": _spec()}, "store", "store/volumes/a.b2nd", 300, "store"),
        "spec of a store": Good({"store/volumes/a.b2nd": _stored(), "store/spec.yaml": _spec()}, "store", "store/spec.yaml", len(_spec()), "store", True),
    }  # fmt: skip


def _one(name: str, content: bytes, header: int, *, text: bool = False) -> Good:
    return Good({name: content}, name, name, min(header, len(content)), text=text)


def _one_of(spoiled: str, slices: dict[str, bytes], header: int) -> Good:
    """A DICOM series with one damaged file."""
    return Good({f"series/{name}": content for name, content in slices.items()}, "series", spoiled, header)


def _slices(hu: np.ndarray, packing: str = "") -> dict[str, bytes]:
    slices = {}
    for index, data in enumerate(dicom_builder.series(hu, PatientName="Doe^Jane", SeriesDescription="chest")):
        data.BitsStored, data.HighBit = 16, 15
        if packing == "RLE":
            data.compress(pydicom.uid.RLELossless)
        elif packing == "deflated":
            data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        slices[f"{index * 7 % len(hu):04d}.dcm"] = _dicom(data, index)
    return slices


def _frames(hu: np.ndarray) -> bytes:
    return _dicom(dicom_builder.enhanced(hu), 0)


def _dicom(data: pydicom.Dataset, number: int) -> bytes:
    """The same voxels in every run. All bits are used, because decoders treat unused bits differently."""
    data.BitsStored, data.HighBit = 16, 15
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{dicom_builder.SERIES}.{number}"
    memory = io.BytesIO()
    data.save_as(memory, enforce_file_format=True)
    return memory.getvalue()


def _parquet(csv: bytes) -> bytes:
    memory = io.BytesIO()
    pd.read_csv(io.BytesIO(csv)).to_parquet(memory, index=False)
    return memory.getvalue()


@cache
def stored_hu() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, SPEC.shape).astype(np.int16)


def _stored() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        store = VolumeStore.create(Path(folder, "s"), SPEC)
        store.write("a", stored_hu())
        return store.file("a").read_bytes()


def _spec() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return (VolumeStore.create(Path(folder, "s"), SPEC).path / "spec.yaml").read_bytes()


def spoil(scan: Good, random: np.random.Generator) -> tuple[bytes, str]:
    """The damaged bytes, with a description of the change. Most changes are in the header."""
    content = bytearray(scan.content)
    ways = [
        _flip,
        _flip,
        _byte,
        _cut,
        _insert,
        _remove,
        _repeat,
        *([_word] * 4 + [_line] if scan.text else [_integer, _float] * 2),
    ]
    done = []
    for _ in range(1 if random.random() < 0.8 else 3):
        way = ways[int(random.integers(len(ways)))]
        reach = min(scan.header if random.random() < 0.85 else len(content), len(content))
        if reach:
            done.append(way(content, int(random.integers(reach)), random))
    return bytes(content), "; ".join(done)


def _flip(content: bytearray, at: int, random: np.random.Generator) -> str:
    bit = int(random.integers(8))
    content[at] ^= 1 << bit
    return f"flip bit {bit} of byte {at}"


def _byte(content: bytearray, at: int, random: np.random.Generator) -> str:
    content[at] = int(random.integers(256))
    return f"set byte {at}"


def _cut(content: bytearray, at: int, random: np.random.Generator) -> str:
    at = at if random.random() < 0.5 else int(random.integers(len(content)))
    del content[at:]
    return f"cut at {at}"


def _insert(content: bytearray, at: int, random: np.random.Generator) -> str:
    count = int(random.integers(1, 9))
    content[at:at] = random.bytes(count)
    return f"insert {count} bytes at {at}"


def _remove(content: bytearray, at: int, random: np.random.Generator) -> str:
    count = int(random.integers(1, 9))
    del content[at : at + count]
    return f"remove {count} bytes at {at}"


def _repeat(content: bytearray, at: int, random: np.random.Generator) -> str:
    count = int(random.integers(1, 200))
    content[at:at] = content[at : at + count]
    return f"repeat {count} bytes at {at}"


def _integer(content: bytearray, at: int, random: np.random.Generator) -> str:
    value, size = int(random.choice(INTEGERS)), int(random.choice([2, 4]))
    content[at : at + size] = (value & (256**size - 1)).to_bytes(size, "little")
    return f"{size}-byte integer {value} at {at}"


def _float(content: bytearray, at: int, random: np.random.Generator) -> str:
    value, at = float(random.choice(FLOATS)), at // 4 * 4
    content[at : at + 4] = struct.pack("<f", value)
    return f"float {value} at {at}"


def _word(content: bytearray, at: int, random: np.random.Generator) -> str:
    words = list(re.finditer(rb"[-\w.]+", bytes(content[: at + 200])))
    near = min(words, key=lambda word: abs(word.start() - at), default=None)
    if near is None:
        return "no word"
    value = NUMBERS[int(random.integers(len(NUMBERS)))]
    content[near.start() : near.end()] = value
    return f"word {bytes(near.group()[:20])!r} becomes {value[:10]!r}"


def _line(content: bytearray, at: int, random: np.random.Generator) -> str:
    end = content.find(b"\n", at)
    begin = content.rfind(b"\n", 0, at) + 1
    if end < 0 or end - begin > 2000:
        return "no line"
    line = bytes(content[begin : end + 1])
    if random.random() < 0.5:
        del content[begin : end + 1]
        return f"remove line {line[:30]!r}"
    content[begin:begin] = line
    return f"repeat line {line[:30]!r}"
