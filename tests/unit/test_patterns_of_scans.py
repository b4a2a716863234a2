"""Scans given as a pattern."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctclip.errors import DataError
from ctclip.inference.scans import _expanded


@pytest.mark.parametrize("folder", ["[v2]", "what?", "a*b", "plain", "[v2]/of {x}"])
def test_a_folder_that_exists_is_a_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without brackets; the part after them may be a pattern."""
    scan = tmp_path / folder / "one" / "a.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.touch()
    assert _expanded([tmp_path / folder / "one" / "*.nii.gz"]) == [scan]
    assert _expanded([tmp_path / folder / "**" / "*.nii.gz"]) == [scan]
    monkeypatch.chdir(tmp_path)
    assert _expanded([Path(folder) / "one" / "[a-c].nii.gz"]) == [Path(folder) / "one" / "a.nii.gz"]
    with pytest.raises(DataError, match="no file matches this pattern"):
        _expanded([Path(folder) / "one" / "[b-c].nii.gz"])
