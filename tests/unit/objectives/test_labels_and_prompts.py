"""Objectives on labels: unknown labels are ignored; the objective on prompts is the cross-entropy of the detection
scores."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss

from ctclip.config import objective_configs
from ctclip.data.reports import Report
from ctclip.errors import ConfigError
from ctclip.heads.prompts import PromptHead
from ctclip.labels import labels_of_columns
from ctclip.objectives.labels import Labels, multi_label
from ctclip.objectives.objective import Context, Features
from ctclip.phantom.prevalence import FINDINGS
from ctclip.prompts import load_prompts
from ctclip.training.step import Pairs, Part, TrainingStep
from ctclip.training.text_warmup import lock_text
from tests.unit.small import REPORTS, dual_encoder

LABELS = labels_of_columns("four", FINDINGS[:4])


def test_unknown_labels_are_left_out() -> None:
    logits = torch.tensor([[0.0, 3.0], [1.0, -2.0]])
    labels = torch.tensor([[1.0, float("nan")], [0.0, float("nan")]])
    expected = (math.log(2) + math.log(1 + math.e)) / 2
    assert abs(float(multi_label(logits, labels)) - expected) < 1e-6
    logits.requires_grad_()
    multi_label(logits, torch.full((2, 2), float("nan"))).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all(), "nothing known is nothing learned, not NaN"


def test_one_known_label_counts_whole() -> None:
    labels = torch.full((3, 2), float("nan"))
    labels[1, 0] = 1.0
    logits = torch.tensor([[5.0, 5.0], [0.3, 5.0], [5.0, 5.0]])
    assert float(multi_label(logits, labels)) == pytest.approx(math.log(1 + math.exp(-0.3)), rel=1e-6)


@pytest.mark.parametrize("views", [1, 2])
def test_labels_are_read_off_both_embeddings(views: int) -> None:
    """The mean of scikit-learn's cross-entropy for volumes and for texts, each with the labels of its volume."""
    torch.manual_seed(0)
    objective = Labels(objective_configs({"labels": 1.0})["labels"], Context(dual_encoder(), LABELS))
    labels = torch.tensor([[1, 0, torch.nan, 1], [0, 0, 1, 1], [1, 1, 0, torch.nan]])
    volumes, texts = (torch.nn.functional.normalize(torch.randn(n, 12), dim=1) for n in (3, 3 * views))
    numbers = torch.arange(3)
    given = Features(
        volumes, texts, torch.tensor([4.0]), torch.tensor([0.0]), numbers, torch.arange(3 * views), slice(0, 3)
    )
    expected = []
    for embeddings, truth in ((volumes, labels), (texts, labels[numbers.repeat_interleave(views)])):
        scores = 4.0 * embeddings @ objective.classifier.weight.T + objective.classifier.bias
        known = ~truth.isnan()
        expected.append(log_loss(truth[known], scores[known].sigmoid().detach().double()))
    assert objective.classifier.weight.shape == (4, 12)
    assert float(objective(features=given, labels=labels).detach()) == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("locked", [False, True])
def test_the_loss_is_that_of_the_prompt_head(locked: bool) -> None:
    model = dual_encoder(standardise=True).train()
    if locked:
        lock_text(model, [Report({"findings": one, "impression": one}) for one in REPORTS], torch.device("cpu"))
    prompts = load_prompts("report_style")
    objectives = objective_configs({"clip": {"begin": 0.5}, "prompts": 2.0})
    step = TrainingStep(Context(model, LABELS, prompts), objectives)
    labels = torch.tensor([[1, 0, torch.nan, 1], [0, 0, 1, 1], [1, 1, 0, torch.nan]])
    known = ~labels.isnan()
    part = Part(torch.rand(3, 1, 8, 8, 8) * 2 - 1, model.text_encoder.tokenise(REPORTS))
    pairs = Pairs(torch.arange(3), torch.arange(3), {"labels": labels})
    before = model.similarity.text_standard.running_mean.clone()
    encoded = step(part)
    loss, parts = step(None, pairs, (encoded.volumes, encoded.texts))
    # Statistics of the reports are still updated; those of the prompts are not included.
    statistics = model.similarity.text_standard.running_mean.clone()
    expected = before if locked else 0.9 * before + 0.1 * encoded.texts.mean(dim=0)
    torch.testing.assert_close(statistics, expected)
    volumes = model.similarity.volume(encoded.volumes)
    model.eval()
    head = PromptHead(model, prompts, FINDINGS[:4])
    with torch.no_grad():
        probabilities = head.probabilities(head.score_embeddings(volumes))
    assert float(parts["prompts"]) == pytest.approx(
        2 * log_loss(labels[known], probabilities[known].double()), rel=1e-4
    )
    assert float(loss.detach()) == pytest.approx(float(parts["clip"]) + float(parts["prompts"]), rel=1e-5)
    loss.backward()
    assert model.volume_projection.weight.grad.abs().sum() > 0
    alone, zeroed = step(None, pairs, (encoded.volumes, encoded.texts), 0.2)
    assert float(zeroed["clip"]) == 0
    assert float(alone.detach()) == pytest.approx(float(zeroed["prompts"]))


def test_an_objective_on_labels_without_labels_is_explained() -> None:
    for name in ("labels", "prompts"):
        with pytest.raises(ConfigError, match=rf"objectives\.{name}: .*labels="):
            TrainingStep(Context(dual_encoder()), objective_configs({name: 1}))
    step = TrainingStep(Context(dual_encoder(), LABELS), objective_configs({"labels": 1}))
    with pytest.raises(ConfigError, match="needs 'labels'"):
        step(None, Pairs(torch.arange(2), torch.arange(2), {}), (torch.rand(2, 12), torch.rand(2, 12)))
