"""Left and right: a report with its sides exchanged, and a volume's mirror image."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ctclip.inference.run import report_embeddings
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.sentences import sentences

# Longest first; abbreviations of lobes have their side in them. The lingula and the middle lobe have no counterpart.
PAIRS = (
    ("left-sided", "right-sided"), ("left", "right"), ("LUL", "RUL"), ("LLL", "RLL"),
)  # fmt: skip
_OTHER = {one.casefold(): other for pair in PAIRS for one, other in (pair, pair[::-1])}
_OF_RIGHT = {right.casefold() for _, right in PAIRS}
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


def side_of(sentence: str) -> int:
    """1 for a sentence on the left, -1 on the right, 0 on neither or both alike."""
    words = [match[0].casefold() for match in _WORDS.finditer(sentence)]
    return int(np.sign(sum(-1 if word in _OF_RIGHT else 1 for word in words)))


def signed_sentences(model: DualEncoder, texts: Sequence[str]) -> np.ndarray:
    """(n, dim) what each text says of the left less what it says of the right, as a unit vector; 0 for one that names no side.

    The sum over its sentences of side times content, where the content is the mean embedding of the sentence and of the same
    with sides exchanged. The embedding of a whole report tells that something is left, but hardly what.
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
    """Volumes (..., slice, row, column), or (..., slice, column, row) in the published geometry, with left and right
    exchanged."""
    return np.ascontiguousarray(np.flip(voxels, axis=-2 if spec.published_geometry else -1))
