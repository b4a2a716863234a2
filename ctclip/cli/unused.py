"""Refuse options that would have no effect, instead of ignoring them."""

from __future__ import annotations

import typer

from ctclip.errors import ConfigError

# How scans are read (`reading.py`).
READING = ("hu", "geometry", "expect", "series", "largest_gb")
STORED = "applies to scan files, not to volumes of a store"


def refuse_unused(context: typer.Context, condition: str, *names: str) -> None:
    """Raise ConfigError if one of the parameters ``names`` of the command was given on the command line. ``condition``:
    when its option has an effect, such as "needs --store"."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(one for one in context.command.params if one.name == name)
            raise ConfigError(f"{max(option.opts, key=len)} {condition}")
