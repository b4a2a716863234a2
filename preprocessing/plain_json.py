"""Untrusted JSON files: one nested too deeply for the parser counts as damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctclip.preprocessing.files import text_of


def loads(text: str | bytes) -> Any:
    """``json.loads``; raises ValueError also where it would raise RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read(path: Path) -> Any:
    """The content of a JSON file (UTF-8). Raises OSError where it is missing or no file, and ValueError where it is damaged."""
    return loads(text_of(path))
