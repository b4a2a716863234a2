"""Sections of a configuration: frozen, typed, and with one-line errors for values that do not fit."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ctclip.errors import ConfigError
from ctclip.preprocessing.plain_yaml import load_yaml

S = TypeVar("S", bound="Section")
NULL = "null"
# An invalid value is shown shortened.
FOUND = reprlib.Repr()
FOUND.maxlevel, FOUND.maxstring, FOUND.maxother = 3, 120, 120


class Typed(str):
    """The value of an override ``key=value``, as typed. The type of the field determines whether it is used as text or
    parsed as YAML, so a folder named 2024-01-05 does not become a date."""

    override: str

    def __new__(cls, text: str, override: str) -> Self:
        typed = super().__new__(cls, text)
        typed.override = override
        return typed


def read_typed(value: Any) -> Any:
    """Parse a typed value as YAML; return any other value unchanged. Raises ConfigError for invalid YAML."""
    if not isinstance(value, Typed):
        return value
    try:
        read = load_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {value.override!r}: the value is not valid YAML") from error
    if isinstance(read, str):
        # YAML 1.1 reads 1e-3 as a string, although a number is meant.
        with contextlib.suppress(ValueError):
            return float(read)
    return read


class Section(BaseModel):
    """A part of a configuration; immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_typed_values(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {name: _of_field(fields[name], value) if name in fields else value for name, value in given.items()}


def _of_field(field: FieldInfo, value: Any) -> Any:
    """Convert a typed value for ``field``: unchanged if the field holds text, else parsed as YAML. The word null or an
    empty value unsets an optional text. true and false are not accepted as numbers, although Python accepts them."""
    kinds = set(get_args(field.annotation)) or {field.annotation}
    if isinstance(value, dict) and isinstance(field.default, Section):
        # A section given in part keeps the other values of its default here, which may differ from those of its class.
        return field.default.model_dump(exclude_unset=True) | value
    if isinstance(value, Typed):
        if field.annotation is str:
            return str(value)
        if kinds == {str, type(None)}:
            return None if value in ("", NULL) else str(value)
        value = read_typed(value)
    return str(value).lower() if isinstance(value, bool) and kinds <= {int, float, type(None)} else value


def validated(schema: type[S], values: Any, source: str = "", path: str = "") -> S:
    """Build ``schema`` from ``values``; the first error is reported in one line.

    ``source``: the file with the values; ``path``: their position in it, for example ``model.volume``. Raises
    ConfigError naming both, and for an unknown key the nearest valid name.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        message = _explanation(schema, error.errors()[0], path)
    except ConfigError as error:
        # A section found by name (an encoder, an objective) has its own message.
        message = str(error)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # Of a validator that is called before the types of its values are checked.
        message = f"a value has the wrong type ({' '.join(str(error).split())[:100]})"
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
    if fault["type"] == "string_type":
        # YAML parsed a date, a number or a boolean where text was meant.
        message += "; write it in quotes"
    if fault["type"] == "missing":
        # The reported value is the whole section.
        return f"{key}: {message}"
    # Our own message for a whole section is complete.
    return (
        f"{key}: {message} (found {FOUND.repr(fault.get('input'))})"
        if location
        else f"{key}: {message}"
        if key
        else message
    )


def _valid_names(schema: type[Section], parents: list[str]) -> list[str]:
    sections: list[type[Section]] = [schema]
    for parent in parents:
        # List indices and mapping keys lead to the same sections.
        if any(parent in section.model_fields for section in sections):
            sections = [inner for section in sections for inner in _inner(section, parent)]
    return [name for section in sections for name in section.model_fields]


def _inner(section: type[Section], name: str) -> list[type[Section]]:
    field = section.model_fields.get(name)
    if field is None:
        return []
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
