"""Configuration files: find them by name, override them with ``key=value``, validate them with errors that name the
remedy, and write them.

A key that does not exist is refused with its full path and the nearest valid name. The sections themselves, with their
defaults and meanings, are in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ctclip.config import Config, ModelConfig
from ctclip.errors import ConfigError
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import text_of
from ctclip.preprocessing.named_files import find_file, installed_folder
from ctclip.preprocessing.plain_yaml import load_yaml
from ctclip.schema import Section, Typed, read_typed, validated

S = TypeVar("S", bound=Section)


def configs_folder() -> Path:
    """The configurations that come with the package."""
    return installed_folder()


def find_config(name: str, folder: str = "") -> Path:
    """The YAML file for ``name``: a user's own file, or one of the installed ``configs/<folder>``; see ``find_file``."""
    try:
        return find_file(name, folder)
    except PreprocessingError as error:
        raise ConfigError(str(error)) from error


def load_config(
    name: str, overrides: list[str] | tuple[str, ...] = (), values_set: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML configuration, set ``values_set`` (unparsed values, by the path of their key), and apply
    ``key.path=value`` overrides: text for keys that hold text, YAML for all others.

    Raises ConfigError naming the file, the path of the key, and the nearest valid name.
    """
    return read_config(name, overrides, values_set)[0]


def read_config(
    name: str, overrides: list[str] | tuple[str, ...] = (), values_set: Mapping[str, Any] | None = None
) -> tuple[Config, dict[str, str]]:
    """``load_config``, and the origin of each value that is not a default (a file, or "command line"), by its path."""
    path = find_config(name)
    values = read_mapping(path)
    size = values.get("model")
    origins = dict.fromkeys(_flatten(values), _shown(path))
    if isinstance(size, str):
        values["model"] = _use_size(size, origins)
    for key, value in (values_set or {}).items():
        _set(values, key, value, f"{key}={value}")
        _set_origin(origins, key)
    _override(values, overrides, origins)
    return build_config(values, str(path)), origins


def load_section(kind: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """A section of another kind than a run's from the YAML file ``path``, with ``key=value`` overrides. Raises ConfigError
    as ``load_config`` does."""
    values = read_mapping(path)
    _override(values, overrides, {})
    return validated(kind, values, str(path))


def _override(values: dict[str, Any], overrides: Sequence[str], origins: dict[str, str]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: write it as key=value, for example training.epochs=5")
        if key == "model" and not isinstance(read_typed(Typed(text, override)), dict):
            values["model"] = _use_size(text, origins)
            continue
        _set(values, key, Typed(text, override), override)
        _set_origin(origins, key)


def _use_size(name: str, origins: dict[str, str]) -> dict[str, Any]:
    """Replace a named size by its model section, and record this in ``origins``."""
    path = find_config(name, "models")
    size = read_mapping(path)
    for key in [key for key in origins if key == "model" or key.startswith("model.")]:
        del origins[key]
    origins |= dict.fromkeys(_flatten(size, "model."), _shown(path))
    return size


def _shown(path: Path) -> str:
    """The path of an installed file within ``configs``, or the path of another file."""
    folder = configs_folder()
    return f"configs/{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)


def _set_origin(origins: dict[str, str], key: str) -> None:
    for inner in [inner for inner in origins if inner.startswith(f"{key}.")]:
        del origins[inner]
    origins[key] = "command line"


def load_size(name: str) -> ModelConfig:
    """A named model of ``configs/models``, or a YAML file of one."""
    path = find_config(name, "models")
    return validated(ModelConfig, read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file; refuse anything else."""
    try:
        values = load_yaml(text_of(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def build_config(values: dict[str, Any], source: str) -> Config:
    """Validate ``values``; ``source`` is named in the error."""
    return validated(Config, values, source)


def dump_config(config: Section) -> str:
    """YAML of a configuration, including all defaults."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(old: Section, new: Section) -> list[str]:
    """Paths whose values differ between two configurations."""
    flat_old, flat_new = flat_values(old), flat_values(new)
    return sorted(key for key in flat_old.keys() | flat_new.keys() if flat_old.get(key) != flat_new.get(key))


def flat_values(config: Section) -> dict[str, Any]:
    """All values of a configuration by their dotted keys."""
    return _flatten(config.model_dump(mode="json"))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    here = values
    for parent in parents:
        child = here.get(parent)
        if isinstance(child, Typed):
            child = read_typed(child)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a single value and has no keys")
        here[parent] = here = child
    here[last] = value
