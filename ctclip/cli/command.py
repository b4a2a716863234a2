"""What every command refuses before it runs: numbers that are not finite, and an output that would replace what it reads,
or lie inside it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from ctclip.errors import ConfigError

OUTPUT = "output"
# Files that mark a model folder, and those that mark a store. Neither may contain anything else.
READ_WHOLE = (("model.safetensors", "preprocessing.yaml"), ("cohort.parquet", "spec.yaml"))


class Command(TyperCommand):
    """A command that takes only finite numbers, and never writes over its input, not even with ``--force``."""

    def invoke(self, ctx: Any) -> Any:
        refuse_not_finite(ctx.params)
        refuse_own_input(ctx.params)
        return super().invoke(ctx)


def refuse_not_finite(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a parameter that is NaN, which no limit excludes, or infinite."""
    for name, values in given.items():
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: give a finite number")


def refuse_own_input(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if the parameter ``output`` of a command is a file that another parameter names, or lies in a
    model folder or a store that another parameter names."""
    output = given.get(OUTPUT)
    if not isinstance(output, str | os.PathLike):
        return
    target = Path(output)
    for name, values in given.items():
        for value in values if isinstance(values, list | tuple) else [values]:
            if name == OUTPUT or not isinstance(value, str | os.PathLike):
                continue
            try:
                if target.is_file() and os.path.samefile(value, target):
                    raise ConfigError(
                        f"{output}: is read by this command, which would replace it; give another --output"
                    )
                inside = Path(value).resolve() in target.resolve().parents
                kept = inside and any(all((Path(value) / one).is_file() for one in files) for files in READ_WHOLE)
            except (OSError, ValueError):  # a text, not a path
                continue
            if kept:
                raise ConfigError(f"{output}: lies inside {value}, which this command reads; give another --output")
