"""A name stands for a user's own file first, then for one that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ctclip.config_files import find_config, load_config
from ctclip.errors import ConfigError, PromptError
from ctclip.evaluation.protocol import load_protocol
from ctclip.preprocessing import PreprocessingError, PreprocessingSpec
from ctclip.preprocessing.named_files import find_file, installed_folder, installed_names
from ctclip.prompts import load_prompts

FOLDERS = ["", "models", "preprocessing", "prompts", "protocols"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_installed_name_is_found_from_anywhere(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = installed_names(folder)
    assert names
    assert {find_file(name, folder).name for name in names} == {f"{name}.yaml" for name in names}


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_the_users_file_comes_before_the_installed_one(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    installed = PreprocessingSpec.load("phantom")
    values = yaml.safe_load((installed_folder() / "preprocessing" / "phantom.yaml").read_text())
    Path(f"phantom{suffix}").write_text(yaml.safe_dump(values | {"shape": [8, 16, 24]}))
    for name in ("phantom", f"phantom{suffix}", str(tmp_path / "phantom"), Path(f"phantom{suffix}")):
        assert PreprocessingSpec.load(name).shape == (8, 16, 24)
    Path(f"phantom{suffix}").unlink()
    assert PreprocessingSpec.load("phantom") == installed


def test_one_line_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = [
        (load_config, "", ConfigError, "configuration"),
        (load_protocol, "protocols", ConfigError, "protocol"),
        (load_prompts, "prompts", PromptError, "prompt set"),
        (PreprocessingSpec.load, "preprocessing", PreprocessingError, "preprocessing spec"),
    ]
    for load, folder, kind, noun in cases:
        with pytest.raises(kind) as refused:
            load("absent")
        line = str(refused.value)
        assert line.startswith(f"no {noun} 'absent': give the path of a YAML file, or one of the installed: ")
        assert line.endswith(", ".join(installed_names(folder)))
    with pytest.raises(PreprocessingError, match=r"did you mean phantom\?"):
        find_file("phanton", "preprocessing")


def test_a_path_that_does_not_exist_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("configs/preprocessing/phantom.yaml", "../phantom", "./phantom", ""):
        with pytest.raises(PreprocessingError, match="no preprocessing spec"):
            find_file(path, "preprocessing")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine: a folder, but a protocol is one YAML file"):
        find_config("mine", "protocols")
