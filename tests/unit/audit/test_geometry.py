"""Numbers of embeddings against analytic values and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from ctclip.audit import geometry


def sphere(count: int, dim: int, seed: int = 0, along: float = 0.0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(0, 1, (count, dim))
    vectors[:, 0] += along
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_gap_and_its_shift() -> None:
    volumes, reports = sphere(400, 16, 0, 4.0), sphere(400, 16, 1, -4.0)
    gap = geometry.modality_gap(volumes, reports)
    assert gap == pytest.approx(np.linalg.norm(volumes.mean(0) - reports.mean(0)))
    same = geometry.shift_gap(volumes, reports, 0.0)
    assert np.allclose(same[0], volumes)
    assert np.allclose(same[1], reports)
    closed, wider = (geometry.modality_gap(*geometry.shift_gap(volumes, reports, share)) for share in (1.0, -1.0))
    assert closed < 0.1 * gap < gap < wider
    prompts = 3 * sphere(5, 16, 2)
    moved = geometry.shift_prompts(prompts, volumes.mean(0) - reports.mean(0), 0.7)
    assert np.allclose(np.linalg.norm(moved, axis=1), 3)
    assert np.allclose(geometry.shift_prompts(prompts, volumes.mean(0), 0.0), prompts)


def test_cosines_of_a_cone() -> None:
    vectors = sphere(300, 8, 0, 2.0)
    cosines = vectors @ vectors.T
    expected = (cosines.sum() - np.trace(cosines)) / (300 * 299)
    assert geometry.mean_cosine(vectors) == pytest.approx(expected)
    assert geometry.mean_cosine(sphere(300, 8, 0, 50.0)) > 0.98


def test_uniformity_and_alignment_are_wang_and_isolas() -> None:
    vectors, others = sphere(700, 6), sphere(700, 6, 1)
    distances = pairwise_distances(vectors) ** 2
    upper = distances[np.triu_indices(700, 1)]
    assert geometry.uniformity(vectors) == pytest.approx(np.log(np.exp(-2 * upper).mean()), abs=1e-6)
    assert geometry.alignment(vectors, others) == pytest.approx(2 - 2 * np.mean(np.sum(vectors * others, axis=1)))


def test_ranks_of_known_spectra() -> None:
    random = np.random.default_rng(0)
    flat = np.concatenate([np.eye(12), -np.eye(12)])
    assert geometry.effective_rank(flat) == pytest.approx(12)
    assert geometry.dimensions_of(flat, 0.5) == 6
    line = random.normal(0, 1, (100, 1)) @ random.normal(0, 1, (1, 30))
    assert geometry.effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert geometry.dimensions_of(line) == 1
    vectors = random.normal(0, 1, (80, 10)) * np.arange(1, 11)
    assert np.allclose(geometry.spectrum(vectors), PCA().fit(vectors).explained_variance_ratio_)


def test_neighbours_are_of_other_patients() -> None:
    vectors = sphere(120, 5)
    values, patients = np.repeat(["a", "b"], 60), np.arange(120).astype(str)
    share, chance = geometry.neighbour_purity(vectors, values, patients)
    near = (
        NearestNeighbors(n_neighbors=11, metric="cosine").fit(vectors).kneighbors(vectors, return_distance=False)[:, 1:]
    )
    assert share == pytest.approx(np.mean(values[near] == values[:, None]))
    assert chance == pytest.approx(59 / 119)
    # Two identical volumes per patient: without the copy there is nothing to find.
    doubled, twice = np.repeat(vectors, 2, axis=0), np.repeat(patients, 2)
    own = np.repeat(np.arange(120).astype(str), 2)
    share, _ = geometry.neighbour_purity(doubled, own, twice)
    assert share == 0
    assert np.isnan(geometry.neighbour_purity(vectors, np.repeat("a", 120), patients)).all()
