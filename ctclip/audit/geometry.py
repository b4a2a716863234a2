"""Geometry of embeddings on the unit sphere: gap between volumes and reports, cones, spread, dimensions, neighbours.

All functions take unit vectors (n, dim), one row per volume or report, and return plain numbers.
"""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 10


def modality_gap(volumes: np.ndarray, reports: np.ndarray) -> float:
    """Distance between the centroids of volumes and reports (Liang et al. 2022, section 2)."""
    return float(np.linalg.norm(volumes.mean(axis=0) - reports.mean(axis=0)))


def mean_cosine(vectors: np.ndarray) -> float:
    """Mean cosine between different vectors: near 1 in a narrow cone, near 0 on the whole sphere (Liang et al.
    2022)."""
    count = len(vectors)
    total = vectors.sum(axis=0, dtype=float)
    return float((total @ total - np.sum(vectors.astype(float) ** 2)) / (count * (count - 1)))


def shift_gap(volumes: np.ndarray, reports: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Move volumes and reports towards each other by the fraction ``share`` of the gap and normalise them again (Liang
    et al. 2022, section 4.2); 0 leaves them unchanged, 1 closes the gap, a negative fraction widens it."""
    gap = volumes.mean(axis=0) - reports.mean(axis=0)
    return _unit(volumes - share / 2 * gap), _unit(reports + share / 2 * gap)


def shift_prompts(prompts: np.ndarray, gap: np.ndarray, share: float) -> np.ndarray:
    """Move prompts (n, dim) of any norm as ``shift_gap`` moves reports, keeping each norm. ``gap`` (dim,): centroid of
    volumes minus centroid of reports."""
    length = np.linalg.norm(prompts, axis=1, keepdims=True)
    moved: np.ndarray = length * _unit(prompts / length + share / 2 * gap)
    return moved


def alignment(volumes: np.ndarray, reports: np.ndarray) -> float:
    """Mean squared distance between a volume and its own report (Wang & Isola 2020): 0 is best."""
    return float(np.mean(np.sum((volumes - reports) ** 2, axis=1)))


def uniformity(vectors: np.ndarray) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different vectors (Wang & Isola 2020). Lower values mean more
    evenly spread vectors; in high dimensions the minimum is about -4."""
    total, count = 0.0, len(vectors)
    for first in range(0, count, 512):
        cosines = np.clip(vectors[first : first + 512] @ vectors.T, -1, 1)
        total += float(np.exp(-2 * (2 - 2 * cosines)).sum())
    return float(np.log((total - count) / (count * (count - 1))))


def spectrum(vectors: np.ndarray) -> np.ndarray:
    """Fractions (dim,) of the variance along the principal axes, the largest first; their sum is 1."""
    centred = vectors - vectors.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    total = values.sum()
    return np.asarray(values / total if total > 0 else np.eye(len(values))[0])


def effective_rank(vectors: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of the centred vectors (Roy & Vetterli 2007)."""
    roots = np.sqrt(spectrum(vectors))
    shares = roots / roots.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dimensions_of(vectors: np.ndarray, share: float = 0.9) -> int:
    """Number of principal axes that hold the fraction ``share`` of the variance."""
    return int(np.searchsorted(np.cumsum(spectrum(vectors)), share - 1e-12) + 1)


def neighbour_purity(
    vectors: np.ndarray, values: np.ndarray, patients: np.ndarray, count: int = NEIGHBOURS
) -> tuple[float, float]:
    """Fraction of a volume's ``count`` nearest neighbours from other patients that share its value, and the fraction
    expected by chance.

    ``values`` and ``patients`` (n,). Both fractions are NaN if all volumes have the same value, or there is only one
    patient.
    """
    if len(np.unique(values)) < 2 or len(np.unique(patients)) < 2:
        return float("nan"), float("nan")
    shares, chances = [], []
    for row, vector in enumerate(vectors):
        others = np.flatnonzero(patients != patients[row])
        similarity = vectors[others] @ vector
        nearest = others[np.argpartition(-similarity, min(count, len(others)) - 1)[:count]]
        shares.append(np.mean(values[nearest] == values[row]))
        chances.append(np.mean(values[others] == values[row]))
    return float(np.mean(shares)), float(np.mean(chances))


def principal_axes(vectors: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Mean (dim,) and the first principal axes (count, dim)."""
    mean = vectors.mean(axis=0)
    return mean, np.linalg.svd(vectors - mean, full_matrices=False)[2][:count]


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
