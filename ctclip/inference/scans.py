"""Volumes for inference, from a store or from files. Ids are known at once, voxels are read one volume at a time."""

from __future__ import annotations

import glob
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar, Unpack

import numpy as np
import pandas as pd

from ctclip.data.dataset import stored_volumes
from ctclip.drift.facts import Source
from ctclip.errors import DataError
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.cohorts.folder import scan_ids
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.hounsfield import ALREADY_HU
from ctclip.preprocessing.linkage import write_linkage
from ctclip.preprocessing.outcomes import OUTCOME_COLUMNS, Outcome
from ctclip.preprocessing.pipeline import Reading, prepare
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore

T = TypeVar("T")
R = TypeVar("R")


class Scans(Protocol):
    """``table``: one row per volume with volume, patient, scan (and findings and impression, if reports are known)."""

    table: pd.DataFrame

    def origin(self) -> str:
        """A text that identifies the scans; it differs for different scans with the same names."""

    def voxels(self, index: int) -> tuple[np.ndarray, str]:
        """The model's input [slice, row, column] for one row, and warnings. Raises PreprocessingError."""

    def source(self, index: int) -> Source | None:
        """Spacing and shape of the scan in one row before resampling, if known; for a file, after it has been read."""


class StoredScans:
    """Volumes of a store. A store with another spec than the model's is refused."""

    def __init__(self, store: VolumeStore, split: str | None, spec: PreprocessingSpec, model: Path) -> None:
        if store.spec.hash != spec.hash:
            raise DataError(
                f"{store.path}: prepared with spec {store.spec.name!r} ({store.spec.hash}), but the model {model} needs "
                f"{spec.name!r} ({spec.hash}); run `ctclip preprocess --spec {model}/preprocessing.yaml`"
            )
        self.store, self.spec = store, spec
        self.table = stored_volumes(store, split)

    def origin(self) -> str:
        return f"{self.store.path.resolve()} {self.spec.hash}"

    def voxels(self, index: int) -> tuple[np.ndarray, str]:
        volume = str(self.table["volume"].iloc[index])
        return self.store.voxels(volume), "; ".join(self._warnings(volume))

    def source(self, index: int) -> Source | None:
        return Source.of_notes(self.store.notes(str(self.table["volume"].iloc[index])))

    def _warnings(self, volume: str) -> tuple[str, ...]:
        """Warnings recorded when the scan was stored (since version 0.3)."""
        notes = self.store.notes(volume)
        warnings = Outcome.of_row({**dict.fromkeys(OUTCOME_COLUMNS, ""), **notes, "outcome": "done"}).warnings
        # The note that HU were already applied is no reason to doubt the scan.
        return tuple(warning for warning in warnings if warning != ALREADY_HU)


class ScanFiles:
    """Files, DICOM folders, folders of files, or patterns such as ``'scans/*.nii.gz'``."""

    def __init__(self, paths: Sequence[Path], spec: PreprocessingSpec, **reading: Unpack[Reading]) -> None:
        self.paths = _expanded(paths)
        self.spec, self.reading = spec, reading
        self.sources: dict[int, Source] = {}
        names = scan_ids(self.paths)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"two scans would both be called {str(twice).removeprefix('/')!r}: give each once, or rename one"
            )
        self.table = pd.DataFrame({"volume": names, "patient": names, "scan": names})

    def link(self, path: Path) -> None:
        """Write the private table with the path and study of each volume; see ``write_linkage``."""
        files, series = dict(zip(self.table["volume"], self.paths, strict=True)), self.reading.get("series")
        write_linkage(path, files, dict.fromkeys(files, series) if series else None)

    def origin(self) -> str:
        facts = [(path.resolve(), path.stat()) for path in self.paths if path.exists()]
        states = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in facts]
        return "\n".join([json.dumps(self.reading, sort_keys=True), *states])

    def voxels(self, index: int) -> tuple[np.ndarray, str]:
        ready = prepare(self.paths[index], self.spec, **self.reading)
        self.sources[index] = Source(ready.source_spacing, ready.source_shape)
        return ready.voxels, "; ".join(ready.warnings)

    def source(self, index: int) -> Source | None:
        return self.sources.get(index)


def prefetch(function: Callable[[T], R], items: Iterable[T], workers: int = 2) -> Iterator[Callable[[], R]]:
    """Results of ``function`` in order, a few of them computed ahead; calling a result raises the exception of the
    function."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Callable[[], R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item).result)
            if len(waiting) > workers:
                yield waiting.popleft()
        yield from waiting


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """Expand patterns to their matches, and folders to the volume files and DICOM series folders below them."""
    files: list[Path] = []
    for path in paths:
        if not path.exists() and glob.has_magic(str(path)):
            # An existing folder is not a pattern, even with brackets in its name.
            folder = next(parent for parent in path.parents if parent.exists())
            pattern = str(path.relative_to(folder))
            matched = sorted(folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))
            if not matched:
                raise DataError(f"{path}: no file matches this pattern")
        else:
            matched = [path]
        for place in matched:
            files += _inside(place) if place.is_dir() else [place]
    if not files:
        raise DataError("no scans given")
    return files


def _inside(folder: Path) -> list[Path]:
    """Volumes below a folder; the folder itself if none is recognised, so that reading it raises an error with the
    reason."""
    try:
        return list(read_cohort(folder, "folder").files.values())
    except PreprocessingError:
        return [folder]
