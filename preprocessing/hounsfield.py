"""Decide whether values are Hounsfield units, and rescale or refuse them.

CT-RATE's first release needs slope and intercept of its metadata table; in the second they are already applied, and
applying them again would move water to -1024. The values themselves show which is the case.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.facts import TableFacts
from ctclip.preprocessing.volume import Volume

Trust = Literal["auto", "trust-file", "trust-table"]

OUTSIDE_FIELD_OF_VIEW = -1024
# A note instead of a warning, because it is true of every volume of CT-RATE's second release.
ALREADY_HU = "already in HU: slope and intercept of the metadata table not applied again"
SAMPLE_STEP, SAMPLED_VOXELS = 3, 500_000
NARROWEST_HU = 200.0
# If more than this fraction of the voxels has exactly the same value, denser than air, the volume was filled.
DENSEST_AIR, MOST_ALIKE = -950, 0.2


def to_hu(volume: Volume, table: TableFacts | None = None, trust: Trust = "auto") -> Volume:
    """The volume in HU, with padding outside the field of view set to air.

    ``auto`` keeps values that look like HU, applies the table if the result looks like HU, and otherwise refuses the
    volume, with both interpretations in the message.
    """
    sample = _sample(volume)
    # Minimum and maximum over all voxels, which reveal any NaN or infinity.
    extremes = (volume.array.min(), volume.array.max()) if volume.array.dtype.kind == "f" else (0, 0)
    if not np.isfinite(extremes).all():
        raise PreprocessingError(f"{volume.source}: contains NaN or infinite values; convert it from DICOM again")
    array, warnings = volume.array, list(volume.warnings)
    if (low := sample.min()) == sample.max() and not (volume.array != low).any():
        raise PreprocessingError(f"{volume.source}: every voxel is {low:g}: an empty volume; copy or export it again")
    due = table is not None and (table.slope, table.intercept) != (1.0, 0.0)
    if trust == "trust-table" and not due:
        raise PreprocessingError(
            f"{volume.source}: --hu trust-table, but no table lists a slope and an intercept for it (other than 1 and 0); "
            f"leave --hu out"
        )
    if trust == "trust-table":
        array = _applied(array, table)
    elif trust == "auto":
        as_is = not_hu(sample)
        if as_is is not None:
            as_table = not_hu(_applied(sample, table)) if due else "no slope and intercept are listed for it"
            if as_table is not None:
                remedy = "--hu trust-file or --hu trust-table" if due else "--hu trust-file"
                raise PreprocessingError(
                    f"{volume.source}: not a CT in Hounsfield units. As stored: {as_is}. With the table: {as_table}. "
                    f"If the values are right, use {remedy}"
                )
            array = _applied(array, table)
            warnings.append("slope and intercept of the metadata table applied")
        elif due:
            warnings.append(ALREADY_HU)
    if array.dtype not in (np.int16, np.float32):
        array = np.clip(array, -32768, 32767).astype(np.int16 if np.issubdtype(array.dtype, np.integer) else np.float32)
    if told := filled(array):
        warnings.append(told)
    return Volume(array, volume.affine, volume.source, warnings)


def filled(array: np.ndarray) -> str | None:
    """The warning for a volume that is masked or filled with one value that is not air, or None.

    To a model, voxels outside a mask that are set to 0 HU look like water. Air and padding below -950 HU may be
    constant.
    """
    step = max(1, round((array.size / 50_000) ** (1 / 3)))
    few = array[::step, ::step, ::step].ravel()
    values, counts = np.unique(few[few > DENSEST_AIR], return_counts=True)
    if len(values) == 0 or counts.max() <= MOST_ALIKE * len(few):
        return None
    return (
        f"masked or filled: {counts.max() / len(few):.0%} of the voxels hold exactly {values[counts.argmax()]:g} HU; "
        f"that region is not counted as air"
    )


def not_hu(sample: np.ndarray) -> str | None:
    """The reason why values cannot be a CT in HU, or None: water and fat near 0, air near -1000, padding below."""
    low, high = float(sample.min()), float(sample.max())
    values = f"values in [{low:g}, {high:g}]"
    # A constant value below the HU scale is padding; various values there are evidence against HU.
    inside = sample[sample > OUTSIDE_FIELD_OF_VIEW + 4]
    if len(np.unique(inside[:: max(1, len(inside) // 20000)])) < 16:
        return f"only a few distinct values in [{low:g}, {high:g}] (a mask?)"
    least, most = float(inside.min()), float(inside.max())
    if least >= 0 and most <= 255:
        return f"{values} (an 8-bit image?)"
    if most - least < NARROWEST_HU:
        return f"{values}, a range smaller than from air to tissue (already scaled?)"
    tissue, air = _share(inside, -200, 250), _share(inside, -1150, -500)
    # Raw values with water at 1024: air lies in the range of soft tissue, and soft tissue at 1024.
    if air < 0.005 and _share(inside, 850, 1300) > 0.05:
        return f"{values} with tissue near 1024 (intercept of -1024 not yet applied?)"
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


def _applied(array: np.ndarray, table: TableFacts | None) -> np.ndarray:
    assert table is not None
    return array.astype(np.float32) * np.float32(table.slope) + np.float32(table.intercept)


def _sample(volume: Volume) -> np.ndarray:
    # Every third voxel along each axis is as reliable as all voxels, at a twenty-seventh of the cost; fewer suffice for
    # a large volume.
    step = max(SAMPLE_STEP, round((volume.array.size / SAMPLED_VOXELS) ** (1 / 3)))
    return volume.array[::step, ::step, ::step].ravel()
