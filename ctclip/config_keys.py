"""Every key of a configuration with its type, default and meaning, and the origin of its value.

The meanings are written beside the fields (``description=``) of ``config.py`` and of each encoder and objective; `ctclip config`
and the documentation's reference both read them here.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo, PydanticUndefined

from ctclip import plugins
from ctclip.config import Config, EncoderConfig, ObjectiveConfig
from ctclip.errors import ConfigError
from ctclip.schema import Section

VOLUME = "model.volume"
DEFAULT_ENCODER = "vit3d"
OBJECTIVES = "objectives"
# Names of the bounds of a field in annotated-types.
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """One key. ``path`` is its name in an override; ``kind`` is the encoder or objective that it belongs to."""

    path: str
    type: str
    default: str
    meaning: str
    kind: str = ""


def keys() -> list[Key]:
    """Every key of a training configuration, in the order of the schema; the keys of each encoder and objective follow
    those that all of them share."""
    return list(_of_section(Config, ""))


def section_keys(section: type[Section]) -> list[Key]:
    """Every key of one schema, such as a label set's or a protocol's."""
    return list(_of_section(section, ""))


def key(path: str) -> list[Key]:
    """The keys of that path: one, or several if encoders share a name; or all keys of a section.

    Raises ConfigError with the nearest valid name.
    """
    every = keys()
    exact = [one for one in every if one.path == path] or [one for one in every if one.path.startswith(f"{path}.")]
    if exact:
        return exact
    near = difflib.get_close_matches(path, [one.path for one in every], n=1, cutoff=0.0)
    raise ConfigError(f"no key {path!r}; did you mean {near[0]!r}? `ctclip config list` shows all of them")


def _of_section(
    section: type[Section], prefix: str, kind: str = "", without: frozenset[str] = frozenset()
) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner = _section_of(field.annotation)
        if name in without:
            continue
        if path == VOLUME:
            for one in _of_section(EncoderConfig, f"{path}."):
                yield replace(one, default=DEFAULT_ENCODER) if one.path == f"{path}.kind" else one
            shared = frozenset(EncoderConfig.model_fields)
            for encoder in plugins.OURS["encoder"]:
                yield from _of_section(plugins.find("encoder", encoder).Config, f"{path}.", encoder, shared)
        elif path == OBJECTIVES:
            for objective in plugins.OURS["objective"]:
                config: type[ObjectiveConfig] = plugins.find("objective", objective).Config
                yield from _of_section(config, f"{path}.{objective}.", objective)
        elif inner is not None:
            yield from _of_section(inner, f"{path}.", kind)
        else:
            yield Key(path, type_in_words(field), default_in_yaml(field), field.description or "", kind)


def _section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def default_in_yaml(field: FieldInfo) -> str:
    """A field's default in YAML; "required" if it has none."""
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return in_yaml(value)


def in_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    plain = _plain(value)
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return text.removesuffix("...").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def type_in_words(field: FieldInfo) -> str:
    """A field's type and bounds in words: ``whole number, at least 1``."""
    bounds = [
        f"{words} {getattr(limit, attribute):g}"
        for limit in field.metadata
        for attribute, words in BOUNDS.items()
        if getattr(limit, attribute, None) is not None
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple and parts[-1:] == (Ellipsis,):
        return f"list of {_words(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(_words(part) for part in parts)}]"
    if origin is dict:
        return f"mapping of {_words(parts[0])} to {_words(parts[1])}"
    section = _section_of(annotation)
    if section is not None:
        return section.__name__
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(annotation, str(annotation))


def values_with_origins(config: Config, origins: dict[str, str]) -> list[tuple[str, str, str]]:
    """(path, value in YAML, origin) of every value of a configuration; origin: a file, "command line" or "default".

    ``origins`` come from ``config_files.read_config``.
    """
    lines = []
    for path, value in _leaves(config):
        parts = path.split(".")
        # A value may have been given with its section, as a mapping or a word.
        above = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        lines.append((path, in_yaml(value), next((origins[one] for one in above if one in origins), "default")))
    return lines


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and any(isinstance(part, Section) for part in value.values()):
            for inner, part in value.items():
                yield from _leaves(part, f"{prefix}{name}.{inner}.")
        else:
            yield f"{prefix}{name}", value
