"""Read untrusted JSON files; files nested too deeply for the parser count as damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctclip.preprocessing.files import text_of


def loads(text: str | bytes) -> Any:
    """``json.loads``, but raises ValueError instead of RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read(path: Path) -> Any:
    """The content of a JSON file (UTF-8). Raises OSError if it is missing or not a file, and ValueError if it is
    damaged."""
    return loads(text_of(path))
