"""Objectives on words: hidden words, visible words, and gradients for all parameters in a whole step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from transformers import DataCollatorForLanguageModeling

from ctclip.config import objective_configs
from ctclip.errors import ConfigError
from ctclip.labels import labels_of_columns
from ctclip.models.encoded import Encoded
from ctclip.models.text import train_tokenizer
from ctclip.objectives.captioning import Captioning, captioning
from ctclip.objectives.mlm import MaskedWords, hide, masked_words
from ctclip.objectives.objective import Context
from ctclip.objectives.words import WordDecoder
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


def test_words_are_hidden_as_the_library_hides_them() -> None:
    """Transformers' collator may hide no word of a short text: the shares are compared on long texts."""
    tokenizer = train_tokenizer(REPORTS * 20, 200)
    known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    ids = torch.tensor(known)[torch.randint(len(known), (400, 200), generator=torch.Generator().manual_seed(0))]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=1)
    theirs = collator.torch_mask_tokens(ids.clone(), torch.zeros_like(ids))
    torch.manual_seed(1)
    ours = hide(ids, torch.ones_like(ids), tokenizer.mask_token_id, tokenizer.all_special_ids, len(tokenizer))
    for shares in (
        lambda shown, target: (target != -100).float().mean(),
        lambda shown, target: (shown[target != -100] == tokenizer.mask_token_id).float().mean(),
        lambda shown, target: (shown == target)[target != -100].float().mean(),
    ):
        assert float(shares(*ours)) == pytest.approx(float(shares(*theirs)), abs=0.015)
    short = torch.full((200, 3), known[0])
    _, target = collator.torch_mask_tokens(short.clone(), torch.zeros_like(short))
    assert not (target != -100).any(dim=1).all(), "why the objective has a rule of its own"


def test_a_short_text_has_one_word_hidden() -> None:
    _, target = hide(torch.tensor([[2, 7, 3]]), torch.ones(1, 3).long(), 4, [2, 3], 50)
    assert target.tolist() == [[-100, 7, -100]]


def test_of_the_hidden_words_one_in_ten_is_another_and_one_in_ten_is_kept() -> None:
    """Devlin et al. 2019, section 3.1; the other word is any word of the vocabulary, including the same one."""
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


def test_the_decoder_of_masked_words_has_two_layers() -> None:
    """Also for checkpoints: a run with another size could not be resumed."""
    objective = MaskedWords(objective_configs({"mlm": 1.0})["mlm"], Context(dual_encoder()))
    names = objective.state_dict()
    assert {name.split(".")[4] for name in names if name.startswith("decoder.language.transformer.h.")} == {"0", "1"}
    assert not any(name.startswith("text") for name in names), "the text encoder is the model's own"


