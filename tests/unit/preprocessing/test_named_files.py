"""A name refers to a user's own file first, then to an installed one."""

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


ALIASES = "[" + ", ".join(f"&a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)) + "]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"name: {ALIASES}\nspacing: [1, 1, 1]\nshape: [8, 8, 8]\n", "alias"),
        ("name: " + "[" * 20000, "nested"),
        ('name: !!int ""\n', "cannot be read"),
        ("name: !!bool x\n", "cannot be read"),
        ("name: !!timestamp x\n", "cannot be read"),
        ("name: 2024-13-45\n", "cannot be read"),
        ("#" * (1 << 22) + "\nname: x\n", "4 MB"),
        ("name: x\nspacing: [.nan, 1, 1]\nshape: [8, 8, 8]\n", "spacing must be three positive numbers"),
        ("name: x\nspacing: [.inf, 1, 1]\nshape: [8, 8, 8]\n", "spacing must be three positive numbers"),
        ("name: x\nspacing: [1, 1, 1]\nshape: [8.7, 8, 8]\n", "three positive whole numbers"),
        ("name: x\nspacing: [1, 1, 1]\nshape: [1000000, 1000000, 1000000]\n", "memory"),
        ("name: x\nspacing: [1, 1, 1]\nshape: [8, 8, 8]\nhu_window: [.nan, .nan]\n", "a low and a high HU"),
        ("name: x\nspacing: [1, 1, 1]\nshape: [8, 8, 8]\npublished_geometry: 'no'\n", "true or false"),
        ("name: x\nspacing: [1, 1, 1]\nshape: [8, 8, 8]\nfill: air\n", "fill must be a value"),
        ("name: x\nspacing: [1, 1, 1]\nshape: [8, 8, 8]\nfil: 3\n", "'fil' is none of name, spacing"),
        ("name: x\nshape: [8, 8, 8]\n", "no 'spacing'"),
        ("- x\n", "no 'name'"),
        ("", "no 'name'"),
    ],
)  # fmt: skip
def test_a_spec_of_strangers_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(PreprocessingError) as error:
        _ = PreprocessingSpec.load(tmp_path / "spec.yaml").hash
    assert str(error.value).startswith(f"{tmp_path}/spec.yaml: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 400


def test_a_spec_keeps_its_hash(tmp_path: Path) -> None:
    """Stores are identified by it: a whole number stays a whole number."""
    (tmp_path / "spec.yaml").write_text("name: x\nspacing: [1, 1.5, 2]\nshape: [8, 8, 8]\nfill: -1000\n")
    assert PreprocessingSpec.load(tmp_path / "spec.yaml").hash == "871e0ffd"


def test_a_name_too_long_for_a_file_is_looked_up_like_any_other() -> None:
    with pytest.raises(PreprocessingError, match="no preprocessing spec"):
        PreprocessingSpec.load("a" * 300)
