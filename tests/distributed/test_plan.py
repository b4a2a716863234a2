"""`ctclip train --plan` against the memory that DeepSpeed's steps are measured to take."""

from __future__ import annotations

import pytest

from tests.benchmarks.common import apart
from tests.benchmarks.training import GIVEN_BACK


def test_the_plan_is_within_a_fifth_of_measured_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN_BACK.items():
        monkeypatch.setenv(name, value)
    found = apart("tests.benchmarks.training", "memory", 24, 1, threads=1)
    assert found["measured"] > 0.2
    assert found["planned"] == pytest.approx(found["measured"], rel=0.2)
