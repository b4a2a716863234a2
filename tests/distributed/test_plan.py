"""`ctclip train --plan` compared with torch's allocator and operation counter for DeepSpeed's steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.benchmarks.training import WORDS, ranked

pytestmark = pytest.mark.integration

CASES = list(itertools.product(("contrastive", "words"), (0, 1, 3)))


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], dict[str, float]]:
    """Two ranks, 8 volumes each; ``words``: also captioning and masked words."""
    settings = {"kind": "memory", "share": 8, "objectives": [{}, WORDS], "stages": [0, 1, 3]}
    return dict(zip(CASES, ranked(2, settings), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_a_fifth_of_measured_memory(found: Any, case: tuple[str, int]) -> None:
    assert found[case]["planned"] == pytest.approx(found[case]["allocated"], rel=0.2)


@pytest.mark.parametrize("kind", ["contrastive", "words"])
def test_the_plan_is_within_a_fifth_of_counted_operations(found: Any, kind: str) -> None:
    assert found[kind, 0]["planned_flops"] == pytest.approx(found[kind, 0]["flops"], rel=0.2)


def test_objectives_on_words_cost_more_than_the_bar(found: Any) -> None:
    """A plan that omitted them would fail."""
    assert found["words", 1]["allocated"] > 1.5 * found["contrastive", 1]["allocated"]
    assert found["words", 1]["flops"] > 1.3 * found["contrastive", 1]["flops"]
