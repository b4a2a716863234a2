"""Exchange left and right in a report, and mirror a volume."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ctclip.inference.run import report_embeddings
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.sentences import sentences

# Longest first; abbreviations of lobes include the side. The lingula and the middle lobe have no counterpart.
PAIRS = (
    ("left-sided", "right-sided"), ("left", "right"), ("LUL", "RUL"), ("LLL", "RLL"),
)  # fmt: skip
_OTHER = {one.casefold(): other for pair in PAIRS for one, other in (pair, pair[::-1])}
_OF_RIGHT = {right.casefold() for _, right in PAIRS}
_WORDS = re.compile(rf"\b({'|'.join(map(re.escape, _OTHER))})\b", re.IGNORECASE)


def exchange_sides(text: str) -> str:
    """Exchange left and right in a text; a text that names no side is unchanged."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _OTHER[word.casefold()]
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped.lower()

    return _WORDS.sub(other, text)


def side_of(sentence: str) -> int:
    """1 for a sentence about the left, -1 about the right, 0 about neither or both equally."""
    words = [match[0].casefold() for match in _WORDS.finditer(sentence)]
    return int(np.sign(sum(-1 if word in _OF_RIGHT else 1 for word in words)))


def signed_sentences(model: DualEncoder, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors (n, dim) of what each text states about the left minus what it states about the right; 0 for a text
    that names no side.

    The vector is the sum over sentences of side times content; content is the mean embedding of the sentence and of the
    same sentence with sides exchanged. The embedding of a whole report encodes that something is on the left, but
    hardly what.
    """
    sided = [[(sentence, side_of(sentence)) for sentence in sentences(text)] for text in texts]
    distinct = sorted({sentence for text in sided for sentence, side in text if side})
    vectors = np.zeros((len(texts), model.config.dim), np.float32)
    if not distinct:
        return vectors
    both = [report_embeddings(model, these) for these in (distinct, [exchange_sides(text) for text in distinct])]
    contents = dict(zip(distinct, (both[0] + both[1]) / 2, strict=True))
    for row, text in enumerate(sided):
        for sentence, side in text:
            if side:
                vectors[row] += side * contents[sentence]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-6)


def mirrored(voxels: np.ndarray, spec: PreprocessingSpec) -> np.ndarray:
    """Exchange left and right in volumes (..., slice, row, column), or (..., slice, column, row) in the published
    geometry."""
    return np.ascontiguousarray(np.flip(voxels, axis=-2 if spec.published_geometry else -1))
