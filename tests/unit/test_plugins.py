"""A class of somebody's own stands in for one of ours only if it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from ctclip import plugins
from ctclip.errors import ConfigError

INCOMPLETE = """
from ctclip.heads.head import Head
from ctclip.models.encoded import VolumeEncoder
from ctclip.objectives.objective import Objective

class MyHead(Head):
    kind = "mine"
    def score(self, encoded): ...

class MyEncoder(VolumeEncoder): ...

class MyObjective(Objective): ...

def function(): ...
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "incomplete_plugin.py").write_text(INCOMPLETE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("kind", get_args(plugins.Kind))
def test_ours_are_whole(kind: plugins.Kind) -> None:
    for name, address in plugins.OURS[kind].items():
        assert plugins.find(kind, address) is plugins.find(kind, name)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("head", "MyHead", "every head needs load, save, which this one lacks"),
        ("encoder", "MyEncoder", "every encoder needs forward, which"),
        ("objective", "MyObjective", "every objective needs forward, which"),
        ("objective", "function", "not a class, so no objective"),
    ],
)
def test_what_lacks_a_method_is_refused_in_one_line(kind: plugins.Kind, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"'incomplete_plugin:{name}': {reason}") as error:
        plugins.find(kind, f"incomplete_plugin:{name}")
    assert "\n" not in str(error.value)
