"""Fingerprints of volumes that survive resampling, noise, cropping and reversed slices.

A fingerprint is the volume at about 9 mm. Pairs with similar slices become candidates. Two candidates are registered by
the shift with the highest cross-correlation, with their slices in order and reversed, first at 9 mm and, if they
correlate there, at 4 mm, where ribs, vessels and vertebrae differ between patients but not between copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ctclip.preprocessing.spec import PreprocessingSpec

COARSE_MM, FINE_MM = 9.0, 4.0
# HU are clipped to this window, because bone and metal would otherwise dominate the correlation.
WINDOW = (-1000.0, 300.0)
# Voxels above this belong to the scanned region; padding is below it.
CONTENT = -990.0
# Standard deviation in voxels of the smoothing that is subtracted, and width of the ignored rim of a scan, where
# cropping creates new edges.
SHADING, RIM = 2.0, 3
# Minimum overlap along each axis, as a fraction of the smaller scan.
LEAST_OVERLAP = 0.4
# Number of frequencies of a slice that are compared along each axis.
FREQUENCIES = 10
# A slice of air does not identify a volume.
LEAST_CONTENT = 0.25
SLICE_VALUES = 128
# Fraction of a volume's slices that must also be in a copy, which may be cropped.
SHARED = 0.8
# The middle of two volumes (this fraction of each axis) is compared first at 4 mm; if it correlates less than MAYBE,
# the whole volumes are not compared. The middles of 60 changed copies correlated by at least 0.80.
MIDDLE, MAYBE = 0.6, 0.7
# Step in HU with which the detail of a middle is stored in one byte per voxel.
STEP = 4.0
# A middle with fewer voxels along an axis is not conclusive.
FEWEST = 24
# Number of slices of a volume that are searched for in others, and number of volumes compared at a time.
QUERIES, TOGETHER = 12, 16

# A result of ``detail``.
Detail = tuple[np.ndarray, list[tuple[int, int]]]


def fingerprint(hu: np.ndarray, spec: PreprocessingSpec, millimetres: float = COARSE_MM) -> np.ndarray:
    """HU [slice, row, column] with the spec's spacing -> float16 HU clipped to ``WINDOW``, with voxels of about
    ``millimetres``."""
    sides = [min(max(1, round(millimetres / step)), count) for step, count in zip(spec.spacing, hu.shape, strict=True)]
    shape = [count // side for count, side in zip(hu.shape, sides, strict=True)]
    low, high = (hu.dtype.type(limit) for limit in WINDOW)
    total = np.clip(hu[tuple(slice(0, count * side) for count, side in zip(shape, sides, strict=True))], low, high)
    # Slices of an array are added several times faster than NumPy takes the mean along short axes.
    for axis, side in enumerate(sides):
        parts = [total[(slice(None),) * axis + (slice(start, None, side),)] for start in range(side)]
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total += part
    coarse: np.ndarray = (total / math.prod(sides)).astype(np.float16)
    return coarse


def detail(print_: np.ndarray, rim: int = RIM) -> Detail:
    """High-pass filter a fingerprint (float32). Returns the filtered fingerprint, which is 0 in the rim of the scanned
    region and outside it, and the bounds along each axis of the part that is kept."""
    from scipy.ndimage import gaussian_filter

    volume = print_.astype(np.float32)
    box = []
    for axis in range(3):
        used = np.flatnonzero((volume > CONTENT).any(axis=tuple({0, 1, 2} - {axis})))
        first, end = (int(used[0]) + rim, int(used[-1]) + 1 - rim) if len(used) else (0, 0)
        box.append((first, max(first, end)))
    inside = tuple(slice(*ends) for ends in box)
    kept = np.zeros_like(volume)
    kept[inside] = (volume - gaussian_filter(volume, SHADING, mode="nearest"))[inside]
    return kept, box


def slice_vectors(prints: Iterable[np.ndarray]) -> np.ndarray:
    """Fingerprints (n, d, h, w) -> (n, d, SLICE_VALUES) float32 unit vectors of their slices, 0 for those that show nothing.

    The vectors do not depend on the patient's position in the plane: they are the magnitudes of the slice's spectrum,
    whitened to remove what all slices have in common.
    """
    spectra = []
    energies = []
    for volume in prints:
        kept = detail(volume, rim=1)[0]
        energies.append(kept.std(axis=(1, 2)))
        plane = np.abs(np.fft.rfft2(kept))
        low, high = plane[:, 1:FREQUENCIES, :FREQUENCIES], plane[:, :-FREQUENCIES:-1, :FREQUENCIES]
        both = np.concatenate([part.reshape(len(plane), -1) for part in (low, high)], axis=1)
        spectra.append(np.log(both + 1e-2 * both.mean(axis=1, keepdims=True) + 1e-6).astype(np.float32))
    logs = np.stack(spectra)
    energy = np.stack(energies)
    used = energy > LEAST_CONTENT * energy.max(axis=1, keepdims=True)
    if not used.any():
        return np.zeros((*logs.shape[:2], SLICE_VALUES), np.float32)
    logs -= logs.mean(axis=2, keepdims=True)
    logs -= logs[used].mean(axis=0)
    values, axes = np.linalg.eigh(logs[used].T @ logs[used] / used.sum())
    strongest = min(SLICE_VALUES, int(values.size))
    vectors = logs @ (axes[:, -strongest:] / np.sqrt(np.maximum(values[-strongest:], 1e-6 * values[-1])))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True) + 1e-12
    return np.where(used[..., None], vectors, 0).astype(np.float32)


def candidates(vectors: np.ndarray, groups: np.ndarray, most: int = 3) -> list[tuple[int, int]]:
    """Pairs of volumes with similar slices: each volume with the nearest volume of each of the ``most`` nearest other
    groups.

    Each slice of a volume is matched with the most similar slice of the other volume, in any order. The similarity of
    two volumes is the mean over the best-matching fraction ``SHARED`` of these slices. ``vectors`` (n, d, v) come from
    ``slice_vectors``; ``groups`` (n,): volumes of the same group (reconstructions of one scan) are not compared.
    """
    asked = [_spread(np.flatnonzero(volume.any(axis=1)), QUERIES) for volume in vectors]
    by_slice = np.ascontiguousarray(vectors.transpose(1, 2, 0))
    in_groups = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[in_groups], prepend=groups.min() - 1))
    pairs: set[tuple[int, int]] = set()
    for first in range(0, len(vectors), TOGETHER):
        block = range(first, min(first + TOGETHER, len(vectors)))
        queries = np.concatenate([vectors[one][asked[one]] for one in block])
        best = np.zeros((len(queries), len(vectors)), np.float32)
        for of_slice in by_slice:
            np.maximum(best, queries @ of_slice, out=best)
        start = 0
        for one in block:
            own = best[start : start + len(asked[one])]
            start += len(asked[one])
            kept = max(1, round(SHARED * len(own)))
            likeness = (
                np.partition(own, len(own) - kept, axis=0)[-kept:].mean(axis=0) if len(own) else np.zeros(len(vectors))
            )
            likeness[groups == groups[one]] = -1
            of_groups = np.maximum.reduceat(likeness[in_groups], starts)
            for group in np.argpartition(-of_groups, min(most, len(starts) - 1))[:most]:
                members = in_groups[starts[group] : starts[group + 1] if group + 1 < len(starts) else None]
                other = int(members[likeness[members].argmax()])
                if likeness[other] > 0:
                    pairs.add((min(one, other), max(one, other)))
    return sorted(pairs)


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the indices, evenly spaced."""
    return indices[np.unique(np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int))]


