"""Properties measured in the image that reports do not mention: noise, kernel, table, position, contrast."""

from __future__ import annotations

import numpy as np

from ctclip.drift.facts import EVEN, Source
from ctclip.preprocessing.spec import PreprocessingSpec

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
# Spacing of the slices in which body, lungs and table are measured: they change little in between.
SLICES_MM = 9.0
# Height in mm of the measured region below the body.
BELOW_MM = 45.0


def measure(hu: np.ndarray, spec: PreprocessingSpec, source: Source | None) -> np.ndarray:
    """The measures (MEASURES,) of one volume, HU [slice, row, column] LPS+ with the spec's spacing; NaN if a measure is
    undefined."""
    steps = [max(1, round(FINE_MM / step)) for step in spec.spacing]
    dz, dy, dx = (step * mm for step, mm in zip(steps, spec.spacing, strict=True))
    fine = hu[tuple(slice(None, None, step) for step in steps)].astype(np.float32)
    apart = max(1, round(SLICES_MM / dz))
    some = fine[::apart]
    padded = np.ptp(some, axis=(1, 2)) == 0
    body = _body(some)
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    rows = np.flatnonzero(body.any(axis=(0, 2)))
    inside = _inside(body)
    lung = (some > -950) & (some < -600) & inside
    along, lag = _texture(some[:, ::2], 2)
    across, _ = _texture(fine[:, ::2, ::2], 0)
    table = _below(some, body, BELOW_MM / dy)
    millilitres = dz * dy * dx / 1000
    facts = source.facts if source is not None else np.full(6, np.nan)
    # Only outside the body: the air of emphysema does not depend on the technique.
    air = some[(some < -940) & (some > -1020) & ~inside]
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
        "contrast or calcium": ((some > 130) & (some < 350)).sum() / max(1, body.sum()),
        "lung volume": lung.sum() * millilitres * apart,
        "lung density": some[lung].mean() if lung.any() else np.nan,
        "air around the body": (some[~padded] < -900).mean() if not padded.all() else np.nan,
    }
    return np.array([values[name] for name in MEASURES], dtype=float)


def _body(fine: np.ndarray) -> np.ndarray:
    """The largest 3-D connected component above -400 HU."""
    from scipy import ndimage

    regions, count = ndimage.label(_opened(fine > -400))
    if count == 0:
        return np.zeros(fine.shape, bool)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    largest: np.ndarray = regions == sizes.argmax()
    return largest


def _opened(mask: np.ndarray) -> np.ndarray:
    """Binary opening of each slice with a cross, which separates a table that touches the skin; ten times as fast as
    SciPy's."""
    eroded = np.zeros_like(mask)
    inner = mask[:, 1:-1, 1:-1]
    eroded[:, 1:-1, 1:-1] = inner & mask[:, :-2, 1:-1] & mask[:, 2:, 1:-1] & mask[:, 1:-1, :-2] & mask[:, 1:-1, 2:]
    opened = eroded.copy()
    opened[:, 1:] |= eroded[:, :-1]
    opened[:, :-1] |= eroded[:, 1:]
    opened[:, :, 1:] |= eroded[:, :, :-1]
    opened[:, :, :-1] |= eroded[:, :, 1:]
    return opened


def _inside(body: np.ndarray) -> np.ndarray:
    """In each row, all voxels between the first and the last voxel of the body."""
    inside: np.ndarray = (
        np.logical_or.accumulate(body, axis=2) & np.logical_or.accumulate(body[..., ::-1], axis=2)[..., ::-1]
    )
    return inside


def _texture(fine: np.ndarray, axis: int) -> tuple[float, float]:
    """Robust spread of differences of neighbours in even tissue along an axis (HU), and that of direct neighbours by that of
    next but one: 1 for white noise, less for a soft kernel."""
    line = np.moveaxis(fine, axis, 0)
    mask = (line > EVEN[0]) & (line < EVEN[1])
    if len(line) < 3:
        return float("nan"), float("nan")
    used = mask[1:-1] & mask[:-2] & mask[2:]
    first = line[:-2][used]
    near, far = line[1:-1][used] - first, line[2:][used] - first
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
