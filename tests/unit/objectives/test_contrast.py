"""Contrastive objectives against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ctclip.config import objective_configs
from ctclip.errors import ConfigError
from ctclip.objectives.clip import Clip, clip
from ctclip.objectives.convirt import ConVIRT
from ctclip.objectives.labels import Labels
from ctclip.objectives.mlm import MaskedWords
from ctclip.objectives.objective import (
    Context,
    Features,
    Objective,
    columns_needed,
    different_group,
    same_identity,
)
from ctclip.objectives.siglip import SigLIP, siglip
from ctclip.objectives.text_queue import TextQueue
from tests.unit.small import dual_encoder

EVERY = slice(None)
KINDS: dict[str, type[Objective]] = {"clip": Clip, "convirt": ConVIRT, "siglip": SigLIP}


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def objective(name: str, **settings: object) -> Objective:
    return KINDS[name](objective_configs({name: settings})[name], Context(dual_encoder()))


def features(
    volumes: torch.Tensor,
    texts: torch.Tensor,
    scans: torch.Tensor | None = None,
    wording: torch.Tensor | None = None,
    rows: slice = EVERY,
) -> Features:
    scans = torch.arange(len(volumes)) if scans is None else scans
    wording = torch.arange(len(texts)) if wording is None else wording
    return Features(volumes, texts, torch.tensor([6.0]), torch.tensor([-3.0]), scans, wording, rows)


def by_hand(volumes, texts, scale, same):
    total, n = 0.0, len(volumes)
    for i in range(n):
        rows = [math.exp(scale * float(volumes[i] @ texts[j])) for j in range(n) if j == i or not same[i, j]]
        columns = [math.exp(scale * float(volumes[j] @ texts[i])) for j in range(n) if j == i or not same[j, i]]
        right = math.exp(scale * float(volumes[i] @ texts[i]))
        total += -math.log(right / sum(rows)) - math.log(right / sum(columns))
    return total / (2 * n)


def test_clip_is_infonce_without_pairs_of_one_identity() -> None:
    volumes, texts = unit(5, 0), unit(5, 1)
    scans, wording = torch.tensor([0, 1, 0, 3, 4]), torch.tensor([9, 8, 7, 8, 6])
    same = same_identity(scans, wording, EVERY)
    assert same[0, 2]
    assert same[1, 3]
    loss = clip(volumes, texts, torch.tensor([7.0]), same)
    assert abs(float(loss) - by_hand(volumes, texts, 7.0, same)) < 1e-5
    whole = objective("clip")(features=features(volumes, texts, scans, wording), earlier_texts=None)
    assert float(whole) == pytest.approx(by_hand(volumes, texts, 6.0, same), abs=1e-5)
    by_position = objective("clip", by_identity=False)(
        features=features(volumes, texts, scans, wording), earlier_texts=None
    )
    assert float(by_position) == pytest.approx(by_hand(volumes, texts, 6.0, torch.eye(5)), abs=1e-5)


def test_identical_pairs_are_not_pushed_apart() -> None:
    volumes, texts = unit(4, 2).requires_grad_(), unit(4, 3)
    everything_same = torch.ones(4, 4, dtype=torch.bool)
    clip(volumes, texts, torch.tensor([5.0]), everything_same).backward()
    assert volumes.grad is not None
    assert volumes.grad.abs().max() == 0


@pytest.mark.parametrize("by_identity", [True, False])
def test_siglip_is_a_sum_of_sigmoids(by_identity: bool) -> None:
    volumes, texts = unit(3, 4), unit(3, 5)
    scans = torch.tensor([0, 1, 0])
    total = 0.0
    for i in range(3):
        for j in range(3):
            logit = 6.0 * float(volumes[i] @ texts[j]) - 3.0
            positive = i == j or (by_identity and scans[i] == scans[j])
            total += math.log(1 + math.exp(-logit if positive else logit))
    loss = objective("siglip", by_identity=by_identity)(features=features(volumes, texts, scans))
    assert abs(float(loss) - total / 3) < 1e-5
    if not by_identity:
        alone = siglip(volumes, texts, torch.tensor([6.0]), torch.tensor([-3.0]))
        assert abs(float(alone) - total / 3) < 1e-5


@pytest.mark.parametrize("name", list(KINDS))
def test_shares_of_rows_add_up_to_the_whole(name: str) -> None:
    """Each rank computes its own rows: their mean is the loss of the whole matrix, and the same holds for the
    gradients."""
    scans, wording = torch.tensor([0, 1, 0, 3, 4, 5]), torch.tensor([9, 8, 7, 8, 6, 5])
    given = {"earlier_texts": None} if name == "clip" else {}
    results = []
    for shares in ([slice(0, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        volumes, texts = unit(6, 0).requires_grad_(), unit(6, 1).requires_grad_()
        losses = [objective(name)(features=features(volumes, texts, scans, wording, rows), **given) for rows in shares]
        loss = torch.stack(losses).mean()
        loss.backward()
        results.append((loss.detach(), volumes.grad, texts.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", list(KINDS))
def test_views_of_a_volume_are_contrasted_one_after_the_other(name: str) -> None:
    """Two texts per volume in one batch: the mean of the losses of each alone."""
    volumes, first, second = unit(5, 0), unit(5, 1), unit(5, 2)
    both = torch.stack([first, second], dim=1).flatten(0, 1)
    wording = torch.tensor([0, 9, 1, 8, 1, 7, 2, 6, 3, 9])
    given = {"earlier_texts": None} if name == "clip" else {}
    loss = objective(name)(features=features(volumes, both, None, wording), **given)
    alone = [
        objective(name)(features=features(volumes, texts, None, wording[number::2]), **given)
        for number, texts in enumerate((first, second))
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-6, rtol=1e-6)


def test_negatives_of_a_group_alone_are_the_mean_over_groups() -> None:
    volumes, texts, scale = unit(6, 0), unit(6, 1), torch.tensor([6.0])
    groups = torch.stack([clip(volumes[i : i + 2], texts[i : i + 2], scale) for i in (0, 2, 4)]).mean()
    loss = clip(volumes, texts, scale, different_group(6, 2, EVERY, scale.device))
    torch.testing.assert_close(loss, groups, atol=1e-6, rtol=1e-6)
    whole = objective("clip", negatives=2)(features=features(volumes, texts), earlier_texts=None)
    torch.testing.assert_close(whole, groups, atol=1e-6, rtol=1e-6)


def test_convirt_weighs_the_directions() -> None:
    volumes, texts = unit(5, 0), unit(5, 1)
    logits = 6.0 * volumes @ texts.T
    right = torch.arange(5)
    expected = 0.75 * F.cross_entropy(logits, right) + 0.25 * F.cross_entropy(logits.T, right)
    loss = objective("convirt")(features=features(volumes, texts))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def test_a_queue_of_texts_gives_volumes_more_negatives() -> None:
    """Four steps of three pairs with a queue of five texts: the sum written out over the last five of a plain list."""
    queue, told = TextQueue(5, 6), []
    contrast = objective("clip", queue=5)
    for step in range(4):
        volumes, texts = unit(3, 2 * step), unit(3, 2 * step + 1)
        scans, wording = torch.tensor([step + 1, 10 + step, step]), torch.tensor([step, 20 + step % 2, 30 + step])
        same = same_identity(scans, wording, EVERY)
        loss = contrast(features=features(volumes, texts, scans, wording), earlier_texts=queue.earlier())
        total = 2 * by_hand(volumes, texts, 6.0, same) * 3
        for i in range(3):
            near = sum(math.exp(6 * float(volumes[i] @ texts[j])) for j in range(3) if j == i or not same[i, j])
            far = sum(
                math.exp(6 * float(volumes[i] @ text))
                for text, scan, words in told[-5:]
                if scan != int(scans[i]) and words != int(wording[i])
            )
            total += math.log((near + far) / near)
        assert abs(float(loss) - total / 6) < 1e-5
        queue.append(texts, scans, wording)
        told += list(zip(texts, scans.tolist(), wording.tolist(), strict=True))


def test_a_batch_longer_than_the_queue_leaves_its_last_texts() -> None:
    queue, texts = TextQueue(2, 6), unit(5, 0)
    queue.append(texts, torch.arange(5), torch.arange(5))
    assert sorted(queue.scans.tolist()) == [3, 4]
    for text, scan in zip(queue.texts, queue.scans, strict=True):
        assert torch.equal(text, texts[scan])


def test_what_a_queue_gave_out_does_not_change_with_it() -> None:
    """The backward pass of a step follows after its own texts have been appended."""
    queue = TextQueue(4, 6)
    queue.append(unit(2, 0), torch.arange(2), torch.arange(2))
    earlier = queue.earlier()
    before = [part.clone() for part in earlier]
    queue.append(unit(4, 1), torch.arange(4), torch.arange(4))
    assert all(torch.equal(one, other) for one, other in zip(earlier, before, strict=True))
    assert before[1].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("rows", [EVERY, slice(2, 4)])
def test_by_position_every_text_of_the_queue_is_a_negative(rows: slice) -> None:
    """A partly filled queue, with scans and wordings of the batch, by a rank's rows."""
    queue, earlier = TextQueue(5, 6), unit(3, 9)
    queue.append(earlier, torch.arange(3), torch.arange(3))
    volumes, texts = unit(4, 0), unit(4, 1)
    contrast = objective("clip", queue=5, by_identity=False)
    loss = contrast(features=features(volumes, texts, rows=rows), earlier_texts=queue.earlier())
    right = torch.arange(4)[rows]
    of_volumes = F.cross_entropy(6.0 * volumes[rows] @ torch.cat([texts, earlier]).T, right)
    of_texts = F.cross_entropy(6.0 * texts[rows] @ volumes.T, right)
    torch.testing.assert_close(loss, (of_volumes + of_texts) / 2)


