"""Classes and modules of users: found, or refused in one line that names the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from ctclip import cli, plugins
from ctclip.errors import ConfigError
from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.cohorts import read_cohort

OWN = """
from ctclip.heads.head import Head
from ctclip.models.encoded import VolumeEncoder
from ctclip.objectives.objective import Objective

class Whole(Head):
    kind = "mine"
    def score(self, encoded): ...
    def save(self, folder): ...
    @classmethod
    def load(cls, folder, model): ...

class PartOfAHead(Head):
    kind = "mine"
    def score(self, encoded): ...

class PartOfAnEncoder(VolumeEncoder): ...

class PartOfAnObjective(Objective): ...

class Other: ...

def function(): ...

number = 3

def read(root): return [1, 2]
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("someones_own.py").write_text(OWN)
    Path("needs_more.py").write_text("import no_such_library\n")
    Path("broken.py").write_text("import math\nmath.no_such_function\n")


@pytest.mark.parametrize("kind", get_args(plugins.Kind))
def test_ours_are_whole(kind: plugins.Kind) -> None:
    for name, address in plugins.OURS[kind].items():
        assert plugins.find(kind, address) is plugins.find(kind, name)


def test_a_whole_class_is_found() -> None:
    assert plugins.find("head", "someones_own:Whole").__name__ == "Whole"


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("head", "PartOfAHead", "a head also needs load, save"),
        ("encoder", "PartOfAnEncoder", "an encoder also needs forward"),
        ("objective", "PartOfAnObjective", "an objective also needs forward"),
        ("encoder", "Whole", "not an encoder; derive a class from ctclip.models.encoded.VolumeEncoder"),
        ("objective", "Other", "not an objective; derive a class from ctclip.objectives.objective.Objective"),
        ("head", "function", "not a head; derive a class from ctclip.heads.head.Head"),
        ("head", "number", "not a head"),
        ("head", "missing", "the module 'someones_own' has no 'missing'"),
        ("head", "", "write your own class as module:Name"),
    ],
)
def test_what_is_no_whole_class_of_its_kind_is_one_line(kind: plugins.Kind, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"'someones_own:{name}': {reason}") as error:
        plugins.find(kind, f"someones_own:{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["no_such_module", "someones_own.part", "no_such_module.part"])
def test_a_module_that_is_not_there_is_one_line(module: str, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=f"there is no module '{module}'"):
        plugins.find("head", f"{module}:Whole")
    assert cli.main(["models", "--plugin", module]) == 2
    assert capsys.readouterr().err.startswith(f"error: --plugin {module}: there is no module")


@pytest.mark.parametrize(
    ("module", "fault", "reason"),
    [("needs_more", ModuleNotFoundError, "no_such_library"), ("broken", AttributeError, "no_such_function")],
)
def test_a_fault_of_the_module_itself_is_left_as_it_is(module: str, fault: type[Exception], reason: str) -> None:
    with pytest.raises(fault, match=reason):
        plugins.find("head", f"{module}:Whole")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("someones_own:read", "returned list, not a Cohort"),
        ("someones_own:number", "is int, not a function"),
        ("someones_own:missing", "has no attribute 'missing'"),
        ("no_such_module:read", "No module named"),
        (":read", "write your own reader as module:function"),
        ("someones_own:", "write your own reader as module:function"),
    ],
)
def test_a_cohort_reader_that_is_none_is_one_line(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PreprocessingError, match=reason) as error:
        read_cohort(tmp_path, name)
    assert "\n" not in str(error.value)
