"""The two controls: what they count, and what they can and cannot detect."""

from __future__ import annotations

import numpy as np

from ctclip.evaluation.controls import BINS, HIGHEST, histogram_aurocs, histograms, shuffled_aurocs


def test_histograms_count_every_voxel_once() -> None:
    hu = np.random.default_rng(0).integers(-1100, 3000, (4, 5, 6)).astype(np.int16)
    expected = np.histogram(hu, [*BINS, HIGHEST])[0] / hu.size
    assert np.allclose(histograms([hu])[0], expected)


def test_shuffled_labels_are_at_chance_and_the_histogram_control_can_see() -> None:
    random = np.random.default_rng(0)
    labels = (random.random((400, 6)) < 0.3).astype(float)
    scores = np.clip(labels * 0.5 + random.random((400, 6)) * 0.5, 0, 1)
    assert abs(shuffled_aurocs(labels, scores, np.arange(400)).mean() - 0.5) < 0.02
    seen = random.random((400, 8))
    seen[:, 0] += labels[:, 0] * 0.5
    values = histogram_aurocs(seen[:300], labels[:300], seen[300:], labels[300:])
    assert values[0] > 0.75
    assert abs(np.nanmean(values[1:]) - 0.5) < 0.12


def test_a_label_with_too_few_volumes_to_fit_to_is_undefined() -> None:
    random = np.random.default_rng(0)
    labels = np.zeros((40, 2))
    labels[:4, 0], labels[:20, 1] = 1, 1
    values = histogram_aurocs(random.random((40, 4)), labels, random.random((40, 4)), labels)
    assert np.isnan(values[0])
    assert np.isfinite(values[1])


def test_labels_of_one_patient_alone_cannot_be_exchanged() -> None:
    labels, scores = np.array([[0.0], [1], [1]]), np.array([[0.1], [0.2], [0.3]])
    assert np.isnan(shuffled_aurocs(labels, scores, np.array(["p", "p", "p"]), times=2)).all()
