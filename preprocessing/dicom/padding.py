"""Padding outside the measured region (PS3.3, C.7.5.1.1.2): PixelPaddingValue and its range."""

from __future__ import annotations

from typing import Any

import numpy as np

# The largest 12-bit value at an intercept of 0. Metal may reach it; higher values are not measurements.
DENSEST_HU = 4095.0


def padded(stored: np.ndarray, raw: np.ndarray, header: Any, slope: float, intercept: float) -> np.ndarray | None:
    """Mask of the pixels [row, column] of a slice that are padding, or None if there are none.

    ``stored``: the stored values; ``raw``: the values before unused bits were cleared. A padding value that tissue or
    metal could also have counts as padding only in regions that reach the edge of the image: PixelPaddingValue 0 with
    an intercept of 0 is also water.
    """
    limits = [
        _as_stored(header.get(keyword, None), raw.dtype) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ]
    if limits[0] is None:
        return None
    low, high = sorted((limits[0], limits[0] if limits[1] is None else limits[1]))
    mask = (stored >= low) & (stored <= high)
    if raw is not stored:
        mask |= (raw >= low) & (raw <= high)
    if not mask.any():
        return None
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return _reaching_the_edge(mask) if ends[1] > -1024 and ends[0] <= DENSEST_HU else mask


def _as_stored(value: Any, dtype: np.dtype) -> int | None:
    """A padding value as stored in ``dtype``: headers write -2000 for 63536, and vice versa."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        return None
    bits = 8 * dtype.itemsize
    if dtype.kind == "i" and bits == 32 and number > 32767:
        return number
    wrapped = number % 2**bits
    return wrapped - 2**bits if dtype.kind == "i" and wrapped >= 2 ** (bits - 1) else wrapped


def _reaching_the_edge(mask: np.ndarray) -> np.ndarray | None:
    from scipy import ndimage

    regions, _ = ndimage.label(mask, np.ones((3, 3)))
    edge = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    reaching = np.isin(regions, np.unique(edge[edge > 0]))
    return reaching if reaching.any() else None
