"""Figures of maps against masks, compared with scikit-learn's and with values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from ctclip.evaluation.localisation import (
    Candidate,
    Pair,
    dice_at,
    figures,
    free_response,
    histograms,
    summary,
    thresholds_of_others,
    voxel_auroc,
    voxel_average_precision,
)


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = random.random((9, 11, 13)) < 0.1
    return np.rint(np.clip(random.random(mask.shape) * 0.7 + 0.3 * mask, 0, 1) * 255) / 255, mask


@pytest.mark.parametrize("seed", range(4))
def test_voxels_as_scikit_learn_counts_them(seed: int) -> None:
    share, mask = case(seed)
    inside, outside = histograms(share, mask)
    assert voxel_auroc(inside, outside) == pytest.approx(roc_auc_score(mask.ravel(), share.ravel()))
    assert voxel_average_precision(inside, outside) == pytest.approx(
        average_precision_score(mask.ravel(), share.ravel())
    )
    dice = dice_at(inside, outside)
    for step in (30, 128, 240):
        assert dice[step] == pytest.approx(f1_score(mask.ravel(), share.ravel() >= step / 255 - 1e-9))


def test_nothing_inside_is_undefined() -> None:
    inside, outside = histograms(np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool))
    assert np.isnan(voxel_auroc(inside, outside))
    assert np.isnan(voxel_average_precision(inside, outside))


def pair(patient: str, best: int, distance: float = 0.0) -> Pair:
    """Voxels of the mask have the value ``best`` or more, the others less."""
    inside, outside = np.zeros(256, int), np.zeros(256, int)
    inside[best:], outside[:best] = 3, 5
    return Pair(patient, distance, inside, outside)


def test_a_threshold_is_never_chosen_on_its_own_patient() -> None:
    pairs = [pair("a", 200), pair("a", 200), pair("b", 60), pair("b", 60)]
    assert thresholds_of_others(pairs).tolist() == [60, 60, 200, 200]
    assert figures([pair("a", 100), pair("b", 100)])["dice"].tolist() == [1.0, 1.0]


def test_intervals_are_of_patients() -> None:
    """Twenty scans of two patients, one always right, one never: for two other patients any share is possible."""
    found = summary([pair("a", 100)] * 10 + [pair("b", 100, 9.0)] * 10)
    assert found["pointing"]["value"] == 0.5
    assert (found["pointing"]["lower"], found["pointing"]["upper"]) == (0.0, 1.0)
    assert not found["interval_trusted"]
    assert found["distance_mm"]["value"] == 4.5


def test_free_response() -> None:
    """Two scans, three lesions; ordered by value: hit, false, the same lesion again, hit, false, false."""
    candidates = [
        [Candidate(0.9, 1), Candidate(0.8, 0), Candidate(0.7, 1), Candidate(0.4, 0)],
        [Candidate(0.6, 1), Candidate(0.3, 0)],
    ]
    found = free_response(candidates, [2, 1], at=(0.0, 0.5, 1.0))
    assert found == {"0": pytest.approx(1 / 3), "0.5": pytest.approx(2 / 3), "1": pytest.approx(2 / 3)}
    # Of two candidates with the same value the false one comes first.
    assert free_response([[Candidate(0.5, 1), Candidate(0.5, 0)]], [1], at=(0.0, 1.0)) == {"0": 0.0, "1": 1.0}
