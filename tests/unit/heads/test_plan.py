"""The plan of a caption head predicts what is stated, and a side only if it is certain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctclip.adaptation.plan import FOLDS, _certain, _folds, _held_out, _regression, fit_plan
from ctclip.heads.plan import NEVER, PARTS, Plan, plan_features
from ctclip.models.encoded import Encoded
from ctclip.models.pooling import at_tokens

NAMES = ("Effusion", "Nodule")


@pytest.fixture(scope="module")
def fitted() -> tuple[Plan, torch.Tensor, torch.Tensor]:
    """Two features show an effusion and its side; a nodule is visible, but not its side."""
    random = torch.Generator().manual_seed(0)
    left, right, nodule, guess = (torch.rand(600, generator=random) < 0.4 for _ in range(4))
    stated = torch.zeros(600, len(NAMES), PARTS)
    stated[:, 0, 0] = (left | right).float()
    stated[:, 0, 1:] = torch.stack([left & ~right, right & ~left, left & right], dim=1).float()
    stated[:, 1, 0] = nodule.float()
    stated[:, 1, 1:3] = torch.stack([nodule & guess, nodule & ~guess], dim=1).float()
    stated[:7, 1] = float("nan")
    noise = 0.2 * torch.randn(600, 8, generator=random)
    features = noise + torch.nn.functional.pad(torch.stack([left, right, left & right, nodule], dim=1).float(), (0, 4))
    return fit_plan(NAMES, features, stated, np.arange(600).astype(str)), features, stated


def test_findings_and_their_sides(fitted: tuple[Plan, torch.Tensor, torch.Tensor]) -> None:
    plan, features, stated = fitted
    logits = plan(features)
    there = [{NAMES[i] for i in range(2) if row[i, 0] == 1} for row in stated]
    found = [set(each) for each in plan.findings(logits)]
    assert np.mean([a == b for a, b in zip(there[7:], found[7:], strict=True)]) > 0.95
    sides = plan.sides(logits)
    told = [
        (row, side) for row, known in enumerate(sides) if (side := known.get("Effusion")) and "Effusion" in there[row]
    ]
    assert len(told) > 300
    truth = {"left": 1, "right": 2, "both": 3}
    assert np.mean([stated[row, 0, truth[side]] == 1 for row, side in told]) > 0.96
    assert not any("Nodule" in known for known in sides), "which side a nodule is on was a guess"


def test_thresholds_come_from_volumes_that_the_regression_has_not_seen() -> None:
    """With as many features as volumes, those that were seen are always told apart, others are not."""
    random = torch.Generator().manual_seed(0)
    features, stated = torch.randn(60, 60, generator=random), torch.zeros(60, 1, PARTS)
    stated[::2, 0, 0] = 1
    patients = np.repeat(np.arange(20), 3).astype(str)
    folds = torch.from_numpy(_folds(patients, 0))
    logits = _held_out(features, stated[:, 0], folds, 1e-2)
    for fold in range(FOLDS):
        own = folds == fold
        weight, bias = _regression(features[~own], stated[~own, 0], torch.full((PARTS,), 1e-2))
        torch.testing.assert_close(logits[own], features[own] @ weight.T + bias)
    plan = fit_plan(("Effusion",), features, stated, patients)
    found = plan(features)[:, 0, 0].detach() >= plan.thresholds[0]
    # Seen, a threshold between the classes would be right for all.
    assert (found == stated[:, 0, 0].bool()).float().mean() < 0.9


def test_volumes_of_a_patient_are_in_one_fold() -> None:
    patients = np.repeat(np.arange(50), 2).astype(str)
    folds = _folds(patients, 0)
    assert sorted(set(folds.tolist())) == list(range(FOLDS))
    assert (folds[::2] == folds[1::2]).all()
    assert np.bincount(folds).tolist() == [20] * FOLDS
    assert _folds(np.array(["a", "a", "b"]), 0).tolist() == [0, 1, 2]


def test_a_side_that_is_less_likely_than_not_is_never_certain() -> None:
    """All sides are right, though none reaches half of the finding's probability."""
    logits = torch.full((40, 1, PARTS), -9.0)
    logits[:, 0, 0] = 4.0
    logits[:, 0, 1] = torch.linspace(-1.5, -0.5, 40)
    stated = torch.zeros(40, 1, PARTS)
    stated[:, 0, :2] = 1
    assert _certain(logits, stated) == [NEVER]
    assert _certain(logits + torch.tensor([0.0, 3.0, 0.0, 0.0]), stated)[0] < 1


def test_finer_cells_are_pooled_at_the_place_of_their_token() -> None:
    cells = torch.rand(2, 3, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    pooled = at_tokens([cells, cells[:, :1]], (2, 3, 4))
    assert pooled.shape == (2, 24, 8)
    block = cells.numpy()[1, :, 2:4, 4:6, 2:4].reshape(3, -1)
    token = 1 * 12 + 2 * 4 + 1
    assert pooled[1, token].tolist() == pytest.approx(
        [*block.mean(axis=1), *block.max(axis=1), block[0].mean(), block[0].max()], rel=1e-6
    )


def test_features_keep_the_halves_apart() -> None:
    tokens = torch.zeros(1, 2 * 3 * 5, 4)
    tokens.view(1, 2, 3, 5, 4)[0, 1, 2, 4] = 1.0
    encoded = Encoded(tokens, (2, 3, 5), torch.zeros(1, 4), np.eye(4))
    pooled, low_mean, low_largest, high_mean, high_largest = plan_features(encoded, 2).unflatten(1, (5, 4))[0]
    assert not pooled.any()
    assert not low_mean.any()
    assert not low_largest.any()
    assert high_mean.tolist() == pytest.approx([1 / 18] * 4)
    assert high_largest.tolist() == [1.0] * 4
    assert plan_features(encoded._replace(local=tokens.repeat(1, 1, 2)), 2).shape == (1, 4 + 4 * 12)
