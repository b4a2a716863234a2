"""Contrast of sentences with volumes: the loss by loops and by hand, and how the sentences are encoded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from ctclip.config import objective_configs
from ctclip.data.reports import Report, sentence_numbers, stated_sentences
from ctclip.errors import ConfigError
from ctclip.objectives.objective import Context, Features
from ctclip.objectives.sentences import Sentences, SentencesConfig, sentence_contrast
from ctclip.training.step import Pairs, TrainingStep
from ctclip.training.text_warmup import lock_text
from tests.unit.small import REPORTS, dual_encoder

SAID = stated_sentences([Report({"findings": text}) for text in REPORTS])
TEXTS = tuple(sorted({sentence for said in SAID for sentence in said}))
NUMBERS = torch.from_numpy(sentence_numbers(SAID, TEXTS))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def given(volumes: torch.Tensor) -> Features:
    count = torch.arange(len(volumes))
    return Features(volumes, volumes, torch.tensor([4.0]), torch.tensor([0.0]), count, count, slice(0, len(volumes)))


def objective(locked: bool = False) -> Sentences:
    model = dual_encoder(standardise=True).train()
    if locked:
        lock_text(model, [Report({"findings": text}) for text in REPORTS], torch.device("cpu"))
    return Sentences(SentencesConfig(), Context(model, sentences=TEXTS))


def in_loops(volumes: np.ndarray, vectors: np.ndarray, numbers: np.ndarray, same: float, other: float) -> float:
    """One sentence after the other, in float64."""
    places = [(volume, place) for volume, place in np.ndindex(numbers.shape) if numbers[volume, place] >= 0]
    vectors = vectors - np.mean([vectors[place] for place in places], axis=0)
    losses = []
    for one in places:
        positive, negative = [], []
        for volume in range(len(volumes)):
            cosines = [
                vectors[one] @ vectors[two] / np.linalg.norm(vectors[one]) / np.linalg.norm(vectors[two])
                for two in places if two[0] == volume
            ]  # fmt: skip
            logit = vectors[one] @ volumes[volume] / np.linalg.norm(vectors[one]) / 0.1
            if max(cosines, default=-1) >= same - 1e-9:
                positive.append(logit)
            elif max(cosines, default=-1) < other:
                negative.append(logit)
        if negative:
            losses.append(logsumexp(positive + negative) - logsumexp(positive))
    return float(np.mean(losses))


@pytest.mark.parametrize(
    "stated",
    [
        pytest.param([[0, 1, 2], [3, 0, -1], [4, -1, -1], [-1, -1, -1], [5, 6, 1]], id="none in one"),
        pytest.param([[0, 1, 2], [3, 0, -1], [4, 0, -1], [0, -1, -1], [5, 6, 0]], id="one in all"),
    ],
)
@pytest.mark.parametrize(("same", "other"), [(0.75, 0.75), (0.5, 0.1), (1.0, -0.2)])
def test_the_loss_is_that_of_loops(same: float, other: float, stated: list[list[int]]) -> None:
    numbers = torch.tensor(stated)
    volumes, vectors = unit(5, 4), normal(7, 4, seed=1)[numbers]
    # The embedding where there is no sentence is arbitrary.
    vectors[numbers < 0] = torch.tensor([-30.0, 30.0, -30.0, 30.0])
    found = sentence_contrast(volumes, vectors, numbers, SentencesConfig(same=same, other=other))
    expected = in_loops(volumes.double().numpy(), vectors.double().numpy(), numbers.numpy(), same, other)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_three_volumes_by_hand() -> None:
    """Two volumes state one thing and the third another. The centred sentences are +e, +e and -e."""
    volumes = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    vectors = torch.tensor([[[2.0, 5.0]], [[2.0, 5.0]], [[-1.0, 5.0]]])
    found = sentence_contrast(volumes, vectors, torch.tensor([[0], [0], [1]]), SentencesConfig(temperature=0.5))
    two = math.log(1 + math.exp(-2) / (math.exp(2) + math.exp(1.2)))
    third = math.log(1 + (math.exp(-2) + math.exp(-1.2)) / math.exp(2))
    assert float(found) == pytest.approx((2 * two + third) / 3, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("numbers", [[[0], [0], [0]], [[-1], [-1], [-1]]])
def test_nothing_to_tell_volumes_apart_is_no_loss(numbers: list[list[int]]) -> None:
    """The same sentence in every report, whose centred embeddings are zero, and reports without a known sentence."""
    volumes = unit(3, 4).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        loss = sentence_contrast(volumes, torch.ones(3, 1, 4), torch.tensor(numbers), SentencesConfig())
        loss.backward()
    assert float(loss.detach()) == 0
    assert volumes.grad is not None
    assert (volumes.grad == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_gradient_is_finite_where_reports_have_fewer_sentences() -> None:
    volumes = unit(3, 4).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        sentence_contrast(volumes, normal(3, 2, 4), NUMBERS, SentencesConfig()).backward()
    assert volumes.grad is not None
    assert volumes.grad.abs().sum() > 0


@pytest.mark.parametrize("locked", [False, True])
def test_sentences_are_encoded_as_prompts(locked: bool) -> None:
    found = objective(locked)
    (model,) = found.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    volumes = unit(3, 12).requires_grad_()
    loss = found(given(volumes), NUMBERS)
    loss.backward()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()), "the text side learns from reports alone"
    model.eval()
    with torch.no_grad():
        vectors = torch.stack([model.encode_prompts([text])[0] for text in TEXTS])
    expected = sentence_contrast(volumes.detach(), vectors[NUMBERS.clamp(min=0)], NUMBERS, SentencesConfig())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_dropout_does_not_change_the_sentences() -> None:
    found = objective()
    for module in found.model[0].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert torch.equal(found._vectors(NUMBERS), found._vectors(NUMBERS))


def test_a_text_encoder_that_learns_is_followed() -> None:
    found = objective()
    first = found._vectors(NUMBERS)
    with torch.no_grad():
        found.model[0].text_projection.weight.mul_(2)
    torch.testing.assert_close(found._vectors(NUMBERS), 2 * first)


def test_a_locked_text_encoder_is_read_once_and_afresh() -> None:
    """Whatever the text encoder remembers from earlier steps, so that a resumed run has the same sentences."""
    one, other = objective(locked=True), objective(locked=True)
    expected = one._vectors(NUMBERS)
    encoder = other.model[0].text_encoder
    remembered = {key: value + 0.1 for key, value in encoder.known.items()}
    encoder.known = remembered
    assert torch.equal(other._vectors(NUMBERS), expected)
    assert encoder.known is remembered
    encoder.tokenise = None  # type: ignore[method-assign, assignment]
    assert torch.equal(other._vectors(NUMBERS), expected)


def test_thresholds_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"other=0\.8 must not be above same=0\.75"):
        objective_configs({"sentences": {"other": 0.8}})


def test_a_step_passes_the_sentences_of_the_batch() -> None:
    """The weighted objective in a step, whose text encoder learns from the reports at the same time."""
    model = dual_encoder().train()
    step = TrainingStep(Context(model, sentences=TEXTS), objective_configs({"clip": 1, "sentences": 3}))
    assert step.columns == ("sentences",)
    volumes, texts = normal(3, 12).requires_grad_(), normal(3, 12, seed=1)
    pairs = Pairs(torch.arange(3), torch.arange(3), {"sentences": NUMBERS})
    loss, parts = step(None, pairs, (volumes, texts))
    (alone,) = (one for one in step.objectives.values() if isinstance(one, Sentences))
    wanted = 3 * alone(given(torch.nn.functional.normalize(volumes.detach(), dim=1)), NUMBERS)
    assert float(parts["sentences"]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(parts["clip"]) + float(wanted), rel=1e-5)