def test_masked_words_are_scored_alone() -> None:
    """The mean loss of the decoder over hidden words, given the other words."""
    ids = torch.randint(5, 20, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 8:] = 0
    tokenizer = SimpleNamespace(mask_token_id=4, all_special_ids=[0, 1, 2, 3, 4], __len__=lambda self: 20)
    tokenizer = type("Tokenizer", (), vars(tokenizer))()
    tokens, seen = encoded(torch.randn(6, 4, 8)), {}

    def bert(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        seen.update(ids=input_ids, mask=attention_mask)
        return SimpleNamespace(last_hidden_state=input_ids.float()[..., None])

    def decoder(hidden: torch.Tensor, words: torch.Tensor, volumes: Encoded) -> torch.Tensor:
        seen.update(words=words, tokens=volumes)
        return scores

    scores = torch.randn(6, 12, 20)
    torch.manual_seed(3)
    loss = masked_words(decoder, bert, ids, mask, tokens, tokenizer)  # type: ignore[arg-type]
    torch.manual_seed(3)
    shown, target = hide(ids, mask, 4, [0, 1, 2, 3, 4], 20)
    assert torch.equal(seen["ids"], shown)
    assert torch.equal(seen["mask"], mask)
    assert torch.equal(seen["words"], mask)
    assert seen["tokens"] is tokens
    hidden = target != -100
    assert float(loss) == pytest.approx(
        log_loss(target[hidden], scores[hidden].double().softmax(dim=1), labels=list(range(20))), rel=1e-5
    )


def test_captioning_never_sees_the_word_it_writes() -> None:
    torch.manual_seed(0)
    decoder = WordDecoder(30, 8, 16).eval()
    ids, tokens = torch.randint(5, 30, (1, 10)), encoded(torch.randn(1, 4, 8))
    changed = ids.clone()
    changed[0, 6] = 4
    mask = torch.ones(1, 10).long()
    one, other = decoder(ids, mask, tokens), decoder(changed, mask, tokens)
    assert torch.allclose(one[0, :6], other[0, :6], atol=1e-6)
    assert not torch.allclose(one[0, 6:], other[0, 6:], atol=1e-3)


def test_padding_of_words_and_dropped_tokens_change_nothing() -> None:
    torch.manual_seed(0)
    decoder = WordDecoder(30, 8, 16).eval()
    ids, mask, tokens = torch.randint(5, 30, (2, 10)), torch.ones(2, 10).long(), torch.randn(2, 4, 8)
    alone = captioning(decoder, ids, mask, encoded(tokens))
    longer = torch.cat([ids, torch.zeros(2, 5).long()], dim=1), torch.cat([mask, torch.zeros(2, 5).long()], dim=1)
    real = torch.tensor([[True] * 4 + [False] * 3] * 2)
    dropped = encoded(torch.cat([tokens, torch.randn(2, 3, 8)], dim=1), real)
    padded = captioning(decoder, *longer, dropped)
    assert float(padded) == pytest.approx(float(alone), abs=1e-5)


def test_what_the_decoder_generates_is_what_it_finds_likeliest() -> None:
    """Transformers' greedy search with its cache, compared with ``forward`` one word at a time; one token dropped."""
    torch.manual_seed(0)
    decoder = WordDecoder(30, 8, 16).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    real = torch.tensor([[True] * 4, [True] * 3 + [False]])
    seen = encoded(torch.randn(2, 4, 8), real)
    start = torch.full((2, 1), 2)
    with torch.no_grad():
        written = decoder.language.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False, pad_token_id=0, **decoder.attended(seen)
        )  # fmt: skip
        expected = start
        for _ in range(12):
            scores = decoder(expected, torch.ones_like(expected), seen)[:, -1:]
            expected = torch.cat([expected, scores.argmax(dim=-1)], dim=1)
    assert torch.equal(written, expected)
    assert not torch.equal(written[0], written[1]), "the volumes differ"


def test_words_that_are_vectors_see_each_other_and_no_padding() -> None:
    torch.manual_seed(0)
    decoder, seen = WordDecoder(30, 8, 16).eval(), encoded(torch.randn(1, 4, 8))
    vectors, mask = torch.randn(1, 6, 16), torch.tensor([[1, 1, 1, 1, 0, 0]])
    scores = decoder(vectors, mask, seen)
    later, padding = vectors.clone(), vectors.clone()
    later[0, 3], padding[0, 4:] = torch.randn(16), torch.randn(2, 16)
    assert not torch.allclose(decoder(later, mask, seen)[0, 0], scores[0, 0], atol=1e-4)
    assert torch.allclose(decoder(padding, mask, seen)[0, :4], scores[0, :4], atol=1e-6)


def test_the_size_of_the_decoder_is_configured() -> None:
    sections = objective_configs({"captioning": {"weight": 0.3, "depth": 3, "heads": 4}})
    language = Captioning(sections["captioning"], Context(dual_encoder())).decoder.language
    assert (language.config.n_layer, language.config.n_head, language.config.n_embd) == (3, 4, 16)
    assert WordDecoder(30, 8, 192).language.config.n_head == 3
    assert WordDecoder(30, 8, 200).language.config.n_head == 2, "3 heads of 64 would not divide it"
    with pytest.raises(ConfigError, match=r"heads=3 does not divide .*, 16 "):
        Captioning(objective_configs({"captioning": {"heads": 3}})["captioning"], Context(dual_encoder()))


def test_a_tokenizer_without_a_mask_is_refused_at_the_start() -> None:
    model = dual_encoder()
    model.text_encoder.tokenizer.mask_token = None
    with pytest.raises(ConfigError, match=r"^objectives\.mlm: .* has no mask token") as refused:
        TrainingStep(Context(model), objective_configs({"clip": 1, "mlm": 0.3}))
    assert "\n" not in str(refused.value)


def test_whole_reports_are_what_the_tokenizer_writes() -> None:
    encoder = dual_encoder().text_encoder
    for longest in (256, 8):
        ours = encoder.whole(REPORTS, longest)
        theirs = encoder.tokenizer(REPORTS, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


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
    decoder = whole.objectives["captioning"].decoder
    with torch.no_grad():
        seen = whole.model.volume_encoder(given)
        right = captioning(decoder, *words, seen)
        wrong = captioning(decoder, *words, seen._replace(tokens=seen.tokens.flip(0)))
    assert float(right) < 0.5 * float(wrong)
