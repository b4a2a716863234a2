"""CSV files that are safe to open in a spreadsheet: cells that look like formulas are prefixed with an apostrophe
(OWASP, CSV injection), and control characters are written as escapes. Reading removes the apostrophe."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

import pandas as pd

# Including full-width forms, which some spreadsheets evaluate.
FORMULA = re.compile(r"[=+\-@\t\r＝＋－＠]")
# Signed numbers are harmless.
NUMBER = re.compile(r"[-+]?\d[\d.,]*([eE][-+]?\d+)?|[-+]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_csv(target: Path | IO[str], table: pd.DataFrame, **options: Any) -> None:
    """``table.to_csv`` with ``guarded`` strings in cells and names; without the index unless an ``index_label`` is
    given.

    ``options``: options of pandas.
    """
    safe = table.rename(columns=_cell)
    for number, dtype in enumerate(safe.dtypes):
        if not (pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_datetime64_any_dtype(dtype)):
            safe.isetitem(number, [_cell(value) for value in safe.iloc[:, number]])
    if "index_label" in options:
        safe.index = safe.index.map(_cell)
    safe.to_csv(target, index="index_label" in options, **options)


def read_csv(path: str | os.PathLike[str], **options: Any) -> pd.DataFrame:
    """Read a file written by ``write_csv``; ``options``: options of pandas. Empty cells in text columns become empty
    strings."""
    table = pd.read_csv(Path(path).absolute(), keep_default_na=False, **options).rename(columns=_bare)
    for number, dtype in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(dtype):
            table.isetitem(number, [_bare(value) for value in table.iloc[:, number]])
    return table


def guarded(text: str) -> str:
    """``text`` as a cell without a spreadsheet formula or control characters."""
    text = CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def unguarded(text: str) -> str:
    """Undo ``guarded``, except for control characters."""
    return text[1:] if text.startswith("'") and FORMULA.match(text[1:]) else text


def _cell(value: Any) -> Any:
    return guarded(value) if isinstance(value, str) else value


def _bare(value: Any) -> Any:
    return unguarded(value) if isinstance(value, str) else value
