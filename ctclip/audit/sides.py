"""Left and right: a report with its sides exchanged, and a volume's mirror image."""

from __future__ import annotations

import re

import numpy as np

from ctclip.preprocessing.spec import PreprocessingSpec

# Longest first; abbreviations of lobes have their side in them. The lingula and the middle lobe have no counterpart.
PAIRS = (
    ("left-sided", "right-sided"), ("left", "right"), ("LUL", "RUL"), ("LLL", "RLL"),
)  # fmt: skip
_OTHER = {one.casefold(): other for pair in PAIRS for one, other in (pair, pair[::-1])}
_WORDS = re.compile(rf"\b({'|'.join(map(re.escape, _OTHER))})\b", re.IGNORECASE)


def exchange_sides(text: str) -> str:
    """The text with left and right exchanged; the same text if it names no side."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _OTHER[word.casefold()]
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped.lower()

    return _WORDS.sub(other, text)


def mirrored(voxels: np.ndarray, spec: PreprocessingSpec) -> np.ndarray:
    """Volumes (..., slice, row, column), or (..., slice, column, row) in the published geometry, with left and right
    exchanged."""
    return np.ascontiguousarray(np.flip(voxels, axis=-2 if spec.published_geometry else -1))
