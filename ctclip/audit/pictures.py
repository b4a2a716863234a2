"""What the audits compute from the voxels of a volume: measures, a histogram and fingerprints. Each volume is read once,
and the results are cached for all commands that share a folder."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from isal import isal_zlib

from ctclip.audit.fingerprints import fingerprint, middle
from ctclip.audit.measures import MEASURES, measure
from ctclip.drift.facts import Source
from ctclip.inference.run import run_key
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import regular, write_text, written_beside
from ctclip.preprocessing.formats.streams import DAMAGE
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.workers import worker_pool

# Increased whenever a number is computed differently, so that older caches are ignored.
VERSION = 2
# Folder of these arrays, inside the folder of embeddings that commands share.
PICTURES = "pictures"
# File in each part that lists its volumes, in the order of the arrays, with the checksums of their voxels.
VOLUMES = "volumes.json"
# Volumes per part, so that an interrupted command resumes, and volumes that a process is given at a time.
TOGETHER, AT_A_TIME = 256, 8
# Bytes of a CRC-32, and of a file that are read at a time.
SUM, BLOCK = 4, 2**22
HISTOGRAM = np.concatenate([np.arange(-1000, 400, 50), [400, 600, 1000, 3100]])


class Rows(Sequence[np.ndarray]):
    """Arrays of equal shape, one per volume, from memory-mapped files."""

    def __init__(self, places: Sequence[tuple[np.ndarray, int]]) -> None:
        """``places``: for each volume, the array of a file and the volume's row in it."""
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        array, row = self.places[index]
        return array[row]

    def whole(self) -> np.ndarray:
        """All arrays, stacked in memory."""
        return np.stack([array[row] for array, row in self.places])


@dataclass(frozen=True)
class Pictures:
    """Arrays of n volumes: ``measures`` (n, MEASURES) float64; ``histograms`` (n, bins) float64, the square roots of the
    fractions of voxels; ``prints``: fingerprints; ``middles``: fingerprints of the middle, with smaller voxels."""

    measures: Rows
    histograms: Rows
    prints: Rows
    middles: Rows


KINDS: dict[str, Callable[[np.ndarray, VolumeStore, str], np.ndarray]] = {
    "measures": lambda hu, store, name: _measured(hu, store, name),
    "histograms": lambda hu, store, name: histogram(hu),
    "prints": lambda hu, store, name: fingerprint(hu, store.spec),
    "middles": lambda hu, store, name: middle(hu, store.spec),
}


def pictures(store: VolumeStore, volumes: Sequence[str], cache: Path) -> Pictures:
    """Compute the ``Pictures`` of stored volumes, in the order of ``volumes``, with one process per core. Only volumes
    missing from ``cache`` are read; they are saved in parts of ``TOGETHER`` volumes, so that an interrupted command
    resumes."""
    folder = cache / run_key(VERSION, store.spec.hash, list(MEASURES))
    checksums = {name: str(store.checksums(name)) for name in volumes}
    places: dict[str, tuple[dict[str, np.ndarray], int]] = {}
    for part in sorted(folder.glob("*")):
        places |= _read_part(part, checksums)
    missing = [name for name in volumes if name not in places]
    rows: dict[str, dict[str, np.ndarray]] = {}
    computed = track(_computed(store.path, missing), len(missing), "reading volumes")
    for name, row in zip(missing, computed, strict=True):
        rows[name] = row
        if len(rows) == TOGETHER or name == missing[-1]:
            places |= _read_part(_write_part(folder, rows, checksums), checksums)
            rows = {}
    return Pictures(**{kind: Rows([(places[name][0][kind], places[name][1]) for name in volumes]) for kind in KINDS})


def _computed(store: Path, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each volume, in order."""
    if not names:
        return
    # Threads would share one lock for half of the time.
    with worker_pool(min(len(os.sched_getaffinity(0)), -(-len(names) // AT_A_TIME))) as pool:
        yield from pool.map(partial(_of_volume, store), names, chunksize=AT_A_TIME)


def _write_part(folder: Path, rows: Mapping[str, dict[str, np.ndarray]], checksums: Mapping[str, str]) -> Path:
    of_names = {name: checksums[name] for name in rows}
    part = folder / run_key(of_names)
    part.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        keep_array(part / f"{kind}.npy", np.stack([row[kind] for row in rows.values()]))
    # Written last: a part without this file is incomplete.
    write_text(part / VOLUMES, json.dumps(of_names))
    return part


def _read_part(part: Path, checksums: Mapping[str, str]) -> dict[str, tuple[dict[str, np.ndarray], int]]:
    """Read a part: for each of its volumes that is wanted and whose voxels have not changed, the arrays and the row."""
    try:
        of_names = dict(plain_json.read(regular(part / VOLUMES)))
    except UNFIT:
        return {}
    arrays = {kind: kept_array(part / f"{kind}.npy", mapped=True) for kind in KINDS}
    whole = {kind: array for kind, array in arrays.items() if array is not None and array.shape[:1] == (len(of_names),)}
    if len(whole) < len(KINDS):
        return {}
    return {name: (whole, row) for row, (name, sum_) in enumerate(of_names.items()) if checksums.get(name) == sum_}


def histogram(hu: np.ndarray) -> np.ndarray:
    """Square roots (bins,) of the fractions of voxels in each bin of ``HISTOGRAM``, from every second voxel along each
    axis."""
    counts = np.histogram(np.clip(hu[::2, ::2, ::2], HISTOGRAM[0], HISTOGRAM[-1] - 1), HISTOGRAM)[0]
    return np.asarray(np.sqrt(counts / counts.sum()))


def keep_array(path: Path, array: np.ndarray) -> None:
    """Write an array that ``kept_array`` can read: a .npy file, followed by its CRC-32."""
    saved = io.BytesIO()
    np.save(saved, array)
    with written_beside(path) as partial, partial.open("wb") as stream:
        stream.write(saved.getbuffer())
        stream.write(isal_zlib.crc32(saved.getbuffer()).to_bytes(SUM, "little"))


def kept_array(path: Path, *, mapped: bool = False) -> np.ndarray | None:
    """Read a cached array, as a memory map if ``mapped``; None if it is missing or damaged and must be computed
    again."""
    try:
        size = regular(path).stat().st_size - SUM
        with path.open("rb") as stream:
            stream.seek(max(size, 0))
            kept = int.from_bytes(stream.read(SUM), "little")
        if size < 0 or _crc32(path, size) != kept:
            return None
        array: np.ndarray = np.load(path, mmap_mode="r" if mapped else None)
    except DAMAGE:
        return None
    return array


def _crc32(path: Path, size: int) -> int:
    """The CRC-32 of the first ``size`` bytes of a file."""
    left, sum_ = size, 0
    with path.open("rb") as stream:
        while left and (block := stream.read(min(BLOCK, left))):
            sum_, left = isal_zlib.crc32(block, sum_), left - len(block)
    return sum_


def _of_volume(path: Path, name: str) -> dict[str, np.ndarray]:
    store = _opened(path)
    hu = store.read(name)
    return {kind: take(hu, store, name) for kind, take in KINDS.items()}


@lru_cache(maxsize=1)
def _opened(path: Path) -> VolumeStore:
    return VolumeStore(path)


def _measured(hu: np.ndarray, store: VolumeStore, name: str) -> np.ndarray:
    upright = hu.transpose(0, 2, 1) if store.spec.published_geometry else hu
    return measure(upright, store.spec, Source.of_notes(store.notes(name)))
