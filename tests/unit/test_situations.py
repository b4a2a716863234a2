"""The table of situations refers only to existing tests."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.situations import SITUATIONS, Situation


def has_test(one: Situation) -> bool:
    """Checked in the text of the files: collecting all tests takes half a minute."""
    path, _, name = one.test.partition("::")
    function, _, row = name.partition("[")
    text = (ROOT / path).read_text(encoding="utf-8")
    given = row.rstrip("]-")
    made_by_pytest = re.fullmatch(r"[a-z]+\d", given) is not None
    # Families of text encoders are listed in a separate file.
    lists = text + (ROOT / "tests/unit/models/families.py").read_text(encoding="utf-8")
    return f"def {function}(" in text and (made_by_pytest or given in lists)


def test_every_situation_has_its_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert [one for one in SITUATIONS if not has_test(one)] == []
    assert not has_test(SITUATIONS[0]._replace(test="tests/unit/test_launch.py::test_nothing"))
    assert len({(one.given, one.right) for one in SITUATIONS}) == len(SITUATIONS) >= 60
    with capsys.disabled():
        print(f"\n{len(SITUATIONS)} situations: python -m tests.situations")
