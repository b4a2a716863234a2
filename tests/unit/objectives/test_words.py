"""Objectives on words: what is hidden, what may be seen, and that a whole step with them learns everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctclip.config import objective_configs
from ctclip.labels import labels_of_columns
from ctclip.models.encoded import Encoded
from ctclip.objectives.captioning import captioning
from ctclip.objectives.mlm import hide
from ctclip.objectives.objective import Context
from ctclip.objectives.words import WordPredictor
from ctclip.phantom.prevalence import FINDINGS
from ctclip.training.step import Pairs, Part, TrainingStep
from tests.unit.small import dual_encoder

REPORTS = ["The heart is enlarged. No nodule is seen.", "A nodule lies in the upper lobe. There is no effusion."]
LABELS = labels_of_columns("three", FINDINGS[:3])


def step(**objectives: Any) -> TrainingStep:
    return TrainingStep(Context(dual_encoder().train(), LABELS), objective_configs(objectives))


def encoded(tokens: torch.Tensor, real: torch.Tensor | None = None) -> Encoded:
    """Tokens (B, N, C) in a row."""
    return Encoded(tokens, (tokens.shape[1], 1, 1), tokens.mean(dim=1), np.eye(4), real)


def part_of(whole: TrainingStep, volumes: torch.Tensor) -> Part:
    return Part(volumes, whole.model.text_encoder.tokenise(REPORTS), whole.words(REPORTS), columns={})


def test_words_alone_are_hidden_as_often_as_bert_does() -> None:
    ids = torch.full((400, 100), 9)
    ids[:, 0], ids[:, 60:] = 2, 0
    mask = (ids != 0).long()
    torch.manual_seed(0)
    shown, target = hide(ids, mask, blank=4, special=[0, 1, 2, 3, 4], vocabulary=50)
    chosen = target != -100
    assert not chosen[:, 0].any()
    assert not chosen[:, 60:].any()
    assert chosen.any(dim=1).all()
    assert chosen[:, 1:60].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (shown[chosen] == 4).float().mean() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert torch.equal(target[chosen], ids[chosen])


def test_a_short_text_has_one_word_hidden() -> None:
    _, target = hide(torch.tensor([[2, 7, 3]]), torch.ones(1, 3).long(), 4, [2, 3], 50)
    assert target.tolist() == [[-100, 7, -100]]


def test_captioning_never_sees_the_word_it_writes() -> None:
    torch.manual_seed(0)
    predictor = WordPredictor(30, 8, None, 16, 2).eval()
    ids, tokens = torch.randint(5, 30, (1, 10)), encoded(torch.randn(1, 4, 8))
    changed = ids.clone()
    changed[0, 6] = 4
    padding = torch.zeros(1, 10, dtype=torch.bool)
    one, other = predictor(ids, padding, tokens), predictor(changed, padding, tokens)
    assert torch.allclose(one[0, :6], other[0, :6], atol=1e-6)
    assert not torch.allclose(one[0, 6:], other[0, 6:], atol=1e-3)


def test_padding_of_words_and_dropped_tokens_change_nothing() -> None:
    torch.manual_seed(0)
    predictor = WordPredictor(30, 8, None, 16, 2).eval()
    ids, mask, tokens = torch.randint(5, 30, (2, 10)), torch.ones(2, 10).long(), torch.randn(2, 4, 8)
    alone = captioning(predictor, ids, mask, encoded(tokens))
    longer = torch.cat([ids, torch.zeros(2, 5).long()], dim=1), torch.cat([mask, torch.zeros(2, 5).long()], dim=1)
    real = torch.tensor([[True] * 4 + [False] * 3] * 2)
    dropped = encoded(torch.cat([tokens, torch.randn(2, 3, 8)], dim=1), real)
    padded = captioning(predictor, *longer, dropped)
    assert float(padded) == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("labels_alone", [False, True])
def test_every_parameter_learns_from_all_objectives_at_once(labels_alone: bool) -> None:
    whole = step(clip={"begin": 0.5}, captioning=0.5, mlm=0.5, labels=1)
    columns = {"labels": torch.tensor([[0.0, 1, 1], [1, 0, float("nan")]])}
    pairs = Pairs(torch.arange(2), torch.arange(2), columns)
    loss, parts = whole(part_of(whole, torch.rand(2, 1, 8, 8, 8)), pairs, progress=0.1 if labels_alone else 0.5)
    loss.backward()
    assert [name for name, p in whole.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {"clip", "captioning", "mlm", "labels"} <= set(parts)
    assert (float(parts["clip"]) == 0) is labels_alone
    assert float(loss) == pytest.approx(sum(float(parts[n]) for n in ("clip", "captioning", "mlm", "labels")), rel=1e-5)


def test_a_volume_helps_to_write_its_report() -> None:
    """Two volumes that look different, two reports: after some steps each volume explains its own report better."""
    whole = step(clip=1, captioning=1)
    given = torch.stack([torch.full((1, 8, 8, 8), -0.5), torch.full((1, 8, 8, 8), 0.5)])
    optimizer = torch.optim.Adam(whole.parameters(), lr=3e-3)
    part, pairs = part_of(whole, given), Pairs(torch.arange(2), torch.arange(2), {})
    for _ in range(60):
        optimizer.zero_grad()
        whole(part, pairs)[0].backward()
        optimizer.step()
    assert part.words is not None
    words = part.words["input_ids"], part.words["attention_mask"]
    predictor = whole.objectives["captioning"].predictor
    with torch.no_grad():
        seen = whole.model.volume_encoder(given)
        right = captioning(predictor, *words, seen)
        wrong = captioning(predictor, *words, seen._replace(tokens=seen.tokens.flip(0)))
    assert float(right) < 0.5 * float(wrong)
