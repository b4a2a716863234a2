"""Sections of a configuration: frozen, typed, and explained in one line where they do not fit."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ctclip.errors import ConfigError

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of a configuration; immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)


def validated(schema: type[S], values: Any, source: str = "", path: str = "") -> S:
    """``schema`` built from ``values``; the first fault becomes one line.

    ``source``: the file the values come from; ``path``: where in it they stand, for example ``model.volume``. Raises
    ConfigError naming both, and for an unknown key the nearest valid name.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        message = _explanation(schema, error.errors()[0], path)
    except ConfigError as error:
        # A section that was looked up by name (an encoder, an objective) has explained itself.
        message = str(error)
    raise ConfigError(f"{source}: {message}" if source else message)


def _explanation(schema: type[Section], fault: Any, path: str) -> str:
    location = [str(part) for part in fault["loc"]]
    parents = [part for part in path.split(".") if part]
    key = ".".join([*parents, *location])
    if fault["type"] == "extra_forbidden":
        valid = _valid_names(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {'.'.join([*parents, *location[:-1], *near])!r}?"
    message = str(fault["msg"]).removeprefix("Value error, ")
    # A rule of ours about a whole section says by itself what is wrong.
    return f"{key}: {message} (found {fault.get('input')!r})" if location else f"{key}: {message}" if key else message


def _valid_names(schema: type[Section], parents: list[str]) -> list[str]:
    sections: list[type[Section]] = [schema]
    for parent in parents:
        # An index of a list, or a key of a mapping, leads to the same sections.
        if any(parent in section.model_fields for section in sections):
            sections = [inner for section in sections for inner in _inner(section, parent)]
    return [name for section in sections for name in section.model_fields]


def _inner(section: type[Section], name: str) -> list[type[Section]]:
    field = section.model_fields.get(name)
    if field is None:
        return []
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
