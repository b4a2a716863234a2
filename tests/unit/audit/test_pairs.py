"""Pairs that were exchanged have the lowest scores; the score is a likelihood ratio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal

from ctclip.audit.pairs import (
    Joint,
    contrasts,
    exchanged_alone,
    match_scores,
    pair_scores,
    share_wrong,
    side_scores,
    worse_share,
)
from ctclip.audit.sides import exchange_sides, mirrored, side_of, signed_sentences
from ctclip.data.pair_scores import good_pairs, read_pair_scores, write_pair_scores
from ctclip.errors import DataError
from ctclip.models.folder import load_model
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from tests.unit.adaptation.conftest import Clinic, clinic, clinic_files

__all__ = ["clinic", "clinic_files"]


def pairs(count: int, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy views of the same causes, mixed differently."""
    random = np.random.default_rng(seed)
    causes, mixes = random.normal(0, 1, (count, 8)), random.normal(0, 1, (2, 8, 16))
    return tuple(causes @ mix + noise * random.normal(0, 1, (count, 16)) + 3 for mix in mixes)  # type: ignore[return-value]


def test_the_score_is_the_log_likelihood_ratio_of_a_joint_normal() -> None:
    random = np.random.default_rng(0)
    covariance = np.array([[2.0, 0.3, 0.9], [0.3, 1.0, -0.2], [0.9, -0.2, 1.5]])
    sample = random.multivariate_normal([1, 2, 3], covariance, 200_000)
    joint = Joint.fit(sample[:, :2], sample[:, 2:])
    point = np.array([[0.5, 2.5, 4.0]])
    expected = (
        multivariate_normal([1, 2, 3], covariance).logpdf(point)
        - multivariate_normal([1, 2], covariance[:2, :2]).logpdf(point[:, :2])
        - multivariate_normal([3], covariance[2:, 2:]).logpdf(point[:, 2:])
    )
    assert joint.log_ratio(point[:, :2], point[:, 2:])[0] == pytest.approx(expected, abs=0.02)


def test_exchanged_pairs_are_the_worst() -> None:
    volumes, reports = pairs(1000)
    patients = np.arange(1000).astype(str)
    swapped = np.random.default_rng(1).choice(1000, 50, replace=False)
    reports[swapped] = reports[np.roll(swapped, 1)]
    share = worse_share(match_scores(volumes, reports, patients, scale=10)[0])
    assert (share[swapped] < 0.1).mean() > 0.95
    assert share.min() == pytest.approx(0.0005)


def test_the_contrast_is_the_contrastive_losss() -> None:
    random = np.random.default_rng(0)
    volumes, reports = (torch.from_numpy(random.normal(0, 1, (700, 6))) for _ in range(2))
    own, other = contrasts(volumes.numpy(), reports.numpy(), np.roll(np.arange(700), 3), 2.5)
    logits = 2.5 * volumes @ reports.T
    labels = torch.arange(700)
    loss = [torch.nn.functional.cross_entropy(side, labels, reduction="none") for side in (logits, logits.T)]
    np.testing.assert_allclose(own, -(loss[0] + loss[1]))
    assert other[5] == pytest.approx(float(logits.log_softmax(1)[5, 2] + logits.log_softmax(0)[5, 2]))


def test_pairs_without_any_relation_score_nothing() -> None:
    volumes, _ = pairs(600)
    _, others = pairs(600, seed=5)
    scores, _ = match_scores(volumes, others, np.arange(600).astype(str), scale=10)
    assert abs(scores.mean()) < 1


def test_exchanged_sides_are_the_worst() -> None:
    random = np.random.default_rng(0)
    sides = random.choice([-1.0, 1.0], (600, 1)) * random.uniform(0.3, 2, (600, 1))
    volumes, reports = (sides @ random.normal(0, 1, (1, 12)) + random.normal(0, 1, (600, 12)) for _ in range(2))
    turned = random.choice(600, 30, replace=False)
    reports[turned] *= -1
    scores, _ = side_scores(volumes, reports, np.arange(600).astype(str))
    assert (worse_share(scores)[turned] < 0.1).mean() > 0.6


def test_either_fault_lowers_the_score_as_often_as_it_occurs() -> None:
    match, side = np.array([4.0, 4.0, -3.0, 4.0, -np.inf]), np.array([4.0, np.nan, 4.0, -3.0, np.nan])
    scores = pair_scores(match, side, 0.1, 0.02)
    assert scores[0] == pytest.approx(-np.log(0.12 * np.exp(-4)))
    assert scores[1] == pytest.approx(4 - np.log(0.1))
    # If exchanged sides are rarer than swapped reports, the same evidence weighs less.
    assert scores[2] < scores[3] < scores[0]
    assert scores[4] == -np.inf


