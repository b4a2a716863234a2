"""Pretrained folders that several tests of models read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.models.families import family_folder
from tests.unit.models.pretrained import vision_folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return family_folder("bert", tmp_path / "bert")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of one layer."""
    return vision_folder(tmp_path_factory.mktemp("vision"))
