"""Properties measured in the image that reports do not mention: noise, kernel, table, position, contrast."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ctclip.drift.facts import EVEN, Source
from ctclip.inference.run import run_key
from ctclip.preprocessing.files import regular, written_beside
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore

# Name, and whether the measure depends on the technique alone; the others also depend on the patient.
MEASURES = {
    "table: density below the body": True,
    "table: density below the body, middle": True,
    "table: curvature (middle less sides)": True,
    "noise in the air": True,
    "sharpness of noise (kernel)": True,
    "slice spacing": True,
    "pixel spacing": True,
    "extent along the slices": True,
    "noise in soft tissue": False,
    "noise across slices": False,
    "body width": False,
    "body depth": False,
    "body off centre, right to left": False,
    "metal": False,
    "contrast or calcium": False,
    "lung volume": False,
    "lung density": False,
    "air around the body": False,
}
FINE_MM = 3.0
# Height in mm of the measured region below the body.
BELOW_MM = 45.0
CHUNK = 256


def measure(hu: np.ndarray, spec: PreprocessingSpec, source: Source | None) -> np.ndarray:
    """The measures (MEASURES,) of one volume, HU [slice, row, column] LPS+ with the spec's spacing; NaN if a measure is
    undefined."""
    steps = [max(1, round(FINE_MM / step)) for step in spec.spacing]
    dz, dy, dx = (step * mm for step, mm in zip(steps, spec.spacing, strict=True))
    fine = hu[tuple(slice(None, None, step) for step in steps)].astype(np.float32)
    padded = (fine == fine.min(axis=(1, 2), keepdims=True)).all(axis=(1, 2))
    body = _body(fine)
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    rows = np.flatnonzero(body.any(axis=(0, 2)))
    inside = _inside(body)
    lung = (fine > -950) & (fine < -600) & inside
    even = (fine > EVEN[0]) & (fine < EVEN[1])
    along, lag = _texture(fine, even, 2)
    across, _ = _texture(fine, even, 0)
    table = _below(fine, body, BELOW_MM / dy)
    millilitres = dz * dy * dx / 1000
    facts = source.facts if source is not None else np.full(6, np.nan)
    # Only outside the body: the air of emphysema does not depend on the technique.
    air = fine[(fine < -940) & (fine > -1020) & ~inside]
    values = {
        "table: density below the body": table.mean(),
        "table: density below the body, middle": table[1],
        "table: curvature (middle less sides)": table[1] - (table[0] + table[2]) / 2,
        "noise in the air": air.std() if len(air) > 100 else np.nan,
        "sharpness of noise (kernel)": lag,
        "slice spacing": facts[0],
        "pixel spacing": facts[1],
        "extent along the slices": facts[3],
        "noise in soft tissue": along,
        "noise across slices": across,
        "body width": len(columns) * dx,
        "body depth": len(rows) * dy,
        "body off centre, right to left": (columns.mean() - (fine.shape[2] - 1) / 2) * dx if len(columns) else np.nan,
        "metal": np.log1p((fine > 1800).sum() * millilitres),
        "contrast or calcium": ((fine > 130) & (fine < 350)).sum() / max(1, body.sum()),
        "lung volume": lung.sum() * millilitres,
        "lung density": fine[lung].mean() if lung.any() else np.nan,
        "air around the body": (fine[~padded] < -900).mean() if not padded.all() else np.nan,
    }
    return np.array([values[name] for name in MEASURES], dtype=float)


def measures(store: VolumeStore, volumes: Sequence[str], cache: Path) -> np.ndarray:
    """The measures (n, MEASURES) of stored volumes, cached in ``cache`` in parts, so that an interrupted command
    resumes."""
    cache.mkdir(parents=True, exist_ok=True)
    parts = []
    with ThreadPoolExecutor(2) as pool:
        for first in track(range(0, len(volumes), CHUNK), -(-len(volumes) // CHUNK), "measuring", "parts"):
            names = list(volumes[first : first + CHUNK])
            path = cache / f"{run_key(names, [store.checksums(name) for name in names], list(MEASURES))}.npy"
            measured = kept_array(path)
            if measured is None:
                measured = np.stack(list(pool.map(lambda name: _of_store(store, name), names)))
                keep_array(path, measured)
            parts.append(measured)
    return np.concatenate(parts)


def keep_array(path: Path, array: np.ndarray) -> None:
    """Write an array that ``kept_array`` can read."""
    with written_beside(path) as partial, partial.open("wb") as stream:
        np.save(stream, array)


def kept_array(path: Path, *, mapped: bool = False) -> np.ndarray | None:
    """Read a cached array, as a memory map if ``mapped``; None if it is missing or damaged and must be computed
    again."""
    try:
        array: np.ndarray = np.load(regular(path), mmap_mode="r" if mapped else None)
    except (OSError, ValueError, EOFError, BadZipFile):
        return None
    return array


def _of_store(store: VolumeStore, name: str) -> np.ndarray:
    hu = store.read(name)
    upright = hu.transpose(0, 2, 1) if store.spec.published_geometry else hu
    return measure(upright, store.spec, Source.of_notes(store.notes(name)))


def _body(fine: np.ndarray) -> np.ndarray:
    """The largest 3-D connected component above -400 HU."""
    from scipy import ndimage

    regions, count = ndimage.label(ndimage.binary_opening(fine > -400, iterations=1))
    if count == 0:
        return np.zeros(fine.shape, bool)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    largest: np.ndarray = regions == sizes.argmax()
    return largest


def _inside(body: np.ndarray) -> np.ndarray:
    """In each row, all voxels between the first and the last voxel of the body."""
    inside: np.ndarray = (
        np.logical_or.accumulate(body, axis=2) & np.logical_or.accumulate(body[..., ::-1], axis=2)[..., ::-1]
    )
    return inside


def _texture(fine: np.ndarray, even: np.ndarray, axis: int) -> tuple[float, float]:
    """Robust standard deviation (HU) of the differences between adjacent voxels in homogeneous tissue along an axis,
    and its ratio to that of voxels two apart: 1 for white noise, less for a soft kernel."""
    line, mask = np.moveaxis(fine, axis, 0), np.moveaxis(even, axis, 0)
    if len(line) < 3:
        return float("nan"), float("nan")
    near = (line[1:-1] - line[:-2])[mask[1:-1] & mask[:-2] & mask[2:]]
    far = (line[2:] - line[:-2])[mask[1:-1] & mask[:-2] & mask[2:]]
    if len(near) < 100:
        return float("nan"), float("nan")
    spreads = [float(np.median(np.abs(values))) * 1.4826 / np.sqrt(2) for values in (near, far)]
    return spreads[0], spreads[0] / max(spreads[1], 1e-3)


def _below(fine: np.ndarray, body: np.ndarray, rows: float) -> np.ndarray:
    """Mean HU (3,) of the region up to ``rows`` rows below the lowest row of the body, in three parts from right to
    left."""
    used = np.flatnonzero(body.any(axis=(0, 2)))
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    if not len(used) or used[-1] + 2 >= fine.shape[1]:
        return np.full(3, np.nan)
    region = fine[:, used[-1] + 1 : used[-1] + 1 + max(1, round(rows)), columns[0] : columns[-1] + 1]
    # Leave out padding slices above and below the scan.
    scanned = body.any(axis=(1, 2))
    return np.array([part.mean() for part in np.array_split(region[scanned], 3, axis=2)])
