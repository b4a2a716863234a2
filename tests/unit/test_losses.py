"""Objectives against sums written out by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ctclip import losses
from ctclip.training.memory import TextMemory


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


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
    same = losses.same_identity(scans, wording)
    assert same[0, 2]
    assert same[1, 3]
    found = losses.clip(volumes, texts, torch.tensor([7.0]), same)
    assert abs(float(found) - by_hand(volumes, texts, 7.0, same)) < 1e-5


def test_identical_pairs_are_not_pushed_apart() -> None:
    volumes, texts = unit(4, 2).requires_grad_(), unit(4, 3)
    everything_same = torch.ones(4, 4, dtype=torch.bool)
    losses.clip(volumes, texts, torch.tensor([5.0]), everything_same).backward()
    assert volumes.grad.abs().max() == 0


def test_siglip_is_a_sum_of_sigmoids() -> None:
    volumes, texts = unit(3, 4), unit(3, 5)
    found = losses.siglip(volumes, texts, torch.tensor([4.0]), torch.tensor([-2.0]))
    total = 0.0
    for i in range(3):
        for j in range(3):
            logit = 4.0 * float(volumes[i] @ texts[j]) - 2.0
            total += math.log(1 + math.exp(-logit if i == j else logit))
    assert abs(float(found) - total / 3) < 1e-5


def test_shares_of_rows_add_up_to_the_whole() -> None:
    """What ranks compute, each its rows: the mean is the loss of the whole matrix, and so are the gradients."""
    same = losses.same_identity(torch.tensor([0, 1, 0, 3, 4, 5]), torch.tensor([9, 8, 7, 8, 6, 5]))
    for objective in (losses.clip, losses.convirt, losses.siglip):
        given = (torch.tensor([6.0]), torch.tensor([-3.0])) if objective is losses.siglip else (torch.tensor([6.0]),)
        found = []
        for shares in ([slice(0, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
            volumes, texts = unit(6, 0).requires_grad_(), unit(6, 1).requires_grad_()
            loss = sum(objective(volumes, texts, *given, same[rows], rows) for rows in shares) / len(shares)
            loss.backward()
            found.append((loss.detach(), volumes.grad, texts.grad))
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-6), objective


def test_negatives_of_a_group_alone_are_the_mean_over_groups() -> None:
    from ctclip.training.step import _apart

    volumes, texts, scale = unit(6, 0), unit(6, 1), torch.tensor([7.0])
    found = losses.clip(volumes, texts, scale, _apart(6, 2, slice(None), scale.device))
    groups = [losses.clip(volumes[i : i + 2], texts[i : i + 2], scale) for i in (0, 2, 4)]
    assert torch.allclose(found, torch.stack(groups).mean(), atol=1e-6)


def test_convirt_weighs_the_directions() -> None:
    volumes, texts, scale = unit(5, 0), unit(5, 1), torch.tensor([7.0])
    logits = 7.0 * volumes @ texts.T
    right = torch.arange(5)
    expected = 0.75 * F.cross_entropy(logits, right) + 0.25 * F.cross_entropy(logits.T, right)
    assert torch.allclose(losses.convirt(volumes, texts, scale), expected, atol=1e-6)


def test_unknown_labels_are_left_out() -> None:
    logits = torch.tensor([[0.0, 3.0], [1.0, -2.0]])
    labels = torch.tensor([[1.0, float("nan")], [0.0, float("nan")]])
    expected = (math.log(2) + math.log(1 + math.e)) / 2
    assert abs(float(losses.multi_label(logits, labels)) - expected) < 1e-6


def test_a_memory_of_texts_gives_volumes_more_negatives() -> None:
    """Four steps of three pairs with a memory of five texts: the sum written out over the last five of a plain list."""
    memory, told = TextMemory(5, 6), []
    for step in range(4):
        volumes, texts = unit(3, 2 * step), unit(3, 2 * step + 1)
        scans, wording = torch.tensor([step + 1, 10 + step, step]), torch.tensor([step, 20 + step % 2, 30 + step])
        same = losses.same_identity(scans, wording)
        found = losses.clip(
            volumes, texts, torch.tensor([7.0]), same, further=(memory.texts.clone(), memory.left_out(scans, wording))
        )
        total = 2 * by_hand(volumes, texts, 7.0, same) * 3
        for i in range(3):
            near = sum(math.exp(7 * float(volumes[i] @ texts[j])) for j in range(3) if j == i or not same[i, j])
            far = sum(
                math.exp(7 * float(volumes[i] @ text))
                for text, scan, words in told[-5:]
                if scan != int(scans[i]) and words != int(wording[i])
            )
            total += math.log((near + far) / near)
        assert abs(float(found) - total / 6) < 1e-5
        memory.remember(texts, scans, wording)
        told += list(zip(texts, scans.tolist(), wording.tolist(), strict=True))


def test_a_batch_longer_than_the_memory_leaves_its_last_texts() -> None:
    memory, texts = TextMemory(2, 6), unit(5, 0)
    memory.remember(texts, torch.arange(5), torch.arange(5))
    assert sorted(memory.scans.tolist()) == [3, 4]
    for text, scan in zip(memory.texts, memory.scans, strict=True):
        assert torch.equal(text, texts[scan])
