"""Fingerprints of volumes that survive resampling, noise, cropping and reversed slices.

A fingerprint is the volume at about 9 mm without its coarse shading: ribs, vertebrae, vessels and the outlines of organs,
which differ between patients as they do not between copies. Two of them are compared by the highest correlation over all
shifts, with the slices in their order and reversed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctclip.preprocessing.spec import PreprocessingSpec

MILLIMETRES = 9.0
# Denser than this is bone or metal, which would outweigh all else.
WINDOW = (-1000.0, 300.0)
# Of the shading that is taken away, in voxels of the fingerprint.
SHADING = 1.5
# Frequencies of a slice that are compared, per axis.
FREQUENCIES = 8
# A slice of air tells nothing.
LEAST_CONTENT = 0.25
SLICE_VALUES = 32
# The share of a volume's slices that must be found again in a copy of it, which may be cropped.
SHARED = 0.6
# Slices of a volume that are looked for in others, and volumes that are compared at a time.
QUERIES, TOGETHER = 12, 16


def fingerprint(hu: np.ndarray, spec: PreprocessingSpec) -> np.ndarray:
    """HU [slice, row, column] of the spec's shape -> float16 array of about ``MILLIMETRES`` a voxel, mean 0."""
    from scipy.ndimage import gaussian_filter

    sides = [max(1, round(MILLIMETRES / step)) for step in spec.spacing]
    shape = [count // side for count, side in zip(hu.shape, sides, strict=True)]
    whole = hu[tuple(slice(0, count * side) for count, side in zip(shape, sides, strict=True))]
    blocks = np.clip(whole, *WINDOW).reshape(shape[0], sides[0], shape[1], sides[1], shape[2], sides[2])
    coarse = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    detail = coarse - gaussian_filter(coarse, SHADING, mode="nearest")
    detail: np.ndarray = detail - detail.mean()
    return detail.astype(np.float16)


def slice_vectors(prints: np.ndarray) -> np.ndarray:
    """Fingerprints (n, d, h, w) -> (n, d, SLICE_VALUES) float32 unit vectors of their slices, 0 for those that show nothing.

    They are the same wherever in the plane the patient lies: magnitudes of the slice's spectrum, whitened, so that what all
    slices have in common does not count.
    """
    spectra = []
    for volume in prints:
        plane = np.abs(np.fft.rfft2(volume.astype(np.float32)))
        low, high = plane[:, 1:FREQUENCIES, :FREQUENCIES], plane[:, : -FREQUENCIES : -1, :FREQUENCIES]
        both = np.concatenate([part.reshape(len(plane), -1) for part in (low, high)], axis=1)
        spectra.append(np.log(both + 1e-2 * both.mean(axis=1, keepdims=True) + 1e-6).astype(np.float32))
    logs = np.stack(spectra)
    energy = np.stack([volume.astype(np.float32).std(axis=(1, 2)) for volume in prints])
    used = energy > LEAST_CONTENT * energy.max(axis=1, keepdims=True)
    logs -= logs.mean(axis=2, keepdims=True)
    logs -= logs[used].mean(axis=0)
    values, axes = np.linalg.eigh(logs[used].T @ logs[used] / used.sum())
    kept = min(SLICE_VALUES, len(values))
    vectors = logs @ (axes[:, -kept:] / np.sqrt(np.maximum(values[-kept:], 1e-6 * values[-1])))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True) + 1e-12
    return np.where(used[..., None], vectors, 0).astype(np.float32)


def candidates(vectors: np.ndarray, groups: np.ndarray, most: int = 3) -> list[tuple[int, int]]:
    """Pairs of volumes whose slices are alike: for each volume its ``most`` nearest ones of another group.

    A volume's likeness to another is the mean, over the ``SHARED`` of its slices that fit best, of each one's largest
    similarity to a slice of the other, in any order. vectors (n, d, v) of ``slice_vectors``; groups (n,): volumes of one
    group (a scan's reconstructions) are not compared.
    """
    asked = [_spread(np.flatnonzero(volume.any(axis=1)), QUERIES) for volume in vectors]
    by_slice = np.ascontiguousarray(vectors.transpose(1, 2, 0))
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
            likeness = np.partition(own, len(own) - kept, axis=0)[-kept:].mean(axis=0) if len(own) else np.zeros(len(vectors))
            likeness[groups == groups[one]] = -1
            nearest = np.argpartition(-likeness, min(most, len(likeness) - 1))[:most]
            pairs |= {(min(one, int(other)), max(one, int(other))) for other in nearest if likeness[other] > 0}
    return sorted(pairs)


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spread."""
    return indices[np.unique(np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int))]


def correlation(one: np.ndarray, other: np.ndarray) -> tuple[float, bool]:
    """The highest correlation of two fingerprints over all shifts, and whether it is with reversed slices."""
    from scipy import fft

    # Shifted around: what leaves at one end meets the air at the other.
    shape = [fft.next_fast_len(n, real=True) for n in one.shape]
    a, b = one.astype(np.float32), other.astype(np.float32)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b)) or 1.0
    spectrum = fft.rfftn(a, shape)
    peaks = [
        float(fft.irfftn(spectrum * np.conj(fft.rfftn(volume, shape)), shape).max()) / scale for volume in (b, b[::-1])
    ]
    return max(peaks), peaks[1] > peaks[0]


def compare(prints: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """(pairs, 2): correlation, and 1 where slices are reversed."""
    return np.array([correlation(prints[one], prints[other]) for one, other in pairs]).reshape(-1, 2)
