"""Deciding whether values are Hounsfield units; rescaling, or refusing aloud.

CT-RATE's first release needed slope and intercept of its metadata table, its second has them applied already:
applying them again moves water to -1024. The values themselves say which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from preprocessing.errors import PreprocessingError
from preprocessing.volume import Volume

Trust = Literal["auto", "trust-file", "trust-table"]

OUTSIDE_FIELD_OF_VIEW = -1024
# Worth saying, but true of every volume of CT-RATE's second version.
ALREADY_HU = "already in HU: slope and intercept of the metadata table not applied again"
SAMPLE_STEP = 3
SMALLEST_LUNG_ML = 150.0
SHORTEST_LUNG_MM = 100.0
SMALLEST_LUNG_CM2 = 50.0


@dataclass(frozen=True)
class Rescale:
    """Slope and intercept that a metadata table lists for a volume."""

    slope: float = 1.0
    intercept: float = 0.0


def to_hu(volume: Volume, table: Rescale | None = None, trust: Trust = "auto") -> Volume:
    """The volume in HU, padding outside the field of view become air.

    ``auto`` keeps values that look like HU, applies the table where it makes them so, and refuses otherwise,
    with both readings in the message.
    """
    sample = _sample(volume)
    # The least and greatest of all voxels: one NaN or infinity among them shows there.
    extremes = (volume.array.min(), volume.array.max()) if volume.array.dtype.kind == "f" else (0, 0)
    if not np.isfinite(extremes).all():
        raise PreprocessingError(f"{volume.source}: holds NaN or infinite values; convert it from DICOM again")
    array, warnings = volume.array, list(volume.warnings)
    due = table is not None and (table.slope, table.intercept) != (1.0, 0.0)
    if trust == "trust-table" and due:
        array = _applied(array, table)
    elif trust == "auto":
        as_is = not_hu(sample)
        if as_is is not None:
            as_table = not_hu(_applied(sample, table)) if due else "no slope and intercept are listed for it"
            if as_table is not None:
                raise PreprocessingError(
                    f"{volume.source}: not a CT in Hounsfield units. As stored: {as_is}. With the table: {as_table}. "
                    f"If you know better, say --hu trust-file or --hu trust-table"
                )
            array = _applied(array, table)
            warnings.append("slope and intercept of the metadata table applied")
        elif due:
            warnings.append(ALREADY_HU)
    if array.dtype not in (np.int16, np.float32):
        array = np.clip(array, -32768, 32767).astype(np.int16 if np.issubdtype(array.dtype, np.integer) else np.float32)
    return Volume(array, volume.affine, volume.source, warnings)


def not_hu(sample: np.ndarray) -> str | None:
    """Why values cannot be a CT in HU, or None if they can: water and fat near 0, air near -1000."""
    low, high = float(sample.min()), float(sample.max())
    if len(np.unique(sample[:20000])) < 16:
        return f"only a few distinct values in [{low:g}, {high:g}] (a mask?)"
    if high <= 255 and low >= 0:
        return f"values in [{low:g}, {high:g}] (an 8-bit picture?)"
    inside = sample[sample > OUTSIDE_FIELD_OF_VIEW - 150]
    tissue = np.mean((inside > -200) & (inside < 250)) if len(inside) else 0.0
    air = np.mean((inside > -1150) & (inside < -500)) if len(inside) else 0.0
    if tissue < 0.02:
        return f"values in [{low:g}, {high:g}], {tissue:.0%} in the range of soft tissue"
    if air < 0.005 and low >= 0:
        return f"values in [{low:g}, {high:g}], none as low as air or fat"
    # Raw detector numbers with water at 1024: air lies where soft tissue should, and soft tissue at 1024.
    shifted = np.mean((inside > 850) & (inside < 1300))
    if low > -300 and shifted > 0.05:
        return f"values in [{low:g}, {high:g}] with tissue near 1024 (an intercept of -1024 is still due?)"
    if low < -1500 and np.mean((sample < -1200) & (sample > -2000)) > 0.05:
        return f"values in [{low:g}, {high:g}] with much between -2000 and -1200 (an intercept applied twice?)"
    return None


def check_chest(volume: Volume) -> str | None:
    """Why an oriented HU volume cannot be a chest, or None.

    A chest holds a connected space of lung density (-950 to -550 HU, seen at 6 mm, where no edge between air and
    tissue looks like lung) of at least 150 ml that is 100 mm high and fills 50 cm2 of one axial slice: the lung bases
    of an abdomen are too low, foam around a head is too thin.
    """
    from scipy import ndimage

    step = [max(1, round(6.0 / spacing)) for spacing in volume.spacing]
    kept = volume.array[tuple(slice(0, n - n % s) for n, s in zip(volume.array.shape, step, strict=True))]
    (d, h, w), (i, j, k) = kept.shape, step
    coarse = kept.reshape(d // i, i, h // j, j, w // k, k).mean(axis=(1, 3, 5), dtype=np.float32)
    lung = ndimage.binary_erosion((coarse > -950) & (coarse < -550), np.ones((1, 2, 2)))
    regions, count = ndimage.label(lung)
    if count == 0:
        return "nothing in it has the density of lung: not a chest"
    largest = regions == 1 + int(np.bincount(regions.ravel())[1:].argmax())
    dz, dy, dx = (spacing * s for spacing, s in zip(volume.spacing, step, strict=True))
    area = largest.sum(axis=(1, 2)) * dy * dx / 100
    slices = np.flatnonzero(area)
    millilitres, height = float(area.sum() * dz / 10), float((slices[-1] - slices[0] + 1) * dz)
    if millilitres < SMALLEST_LUNG_ML or height < SHORTEST_LUNG_MM or area.max() < SMALLEST_LUNG_CM2:
        return (
            f"its largest space of lung density measures {millilitres:.0f} ml, {height:.0f} mm high, at most "
            f"{area.max():.0f} cm2 in a slice: not a chest"
        )
    return None


def _applied(array: np.ndarray, table: Rescale | None) -> np.ndarray:
    assert table is not None
    return array.astype(np.float32) * np.float32(table.slope) + np.float32(table.intercept)


def _sample(volume: Volume) -> np.ndarray:
    # Every third voxel along each axis decides as well as all of them, at a twenty-seventh of the cost.
    return volume.array[::SAMPLE_STEP, ::SAMPLE_STEP, ::SAMPLE_STEP].ravel()
