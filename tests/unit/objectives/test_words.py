"""Objectives on words: what is hidden, what may be seen, and that a whole step with them learns everywhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from ctclip.config import objective_configs
from ctclip.labels import labels_of_columns
from ctclip.models.encoded import Encoded
from ctclip.objectives.captioning import captioning
from ctclip.objectives.mlm import MaskedWords, hide, masked_words
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


def test_of_the_hidden_words_one_in_ten_is_another_and_one_in_ten_is_kept() -> None:
    """Devlin et al. 2019, section 3.1; the other word is any of the vocabulary, itself included."""
    ids = torch.full((500, 200), 9)
    torch.manual_seed(1)
    shown, target = hide(ids, torch.ones_like(ids), blank=4, special=[0, 1, 2, 3, 4], vocabulary=20)
    chosen = shown[target != -100]
    counts = torch.bincount(chosen, minlength=20) / len(chosen)
    expected = torch.full((20,), 0.1 / 20)
    expected[4] += 0.8
    expected[9] += 0.1
    assert len(counts) == 20
    assert torch.allclose(counts, expected, atol=0.01)
    assert counts.min() > 0.003, "from the first word to the last"
    assert len(chosen) / ids.numel() == pytest.approx(0.15, abs=0.005)
    # Few words beyond: a text of three words has 1 - 0.85^3 with a word below 0.15, and exactly one elsewhere.
    ids = torch.full((20000, 3), 9)
    several = (hide(ids, torch.ones_like(ids), 4, [0], 20)[1] != -100).sum(dim=1)
    assert several.min() == 1
    for count, share in ((2, 3 * 0.15**2 * 0.85), (3, 0.15**3)):
        assert (several == count).float().mean() == pytest.approx(share, abs=0.005)


def test_a_text_without_words_has_none_hidden() -> None:
    ids = torch.tensor([[2, 3, 0], [2, 7, 3]])
    shown, target = hide(ids, (ids != 0).long(), 4, [2, 3], 50)
    assert (target[0] == -100).all()
    assert torch.equal(shown[0], ids[0])


def test_the_predictor_of_masked_words_has_two_layers() -> None:
    """Of checkpoints, too: of another size a run could not be resumed."""
    objective = MaskedWords(objective_configs({"mlm": 1.0})["mlm"], Context(dual_encoder()))
    names = objective.state_dict()
    assert {name.split(".")[3] for name in names if name.startswith("predictor.layers.layers.")} == {"0", "1"}
    assert not any(name.startswith("text") for name in names), "the text encoder is the model's own"


def test_masked_words_are_scored_alone() -> None:
    """The mean over hidden words of what is written by the predictor, which is shown the rest."""
    ids = torch.randint(5, 20, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 8:] = 0
    tokenizer = SimpleNamespace(mask_token_id=4, all_special_ids=[0, 1, 2, 3, 4], __len__=lambda self: 20)
    tokenizer = type("Tokenizer", (), vars(tokenizer))()
    tokens, seen = encoded(torch.randn(6, 4, 8)), {}

    def bert(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        seen.update(ids=input_ids, mask=attention_mask)
        return SimpleNamespace(last_hidden_state=input_ids.float()[..., None])

    def predictor(hidden: torch.Tensor, padding: torch.Tensor, volumes: Encoded) -> torch.Tensor:
        seen.update(padding=padding, tokens=volumes)
        return scores

    scores = torch.randn(6, 12, 20)
    torch.manual_seed(3)
    loss = masked_words(predictor, bert, ids, mask, tokens, tokenizer)  # type: ignore[arg-type]
    torch.manual_seed(3)
    shown, target = hide(ids, mask, 4, [0, 1, 2, 3, 4], 20)
    assert torch.equal(seen["ids"], shown)
    assert torch.equal(seen["mask"], mask)
    assert torch.equal(seen["padding"], mask == 0)
    assert seen["tokens"] is tokens
    hidden = target != -100
    assert float(loss) == pytest.approx(
        log_loss(target[hidden], scores[hidden].double().softmax(dim=1), labels=list(range(20))), rel=1e-5
    )


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