def test_half_of_the_swapped_do_not_count_as_exchanged() -> None:
    assert exchanged_alone(0.06, 0.1, 500) == pytest.approx(0.01)
    assert exchanged_alone(0.06, 0.0, 500) == 0.06
    assert exchanged_alone(0.02, 0.1, 500) == 0.002


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_the_share_of_wrong_pairs_is_seen(share: float) -> None:
    random = np.random.default_rng(0)
    is_wrong = random.random(20000) < share
    scores, wrong = 2 * random.normal(np.where(is_wrong, -1, 1.5), 1), 2 * random.normal(-1, 1, 20000)
    assert share_wrong(scores, wrong) == pytest.approx(share, abs=0.01 + 0.1 * share)


def test_scores_are_calibrated_log_odds() -> None:
    # One cause and its noisy echo: log p(x, y) / p(x) p(y) is known, and a fit with 16 dimensions of noise is
    # overconfident.
    random = np.random.default_rng(3)
    cause, noise = random.normal(0, 1, 4000), random.normal(0, 1, 4000)
    echo = 0.8 * cause + 0.6 * noise
    patients = np.arange(4000).astype(str)
    volumes, reports = (np.column_stack([side, random.normal(0, 1, (4000, 16))]) for side in (cause, echo))
    wrong = np.roll(np.arange(4000), 2000)
    scores, _ = match_scores(volumes, reports, patients, scale=10)
    mixed = reports.copy()
    swapped = random.choice(4000, 400, replace=False)
    mixed[swapped] = reports[wrong[swapped]]
    odds, _ = match_scores(volumes, mixed, patients, scale=10)
    assert -np.log(1 / (1 + np.exp(-scores))).mean() < np.log(2)
    # At odds of 9 to 1, this share of pairs is wrong among those with scores below 0.
    chances = 1 / (1 + 9 * np.exp(odds))
    assert chances.sum() == pytest.approx(400, rel=0.25)


def test_what_is_said_of_either_side(clinic: Clinic) -> None:
    assert [side_of(text) for text in ("Left effusion.", "RLL nodule.", "Left and right nodules.", "No nodule.")] == [
        1,
        -1,
        0,
        0,
    ]
    assert side_of("Two left nodules and one on the left, one right.") == 1
    model = load_model(clinic.model).model
    texts = [
        "Left effusion. Right nodule. Heart normal.",
        "Right effusion. Left nodule.",
        "Effusion.",
        "Left effusion.",
    ]
    said = signed_sentences(model, texts)
    np.testing.assert_allclose(said[1], -said[0], atol=1e-5)
    assert not said[2].any()
    assert np.linalg.norm(said, axis=1) == pytest.approx([1, 1, 0, 1])
    assert not np.allclose(said[3], said[0])


def test_sides_of_texts_and_volumes() -> None:
    text = "Left lower lobe (LLL) nodule, RIGHT effusion; right-sided port. Bright area, leftover."
    other = "Right lower lobe (RLL) nodule, LEFT effusion; left-sided port. Bright area, leftover."
    assert exchange_sides(text) == other
    assert exchange_sides(other) == text
    assert exchange_sides("No nodule.") == "No nodule."
    voxels = np.arange(24).reshape(2, 3, 4)
    spec = PreprocessingSpec("a", spacing=(1, 1, 1), shape=(2, 3, 4))
    assert mirrored(voxels, spec)[0, 0].tolist() == [3, 2, 1, 0]
    published = PreprocessingSpec("b", spacing=(1, 1, 1), shape=(2, 3, 4), published_geometry=True)
    assert mirrored(voxels, published)[0, :, 0].tolist() == [8, 4, 0]


def test_a_store_keeps_scores_and_training_leaves_out_the_worst(textures: VolumeStore, tmp_path: Path) -> None:
    store = VolumeStore.create(tmp_path / "store", textures.spec)
    table = textures.cohort.head(10)
    assert good_pairs(table, store, None, None) is table
    with pytest.raises(DataError, match="ctclip filter-pairs"):
        good_pairs(table, store, 0.0, None)
    scores = pd.DataFrame({"volume": table["volume"], "score": range(-5, 5), "worse_share": worse_share(np.arange(10))})
    write_pair_scores(store, scores.head(8))
    with pytest.raises(DataError, match="2 volumes"):
        good_pairs(table, store, 0.0, None)
    write_pair_scores(store, scores.tail(5))
    assert sorted(read_pair_scores(store)["score"]) == list(range(-5, 5))
    assert good_pairs(table, store, 0.0, None)["volume"].tolist() == table["volume"].tolist()[5:]
    assert len(good_pairs(table, store, None, 0.8)) == 8
    with pytest.raises(DataError, match="best_pairs"):
        good_pairs(table, store, 50.0, None)
