"""Read untrusted JSON files as data that every later step can use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ctclip.preprocessing.files import text_of

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str | bytes) -> Any:
    """``json.loads``, but raises ValueError, and nothing else, for text that is not UTF-8, nests too deep for the parser,
    or has a value that later steps could not use; see ``whole`` and ``whole_text``."""
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        values = json.loads(text, parse_int=lambda number: whole(int(number)))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if SURROGATE.search(text):
        whole_text(json.dumps(values, ensure_ascii=False))
    return values


def read(path: Path) -> Any:
    """The content of a JSON file (UTF-8). Raises OSError if it is missing or not a file, and ValueError if it is
    damaged."""
    return loads(text_of(path))


def whole(number: int) -> int:
    """``number``. Raises ValueError if it is too large for a float, to which later steps convert it. Tokenizers state no
    limit as 1e30 in digits."""
    try:
        float(number)
    except OverflowError:
        raise ValueError("a number is too large") from None
    return number


def whole_text(text: str) -> str:
    """``text`` with pairs of surrogates joined, as escapes of YAML leave them. Raises ValueError for half a pair, which
    is no character: it could not be written or tokenised."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("a text has half of a surrogate pair, which is no character") from None
