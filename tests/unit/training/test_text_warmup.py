"""The text warm-up reports data that it cannot learn from."""

from __future__ import annotations

import math

import pytest
import torch

from ctclip.config import TextWarmupConfig
from ctclip.data.reports import Report
from ctclip.errors import TrainingError
from ctclip.training.text_warmup import warm_up_text
from tests.unit.small import REPORTS, dual_encoder

# One section, as in cohorts whose table has a column of whole reports; and an impression that is the same in all.
UNMATCHED = {
    "one section": [Report({"findings": text}) for text in REPORTS],
    "no impression": [Report({"findings": text, "impression": ""}) for text in REPORTS],
    "one impression": [Report({"findings": text, "impression": "See above."}) for text in REPORTS],
}


@pytest.mark.parametrize("reports", UNMATCHED.values(), ids=UNMATCHED)
def test_reports_without_two_sections_are_named(reports: list[Report], capsys: pytest.CaptureFixture[str]) -> None:
    model = dual_encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TextWarmupConfig(steps=2, batch=8)
    assert math.isnan(warm_up_text(model, reports, config, seed=0, device=torch.device("cpu")))
    said = capsys.readouterr().err
    assert said.startswith("warning: training.text_warmup ")
    assert said.count("\n") == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reports", UNMATCHED.values(), ids=UNMATCHED)
def test_a_text_side_that_has_learned_nothing_is_not_locked(reports: list[Report]) -> None:
    config = TextWarmupConfig(steps=2, batch=8, lock=True)
    with pytest.raises(TrainingError, match=r"frozen untrained.*text_warmup\.steps=0"):
        warm_up_text(dual_encoder(), reports, config, seed=0, device=torch.device("cpu"))