def test_a_queue_is_used_by_whom_it_was_set_for() -> None:
    """The queue of one objective is available to all objectives."""
    queue = TextQueue(3, 6)
    queue.append(unit(3, 9), torch.tensor([7, 8, 9]), torch.tensor([7, 8, 9]))
    given = features(unit(4, 0), unit(4, 1))
    without = objective("clip")
    assert torch.equal(
        without(features=given, earlier_texts=queue.earlier()), without(features=given, earlier_texts=None)
    )
    queued = objective("clip", queue=3)
    assert queued(features=given, earlier_texts=queue.earlier()) > queued(features=given, earlier_texts=None)
    assert [one.queue_size for one in (without, queued, objective("convirt"))] == [0, 3, 0]


def test_what_is_set_by_itself() -> None:
    """Identity counts by default; a group has at least two volumes."""
    given = features(unit(3, 4), unit(3, 5), torch.tensor([0, 1, 0]))
    for name in ("clip", "siglip"):
        more = {"earlier_texts": None} if name == "clip" else {}
        usual, by_identity, by_position = (
            objective(name, **settings)(features=given, **more)
            for settings in ({}, {"by_identity": True}, {"by_identity": False})
        )
        assert usual == by_identity
        assert usual != by_position
    objective("clip", negatives=2, queue=0)
    objective("clip", queue=1)
    for wrong in ({"negatives": 1}, {"queue": -1}):
        with pytest.raises(ConfigError, match="greater than or equal"):
            objective("clip", **wrong)


