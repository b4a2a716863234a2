"""Where a sentence of a report ends."""

from __future__ import annotations

import re

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """The sentences of a section, without empty ones."""
    return [part.strip() for part in SENTENCE_END.split(text.strip()) if part.strip()]