def correlation(one: np.ndarray, other: np.ndarray, orders: Sequence[bool] = (False, True)) -> tuple[float, bool]:
    """Correlate two fingerprints at the shift that aligns them best. Returns the correlation (0 if they overlap by less
    than ``LEAST_OVERLAP``) and whether the slices of ``other`` are reversed. ``orders``: the slice orders to try (True:
    reversed)."""
    first, second = detail(one), detail(other)
    found = [(_aligned(first, second, is_reversed), is_reversed) for is_reversed in orders]
    return max(found, key=lambda pair: pair[0])


def _aligned(one: Detail, other: Detail, is_reversed: bool) -> float:
    """The correlation at the shift that aligns two volumes best; ``is_reversed``: with the slices of ``other`` reversed."""
    from scipy import fft

    (a, box), (b, ends) = one, other
    if is_reversed:
        b, ends = b[::-1], [(len(b) - ends[0][1], len(b) - ends[0][0]), *ends[1:]]
    # Cross-correlation by FFT. It is circular: volumes are padded only to a fast length.
    shape = [fft.next_fast_len(n, real=True) for n in a.shape]
    likeness = fft.irfftn(fft.rfftn(a, shape) * np.conj(fft.rfftn(b, shape)), shape)
    peak = np.unravel_index(int(likeness.argmax()), likeness.shape)
    shift = [int(p) - n * (p > n // 2) for p, n in zip(peak, shape, strict=True)]
    return _overlap_correlation(a, box, b, ends, shift)


def _overlap_correlation(
    one: np.ndarray, box: list[tuple[int, int]], other: np.ndarray, ends: list[tuple[int, int]], shift: list[int]
) -> float:
    """Pearson's correlation where ``other``, moved by ``shift``, overlaps ``one``."""
    mine, theirs = [], []
    for (first, end), (begin, until), step in zip(box, ends, shift, strict=True):
        low, high = max(first, begin + step), min(end, until + step)
        if high - low < max(3, LEAST_OVERLAP * min(end - first, until - begin)):
            return 0.0
        mine.append(slice(low, high))
        theirs.append(slice(low - step, high - step))
    x, y = one[tuple(mine)].ravel(), other[tuple(theirs)].ravel()
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-6))


