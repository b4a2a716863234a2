"""Deciding whether values are Hounsfield units; rescaling, or refusing aloud.

CT-RATE's first release needed slope and intercept of its metadata table, its second has them applied already:
applying them again moves water to -1024. The values themselves say which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.volume import Volume

Trust = Literal["auto", "trust-file", "trust-table"]

OUTSIDE_FIELD_OF_VIEW = -1024
# Worth saying, but true of every volume of CT-RATE's second version.
ALREADY_HU = "already in HU: slope and intercept of the metadata table not applied again"
SAMPLE_STEP = 3
NARROWEST_HU = 200.0
SMALLEST_LUNG_ML = 150.0
SHORTEST_LUNG_MM = 100.0
THINNEST_LUNG_MM = 45.0
# Lungs destroyed by emphysema are at -960 HU, the air around a patient near -1000.
AIR_NOT_LUNG = -975.0


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
    """Why values cannot be a CT in HU, or None if they can: water and fat near 0, air near -1000, padding below."""
    low, high = float(sample.min()), float(sample.max())
    values = f"values in [{low:g}, {high:g}]"
    # What is constant below the scale is padding; the rest, spread over the whole volume, is evidence.
    inside = sample[sample > OUTSIDE_FIELD_OF_VIEW + 4]
    if len(np.unique(inside[:: max(1, len(inside) // 20000)])) < 16:
        return f"only a few distinct values in [{low:g}, {high:g}] (a mask?)"
    least, most = float(inside.min()), float(inside.max())
    if least >= 0 and most <= 255:
        return f"{values} (an 8-bit picture?)"
    if most - least < NARROWEST_HU:
        return f"{values}, less than lies between air and tissue (scaled already?)"
    tissue, air = _share(inside, -200, 250), _share(inside, -1150, -500)
    # Raw detector numbers with water at 1024: air lies where soft tissue should, and soft tissue at 1024.
    if air < 0.005 and _share(inside, 850, 1300) > 0.05:
        return f"{values} with tissue near 1024 (an intercept of -1024 is still due?)"
    if tissue < 0.02:
        return f"{values}, {tissue:.0%} in the range of soft tissue"
    if air < 0.005 and least >= 0:
        return f"{values}, none as low as air or fat"
    if least > -900 and np.mean(inside == least) > 0.05:
        return f"{values} with {np.mean(inside == least):.0%} at {least:g} (clipped to a display window?)"
    if least > -750 and _share(inside, -750, -300) > 0.05:
        return f"{values}, with air near {least:g} instead of -1000"
    if np.mean(inside > 700) > 0.25:
        return f"{values}, {np.mean(inside > 700):.0%} as dense as bone (inverted?)"
    if low < -1500 and _share(sample, -2000, -1200) > 0.05:
        return f"{values} with much between -2000 and -1200 (an intercept applied twice?)"
    return None


def _share(values: np.ndarray, low: float, high: float) -> float:
    return float(np.mean((values > low) & (values < high))) if len(values) else 0.0


def check_chest(volume: Volume) -> str | None:
    """Why an oriented HU volume cannot be a chest, or None.

    A chest holds a connected space of lung (seen at 6 mm, where no edge between air and tissue looks like lung) of at
    least 150 ml that is 100 mm high and, in one axial slice, holds a disc of 45 mm: the lung bases of an abdomen are too
    low, the foam of a table or around a head is too thin.
    """
    step = [max(1, round(6.0 / spacing)) for spacing in volume.spacing]
    kept = volume.array[tuple(slice(0, n - n % s) for n, s in zip(volume.array.shape, step, strict=True))]
    (d, h, w), (i, j, k) = kept.shape, step
    coarse = kept.reshape(d // i, i, h // j, j, w // k, k).mean(axis=(1, 3, 5), dtype=np.float32)
    size = [spacing * s for spacing, s in zip(volume.spacing, step, strict=True)]
    # Healthy lung ends where air begins; lung destroyed by emphysema is as thin as air, and known by being apart from it.
    for mask in ((coarse > -950) & (coarse < -550), coarse < -550):
        millilitres, height, thick = _largest_lung(coarse, mask, size)
        if millilitres >= SMALLEST_LUNG_ML and height >= SHORTEST_LUNG_MM and thick >= THINNEST_LUNG_MM:
            return None
    return (
        f"its largest space of lung density measures {millilitres:.0f} ml, {height:.0f} mm high, {thick:.0f} mm thick: "
        f"not a chest"
    )


def _largest_lung(coarse: np.ndarray, mask: np.ndarray, size: list[float]) -> tuple[float, float, float]:
    """Millilitres, height and thickness (mm) of the largest connected space of a mask that is not air by its median."""
    from scipy import ndimage

    regions, _ = ndimage.label(ndimage.binary_erosion(mask, np.ones((1, 2, 2))))
    spaces = (regions == label for label in np.argsort(np.bincount(regions.ravel()))[::-1] if label > 0)
    largest = next((space for space in spaces if np.median(coarse[space]) > AIR_NOT_LUNG), None)
    if largest is None:
        return 0.0, 0.0, 0.0
    slices = np.flatnonzero(largest.any(axis=(1, 2)))
    # Slices so far apart that the nearest voxel outside always lies in the same one.
    thick = 2 * float(ndimage.distance_transform_edt(largest, sampling=(1e6, *size[1:])).max())
    return float(largest.sum() * np.prod(size) / 1000), float((slices[-1] - slices[0] + 1) * size[0]), thick


def _applied(array: np.ndarray, table: Rescale | None) -> np.ndarray:
    assert table is not None
    return array.astype(np.float32) * np.float32(table.slope) + np.float32(table.intercept)


def _sample(volume: Volume) -> np.ndarray:
    # Every third voxel along each axis decides as well as all of them, at a twenty-seventh of the cost.
    return volume.array[::SAMPLE_STEP, ::SAMPLE_STEP, ::SAMPLE_STEP].ravel()
