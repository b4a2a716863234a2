"""Alignment of tokens with sentences: the loss by hand, the sentences used, and that it learns locations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ctclip.config import objective_configs
from ctclip.errors import ConfigError
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.encoded import Encoded
from ctclip.objectives.alignment import Alignment, AlignmentConfig, alignment
from ctclip.objectives.objective import Context
from tests.unit.small import REPORTS, dual_encoder, spec_of


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", ["attention", "max"])
def test_the_loss_is_that_of_loops(pool: str) -> None:
    config = AlignmentConfig(pool=pool)
    cells, vectors = numbers(3, 5, 4), numbers(3, 4, seed=1)
    kinds, owner = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 2, 1])
    unit = F.normalize(cells - cells.mean(dim=(0, 1)), dim=-1)
    words = F.normalize(vectors - vectors.mean(dim=0), dim=-1)
    total = 0.0
    for kind, own in zip(kinds.tolist(), owner.tolist(), strict=True):
        scores = []
        for volume in range(3):
            similar = unit[volume] @ words[kind]
            if pool == "max":
                scores.append(float(similar.max()) / 0.1)
            else:
                drawn = (similar / 0.25).softmax(0) @ unit[volume]
                scores.append(float(F.cosine_similarity(drawn, words[kind], dim=0)) / 0.1)
        # Volumes 0 and 2 both have wording 0: neither is a negative of the other.
        against = [v for v in range(3) if v == own or not (kind == 0 and v in (0, 2))]
        total -= scores[own] - math.log(sum(math.exp(scores[v]) for v in against))
    assert float(alignment(cells, vectors, kinds, owner, None, config)) == pytest.approx(total / 4, rel=1e-4)


def test_tokens_that_are_not_real_are_never_chosen() -> None:
    config, real = AlignmentConfig(), torch.ones(3, 6, dtype=torch.bool)
    cells, vectors = numbers(3, 6, 4), numbers(2, 4, seed=1)
    real[:, 5] = False
    kinds, owner = torch.tensor([0, 1]), torch.tensor([0, 2])
    first = alignment(cells, vectors, kinds, owner, real, config)
    cells[:, 5] = 100.0
    torch.testing.assert_close(alignment(cells, vectors, kinds, owner, real, config), first)


def test_it_learns_which_place_a_sentence_speaks_of() -> None:
    """The evidence for each sentence is in one token of its volume, at a different position each time. Positions are
    not given; after some steps that token is the most similar one to the sentence, in volumes that were never seen."""
    config, random = AlignmentConfig(), torch.Generator().manual_seed(0)
    signs, vectors = numbers(4, 24), numbers(4, 16, seed=1)
    torch.manual_seed(0)
    project = torch.nn.Linear(24, 16)
    optimizer = torch.optim.Adam(project.parameters(), 0.02)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, places = 0.3 * torch.randn(4, 10, 24, generator=random), torch.randint(10, (4,), generator=random)
        tokens[torch.arange(4), places] += signs
        return tokens, places

    def right() -> float:
        unit, hits = F.normalize(vectors - vectors.mean(dim=0), dim=-1), []
        for _ in range(50):
            tokens, places = draw()
            cells = project(tokens)
            cells = F.normalize(cells - cells.mean(dim=(0, 1)), dim=-1)
            hits.append(torch.einsum("kd,knd->kn", unit, cells).argmax(dim=1) == places)
        return float(torch.stack(hits).float().mean())

    before = right()
    for _ in range(150):
        loss = alignment(project(draw()[0]), vectors, torch.arange(4), torch.arange(4), None, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.5
    assert right() > 0.9


def test_sentences_of_reports() -> None:
    """Ids between full stops, without special tokens; sentences that state absence are excluded."""
    model = dual_encoder()
    objective = Alignment(AlignmentConfig(), Context(model))
    words = model.text_encoder.tokenizer(REPORTS, padding=True, return_tensors="pt")
    found, owners = objective._sentences(words, model.text_encoder)
    said = [model.text_encoder.tokenizer.decode(list(one)).replace(" .", ".").lower() for one in found]
    assert said == ["the heart is enlarged.", "a nodule lies in the upper lobe."]
    assert owners == [0, 1]
    every = Alignment(AlignmentConfig(positive=False), Context(model))
    assert every._sentences(words, model.text_encoder)[1] == [0, 0, 1, 2]


def test_it_is_a_switch_and_its_gradient_reaches_tokens_and_projection() -> None:
    (section,) = objective_configs({"alignment": {"weight": 0.5, "pool": "max"}}).values()
    model = dual_encoder()
    objective = Alignment(section, Context(model))
    encoded = model.volume_encoder(torch.rand(3, 1, 8, 8, 8) * 2 - 1)
    assert isinstance(encoded, Encoded)
    words = model.text_encoder.tokenizer(REPORTS, padding=True, return_tensors="pt")
    loss = objective(encoded, {name: words[name] for name in ("input_ids", "attention_mask")})
    loss.backward()
    assert 0 < float(loss.detach()) < 10
    for parameter in (
        model.volume_projection.weight,
        model.volume_encoder.stem.embed.weight,
        model.text_projection.weight,
    ):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert not list(objective.parameters())


def test_a_batch_without_a_sentence_is_no_loss() -> None:
    model = dual_encoder()
    objective = Alignment(AlignmentConfig(), Context(model))
    encoded = model.volume_encoder(torch.rand(2, 1, 8, 8, 8) * 2 - 1)
    words = model.text_encoder.tokenizer(["no effusion", "nothing"], padding=True, return_tensors="pt")
    loss = objective(encoded, {name: words[name] for name in ("input_ids", "attention_mask")})
    loss.backward()
    assert float(loss.detach()) == 0


def test_an_encoder_without_a_vector_a_token_is_refused() -> None:
    config = CTViTConfig(patch=(4, 4, 4), width=16, spatial_depth=1, temporal_depth=1, heads=2, head_width=8, quantise=False)  # fmt: skip
    model = dual_encoder(config, spec_of((8, 8, 8)))
    with pytest.raises(ConfigError, match="have no vectors of their own in the shared embedding"):
        Alignment(AlignmentConfig(), Context(model))