def test_the_columns_an_objective_asks_for_are_what_is_not_given_anyway() -> None:
    class Masks(Objective):
        needs = ("tokens", "masks", "features", "labels", "words", "earlier_texts")

    assert columns_needed(Masks) == ("masks", "labels")
    assert columns_needed(Labels) == ("labels",)
    assert columns_needed(MaskedWords) == columns_needed(objective("clip")) == columns_needed(Objective) == ()
    with pytest.raises(TypeError, match=r"abstract method '?forward"):
        Objective(None, Context(dual_encoder()))


def test_features_and_context_cannot_be_changed() -> None:
    for given in (features(unit(2, 0), unit(2, 1)), Context(dual_encoder())):
        with pytest.raises(AttributeError, match="cannot assign"):
            given.rows = EVERY  # type: ignore[union-attr,misc]


def test_an_empty_queue_excludes_every_place() -> None:
    earlier = TextQueue(3, 6).earlier()
    assert earlier.scans.tolist() == earlier.identities.tolist() == [-1, -1, -1]
    assert earlier.excluded(torch.tensor([0, 1]), torch.tensor([5, 6])).tolist() == [[True] * 3] * 2


def test_places_are_excluded_by_scan_or_by_wording() -> None:
    queue = TextQueue(4, 6)
    queue.append(unit(3, 0), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7]))
    excluded = queue.earlier().excluded(torch.tensor([1, 9, 8]), torch.tensor([4, 7, 8]))
    assert excluded.tolist() == [[False, True, False, True], [False, False, True, True], [False, False, False, True]]


def test_the_oldest_places_are_written_over() -> None:
    queue = TextQueue(3, 6)
    for step in range(5):
        queue.append(unit(2, step).double(), torch.tensor([2 * step, 2 * step + 1]), torch.tensor([step, 50 + step]))
        newest = [scan for scan in range(2 * step + 2)][-3:]
        held = {
            scan: (wording, text)
            for scan, wording, text in zip(queue.scans.tolist(), queue.identities, queue.texts, strict=True)
        }
        assert sorted(scan for scan in held if scan >= 0) == newest
        for scan in newest:
            wording, text = held[scan]
            assert wording == (scan // 2 if scan % 2 == 0 else 50 + scan // 2)
            torch.testing.assert_close(text, unit(2, scan // 2)[scan % 2])
    assert not queue.texts.requires_grad
    assert set(queue.state_dict()) == {"texts", "scans", "identities", "next_slot"}


def test_a_queue_beside_smaller_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="set only one of the two"):
        objective("clip", queue=4, negatives=2)
