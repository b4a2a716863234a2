"""The volume store: one chunked, compressed int16 file per volume, their common spec, and the cohort table.

``spec.yaml``, ``cohort.parquet``, ``volumes/<id>.b2nd``. Files are written under a temporary name and renamed, so a
volume is complete or absent. Each file contains the CRC of its voxels.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
from isal import isal_zlib

from ctclip.preprocessing import plain_json
from ctclip.preprocessing.cohorts import check_table
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.formats.streams import DAMAGE
from ctclip.preprocessing.outputs import check_folder
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.tables import read_own_parquet

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# LZ4 reads a whole volume in half the time of ZSTD, for a third to a half more disk (measured). Chunks are whole
# slices, which decompress directly into a batch.
BLOCK_BYTES, BLOCKS = 1 << 19, 4
SUFFIX = ".b2nd"
# Metadata of a volume's file: the CRC of each chunk, in addition to that of the volume.
CHUNKS = "crc32_chunks"
# A temporary file of ``written_beside``.
PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}\.partial")
ABANDONED_SECONDS = 1800
# Errors of blosc2 for a damaged file.
BLOSC_RAISES = (RuntimeError, ValueError, OSError, SyntaxError, KeyError, TypeError, OverflowError, MemoryError)


class VolumeStore:
    """An existing store, opened for reading or for adding volumes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "spec.yaml").is_file():
            raise PreprocessingError(f"{self.path}: not a volume store (no spec.yaml); `ctclip preprocess` creates one")
        self.spec = PreprocessingSpec.load(self.path / "spec.yaml", whole=True)

    @classmethod
    def create(cls, path: str | os.PathLike[str], spec: PreprocessingSpec) -> VolumeStore:
        """Open a store for ``spec``, creating it if necessary; a store with another spec is refused."""
        folder = Path(path)
        check_store_folder(folder)
        if not (folder / "spec.yaml").is_file():
            # Write the spec first, because a folder with a spec is a store. If shards start at the same time, the first
            # writes it.
            spec.save(folder / "spec.yaml", once=True)
        store = cls(folder)
        (folder / "volumes").mkdir(exist_ok=True)
        if store.spec.hash != spec.hash:
            raise PreprocessingError(
                f"{folder}: holds volumes of spec {store.spec.name!r} ({store.spec.hash}), not {spec.name!r} "
                f"({spec.hash}); give another --output"
            )
        return store

    @cached_property
    def cohort(self) -> pd.DataFrame:
        """The cohort table; see ``cohorts.COLUMNS``."""
        path = self.path / "cohort.parquet"
        if not path.is_file():
            raise PreprocessingError(f"{path}: missing; run `ctclip preprocess` on this store until it is complete")
        remedy = "run `ctclip preprocess` on this store again"
        return check_table(read_own_parquet(path, remedy), path)

    @property
    def volumes(self) -> list[str]:
        """Ids of the stored volumes."""
        return sorted(
            entry.name.removesuffix(SUFFIX) for entry in os.scandir(self.path / "volumes") if _is_volume(entry.name)
        )

    def file(self, volume: str) -> Path:
        """The path of a volume. Ids come from untrusted tables; an id that would lead out of the folder is refused."""
        if not isinstance(volume, str) or not SAFE_NAME.fullmatch(volume):
            raise PreprocessingError(f"{self.path}: volume id {volume!r} is not a file name")
        return self.path / "volumes" / f"{volume}{SUFFIX}"

    def write(self, volume: str, hu: np.ndarray, notes: dict[str, str] | None = None) -> None:
        """Store HU [slice, row, column] of the spec's shape, rounded to int16, with ``notes`` in the same file."""
        if hu.shape != self.spec.shape:
            raise PreprocessingError(f"{volume}: has shape {hu.shape}, but the store's spec has {self.spec.shape}")
        whole = np.ascontiguousarray(np.rint(hu), dtype=np.int16) if hu.dtype != np.int16 else np.ascontiguousarray(hu)
        depth, *plane = whole.shape
        block = min(depth, max(1, BLOCK_BYTES // (2 * math.prod(plane))))
        packed = blosc2.asarray(
            whole, chunks=(block * min(BLOCKS, depth // block), *plane), blocks=(block, *plane),
            cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=1, nthreads=1, filters=[blosc2.Filter.SHUFFLE]),
        )  # fmt: skip
        packed.schunk.vlmeta["crc32"] = isal_zlib.crc32(whole.data)
        step = packed.chunks[0]
        packed.schunk.vlmeta[CHUNKS] = [isal_zlib.crc32(whole[i : i + step].data) for i in range(0, depth, step)]
        if notes is not None:
            packed.schunk.vlmeta["notes"] = json.dumps(notes, sort_keys=True)
        with written_beside(self.file(volume)) as partial:
            partial.write_bytes(packed.to_cframe())

    def notes(self, volume: str) -> dict[str, str]:
        """The notes written with a volume; empty for volumes of earlier versions, or if they cannot be read."""
        try:
            packed = self._open(volume)
            # Check the names first, because older volumes have no notes and reading them would raise an error.
            notes = plain_json.loads(packed.schunk.vlmeta["notes"]) if "notes" in packed.schunk.vlmeta.getall() else {}
            return {str(key): str(value) for key, value in notes.items()}
        except (PreprocessingError, AttributeError, ReferenceError, *BLOSC_RAISES):
            return {}

    def read(self, volume: str, region: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """int16 HU [slice, row, column]. With a ``region`` (slices of step 1), only the chunks that it touches are
        decompressed, each checked against its CRC. Volumes written before 0.3 have no CRC per chunk and are read
        whole."""
        if region is None:
            whole = np.empty(self.spec.shape, np.int16)
            self.read_into(volume, whole)
            return whole
        packed = self._open(volume)
        whole_axes = isinstance(region, tuple) and len(region) == 3 and all(isinstance(part, slice) for part in region)
        bounds = [part.indices(size) for part, size in zip(region, packed.shape, strict=True)] if whole_axes else []
        if not bounds or any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{region}: a region must have three slices of step 1")
        first, end, _ = bounds[0]
        out = np.empty([max(0, high - low) for low, high, _ in bounds], np.int16)
        for begin, slab in self._slabs(volume, packed, within=(first, end)):
            low, high = max(first, begin), min(end, begin + len(slab))
            if low < high:
                out[low - first : high - first] = slab[low - begin : high - begin, region[1], region[2]]
        return out

    def read_into(self, volume: str, out: np.ndarray) -> None:
        """Decompress a whole volume into ``out``, such as part of a batch: int16 of the spec's shape, C-ordered."""
        for _ in self._slabs(volume, self._open(volume), out):
            pass

    def voxels(self, volume: str) -> np.ndarray:
        """The model's input: float32 in [-1, 1], of the spec's shape.

        The window is applied to each chunk while it is in the cache, so the whole int16 volume is never in memory.
        """
        packed = self._open(volume)
        voxels = np.empty(packed.shape, np.float32)
        for first, slab in self._slabs(volume, packed):
            self.spec.normalise(slab, voxels, (first, 0, 0))
        return voxels

    def _slabs(
        self,
        volume: str,
        packed: blosc2.NDArray,
        out: np.ndarray | None = None,
        within: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first slice of each chunk and its int16 HU, in ``out`` or in a buffer that the next chunk reuses.

        ``within``: only chunks with some of these slices, if each has a CRC. Changed voxels raise PreprocessingError
        before their chunk is yielded; in volumes of stores before 0.3, after the last chunk.
        """
        (depth, *plane), step, block = packed.shape, packed.chunks[0], packed.blocks[0]
        first_slices = range(0, depth, step)
        try:
            kept = packed.schunk.vlmeta.getall()
            written, of_chunks, crc = kept["crc32"], kept.get(CHUNKS), 0
            if [*packed.chunks[1:], *packed.blocks[1:]] != plane * 2 or step % block:
                # A volume of an earlier version.
                whole = packed[:]
                crc = isal_zlib.crc32(whole.data)
                if out is not None:
                    out[:] = whole
                yield 0, whole
            else:
                spare = np.empty((step, *plane), np.int16)
                for number, first in enumerate(first_slices):
                    count = min(step, depth - first)
                    if of_chunks is not None and within is not None and not within[0] - count < first < within[1]:
                        continue
                    slab = spare if out is None or count < step else out[first : first + step]
                    packed.schunk.decompress_chunk(number, dst=slab)
                    if of_chunks is None:
                        crc = isal_zlib.crc32(slab[:count].data, crc)
                    elif isal_zlib.crc32(slab[:count].data) != of_chunks[number]:
                        raise ValueError(number)
                    if out is not None and count < step:
                        out[first:] = slab[:count]
                    yield first, slab[:count]
                crc = written if of_chunks is not None else crc
        except (IndexError, *BLOSC_RAISES) as error:
            raise self._damaged(volume) from error
        if crc != written:
            raise self._damaged(volume)

    def write_column(self, name: str, volume: str, values: np.ndarray) -> None:
        """Store an array for a volume (such as a label map of the spec's shape) in ``columns/<name>/``."""
        with written_beside(self._column_file(name, volume)) as partial, partial.open("wb") as stream:
            np.savez(stream, values=values)

    def read_column(self, name: str, volume: str) -> np.ndarray:
        """An array written by ``write_column``, checked against its CRC. Raises PreprocessingError if there is
        none."""
        path = self._column_file(name, volume)
        try:
            with np.load(path, allow_pickle=False) as archive:
                values: np.ndarray = archive["values"]
        except DAMAGE as error:
            raise PreprocessingError(f"{path}: no array {name!r} of this volume can be read from the store") from error
        return values

    def _column_file(self, name: str, volume: str) -> Path:
        for part in (name, volume):
            if not SAFE_NAME.fullmatch(part):
                raise PreprocessingError(f"{self.path}: {part!r} is not a file name")
        return self.path / "columns" / name / f"{volume}.npz"

    def checksums(self, volume: str) -> tuple[int, ...]:
        """The CRC of a volume's voxels and of each of its chunks, as recorded in writing, without reading voxels."""
        packed = self._open(volume)
        try:
            kept = packed.schunk.vlmeta.getall()
            return (int(kept["crc32"]), *map(int, kept.get(CHUNKS, ())))
        except BLOSC_RAISES as error:
            raise self._damaged(volume) from error

    def intact(self, volume: str) -> bool:
        """Whether a volume's voxels are unchanged since they were written."""
        try:
            for _ in self._slabs(volume, self._open(volume)):
                pass
        except PreprocessingError:
            return False
        return True

    def sweep(self) -> None:
        """Remove temporary files that killed runs left, once they are half an hour old."""
        for entry in (*os.scandir(self.path), *os.scandir(self.path / "volumes")):
            with contextlib.suppress(FileNotFoundError):
                ours = PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                if ours and time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                    os.unlink(entry.path)

    def _open(self, volume: str) -> blosc2.NDArray:
        path = self.file(volume)
        if not path.is_file():
            raise PreprocessingError(f"{path}: this volume is not in the store; run `ctclip preprocess` again")
        try:
            packed = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
            whole = isinstance(packed, blosc2.NDArray) and packed.shape == self.spec.shape and _consistent(packed)
        except BLOSC_RAISES as error:
            raise self._damaged(volume) from error
        if not whole:
            raise self._damaged(volume)
        return packed

    def _damaged(self, volume: str) -> PreprocessingError:
        return PreprocessingError(f"{self.file(volume)}: damaged; `ctclip preprocess --verify` finds and rebuilds it")


def check_store_folder(path: str | os.PathLike[str]) -> None:
    """Raise PreprocessingError unless a store may be created in the folder ``path``, or volumes may be added to it."""
    check_folder(path, _is_store, "volume store")


def _is_store(folder: Path) -> bool:
    """Whether a folder is a volume store, or will be one as soon as another shard has written its spec."""
    if (folder / "spec.yaml").is_file():
        PreprocessingSpec.load(folder / "spec.yaml")
        return True
    return all(
        path.name.lstrip(".").startswith("spec.yaml.") and PARTIAL.fullmatch(path.name) for path in folder.iterdir()
    )


def _consistent(packed: blosc2.NDArray) -> bool:
    """Whether the sizes stated in the headers of a file and its chunks match its shape.

    Decompression trusts these sizes, so they are checked before.
    """
    if packed.dtype != np.int16 or not all(0 < b <= c for b, c in zip(packed.blocks, packed.chunks, strict=True)):
        return False
    block = 2 * math.prod(packed.blocks)
    chunk = block * math.prod(-(-c // b) for c, b in zip(packed.chunks, packed.blocks, strict=True))
    chunks = math.prod(-(-n // c) for n, c in zip(packed.shape, packed.chunks, strict=True))
    schunk = packed.schunk
    if (schunk.chunksize, schunk.blocksize, schunk.nchunks) != (chunk, block, chunks):
        return False
    # Chunk header: number of bytes, compressed bytes, bytes per block.
    return all(blosc2.get_cbuffer_sizes(info.lazychunk)[2] == block for info in schunk.iterchunks_info())


def _is_volume(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")