def compare(prints: Sequence[np.ndarray] | np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each pair, the correlation and 1 if the slices are reversed, else 0: (pairs, 2)."""
    with ThreadPoolExecutor(2) as pool:
        return np.array(
            list(pool.map(lambda pair: correlation(prints[pair[0]], prints[pair[1]]), pairs)), dtype=float
        ).reshape(-1, 2)


def middle(hu: np.ndarray, spec: PreprocessingSpec) -> np.ndarray:
    """The ``detail`` of ``FINE_MM`` of the middle of a volume: int8, in steps of ``STEP`` HU."""
    edges = [round(count * (1 - MIDDLE) / 2) for count in hu.shape]
    inner = hu[tuple(slice(edge, count - edge) for edge, count in zip(edges, hu.shape, strict=True))]
    kept, _ = detail(fingerprint(inner, spec, FINE_MM))
    return np.rint(np.clip(kept / STEP, -127, 127)).astype(np.int8)


def middles_differ(one: np.ndarray, other: np.ndarray, is_reversed: bool) -> bool:
    """Whether two volumes are too different in their middles (``middle``) to be copies, which is faster to see than by
    ``compare_whole``. Middles of few voxels tell nothing."""
    if min(one.shape) < FEWEST:
        return False
    first, second = ((kept.astype(np.float32), _box(kept)) for kept in (one, other))
    return _aligned(first, second, is_reversed) < MAYBE


def _box(kept: np.ndarray) -> list[tuple[int, int]]:
    """The first and the end along each axis of what is not 0."""
    used = [np.flatnonzero(kept.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [(int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0) for places in used]


def fine_detail(hu: np.ndarray, spec: PreprocessingSpec) -> Detail:
    """The ``detail`` at 4 mm of a volume, HU [slice, row, column] of the spec's spacing."""
    return detail(fingerprint(hu, spec, FINE_MM))


def compare_whole(one: Detail, other: Detail, is_reversed: bool) -> float:
    """The correlation of two volumes (``fine_detail``) at the shift that aligns them best."""
    return _aligned(one, other, is_reversed)
