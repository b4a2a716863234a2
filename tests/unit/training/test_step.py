"""The loss of a step: its negatives, the start of objectives, and the precision."""

from __future__ import annotations

import pytest
import torch

from ctclip.config import objective_configs
from ctclip.config_files import build_config
from ctclip.errors import ConfigError
from ctclip.objectives.objective import Context
from ctclip.training.step import Pairs, Part, TrainingStep
from tests.unit.small import REPORTS, dual_encoder


@pytest.mark.parametrize("by_identity", [True, False])
def test_by_position_all_but_the_own_report_are_negatives(by_identity: bool) -> None:
    """Two volumes of one scan, one of which was in an earlier batch: compared with cross-entropy over the remaining
    columns."""
    model = dual_encoder().train()
    objectives = objective_configs({"clip": {"queue": 4, "by_identity": by_identity}})
    step = TrainingStep(Context(model), objectives)
    earlier, volumes, texts = (torch.nn.functional.normalize(torch.randn(n, 12), dim=1) for n in (1, 3, 3))
    assert step.queue is not None
    step.queue.append(earlier, torch.tensor([7]), torch.tensor([1]))
    pairs = Pairs(torch.tensor([7, 7, 8]), torch.tensor([1, 1, 2]), {})
    loss, _ = step(None, pairs, (volumes, texts))
    scale, rows = model.similarity.scale().detach(), []
    left_out = {(0, 1), (1, 0), (0, 3), (1, 3)} if by_identity else set()
    for one, other in ((volumes, torch.cat([texts, earlier])), (texts, volumes)):
        for row in range(3):
            columns = [c for c in range(len(other)) if (row, c) not in left_out]
            logits = (scale * other[columns] @ one[row]).double()
            rows.append(torch.logsumexp(logits, dim=0) - logits[columns.index(row)])
    assert float(loss.detach()) == pytest.approx(float(torch.stack(rows).sum() / 3 / 2), rel=1e-5)
    # The texts of this batch are the earlier texts of the next step.
    assert step.queue.scans.tolist() == [7, 7, 7, 8]


def test_a_step_without_gradients_is_not_remembered() -> None:
    step = TrainingStep(Context(dual_encoder()), objective_configs({"clip": {"queue": 4}}))
    with torch.no_grad():
        step(None, Pairs(torch.arange(2), torch.arange(2), {}), (torch.rand(2, 12), torch.rand(2, 12)))
    assert step.queue is not None
    assert step.queue.scans.tolist() == [-1] * 4


def test_one_objective_begins_at_once() -> None:
    with pytest.raises(ConfigError, match="at least one must begin at step 0"):
        build_config({"objectives": {"clip": {"begin": 0.2}}}, "mine")
    config = build_config({"objectives": {"clip": {"begin": 0.2}, "prompts": 1}}, "mine")
    assert config.reads_labels
    assert not build_config({"objectives": {"clip": 1}}, "mine").reads_labels
    assert build_config({"data": {"rarity": 0.5}}, "mine").reads_labels


def test_encoders_run_in_bfloat16_whatever_is_around_them() -> None:
    """DeepSpeed calls the module with autocast switched off; losses are in float32 in both cases."""
    model = dual_encoder().train()
    step = TrainingStep(Context(model), objective_configs({"clip": 1}))
    part = Part(torch.rand(3, 1, 8, 8, 8) * 2 - 1, model.text_encoder.tokenise(REPORTS))
    exact = step(part)
    step.bf16 = True
    with torch.autocast("cpu", enabled=False):
        rounded = step(part)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.volume_features(part.volumes), model.text_features(part.tokens)
        loss, _ = step(part, Pairs(torch.arange(3), torch.arange(3), {}))
    pairs = zip((rounded.volumes, rounded.texts), expected, (exact.volumes, exact.texts), strict=True)
    for features, wanted, whole in pairs:
        assert torch.equal(features, wanted)
        assert not torch.equal(features.float(), whole)
    assert loss.dtype == torch.float32
