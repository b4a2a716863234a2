"""Search for many phrases of several words in a sentence.

A phrase consists of words separated by spaces. ``calcif*`` matches any word with this beginning; ``aorta|aortic``
either word; ``..`` up to ``GAP`` other words; ``a & b`` both, in either order, at most ``NEAR`` words apart. Case,
hyphens and accents on capitals do not matter. Adjacent words may not have a comma between them, and no phrase extends
over a semicolon.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from ctclip.errors import ConfigError

TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?|[,;:.?!()/\"]")
PUNCTUATION = frozenset(',;:.?!()/"')
GAP, NEAR = 4, 14
# No phrase extends over these.
ENDS = frozenset(";")
SHORTEST_STEM = 2


def tokens_of(sentence: str) -> list[str]:
    """Words and punctuation of a sentence, in lower case; a hyphen separates words."""
    return TOKEN.findall(sentence.lower())


@dataclass(frozen=True)
class Match:
    """A phrase of ``key`` at the tokens [start, end)."""

    key: Hashable
    start: int
    end: int


@dataclass(frozen=True)
class _Step:
    """One word of a phrase: the ids of matching words, and the number of other words allowed before it."""

    ids: frozenset[int]
    gap: int


class Phrases:
    """Finds phrases, each with a key."""

    def __init__(self, phrases: Iterable[tuple[Hashable, str]]) -> None:
        """Raises ConfigError for a phrase without a word, or a stem of one letter."""
        self._words: dict[str, int] = {}
        self._stems: dict[str, int] = {}
        # Phrases by their first word; each part of ``a & b`` has an entry.
        self._by_first: dict[int, list[tuple[Hashable, tuple[_Step, ...], tuple[_Step, ...] | None]]] = {}
        # Phrases of one word need no search.
        self._alone: dict[int, list[Hashable]] = {}
        for key, phrase in phrases:
            self._add(key, phrase)
        self._ids = lru_cache(maxsize=1 << 16)(self._ids_of)

    def knows(self, word: str) -> bool:
        """Whether some phrase has this word."""
        return bool(self._ids(word))

    def find(self, tokens: list[str]) -> list[Match]:
        """All phrases in ``tokens``, in the order of their first word."""
        ids = [self._ids(token) for token in tokens]
        every = frozenset().union(*ids)
        matches = []
        for start, here in enumerate(ids):
            for first in here:
                matches += [Match(key, start, start + 1) for key in self._alone.get(first, ())]
                for key, steps, other in self._by_first.get(first, ()):
                    # Check the last word first, because most sentences lack it.
                    if steps[-1].ids.isdisjoint(every) or (other is not None and other[-1].ids.isdisjoint(every)):
                        continue
                    end = _end(steps, start, ids, tokens)
                    if end is None:
                        continue
                    if other is None:
                        matches.append(Match(key, start, end))
                    elif (reach := _near(other, start, end, ids, tokens)) is not None:
                        matches.append(Match(key, *reach))
        return matches

    def _add(self, key: Hashable, phrase: str) -> None:
        parts = [self._steps(part, phrase) for part in phrase.split("&")]
        if len(parts) > 2:
            raise ConfigError(f"the phrase {phrase!r} has more than one &")
        first, other = parts[0], parts[1] if len(parts) == 2 else None
        for identity in first[0].ids:
            if other is None and len(first) == 1:
                self._alone.setdefault(identity, []).append(key)
                continue
            self._by_first.setdefault(identity, []).append((key, first, other))

    def _steps(self, part: str, phrase: str) -> tuple[_Step, ...]:
        steps, gap = [], 0
        for word in part.lower().replace("-", " ").split():
            if word == "..":
                gap = GAP
                continue
            ids = frozenset(self._identity(choice, phrase) for choice in word.split("|"))
            steps.append(_Step(ids, gap))
            gap = 0
        if not steps or gap:
            raise ConfigError(f"the phrase {phrase!r} has no word before or after &, or at its beginning or end")
        return tuple(steps)

    def _identity(self, word: str, phrase: str) -> int:
        stem = word.removesuffix("*")
        table = self._stems if word.endswith("*") else self._words
        if not stem or "*" in stem or (table is self._stems and len(stem) < SHORTEST_STEM):
            raise ConfigError(
                f"the phrase {phrase!r}: {word!r} is neither a word nor a beginning of at least {SHORTEST_STEM} letters followed by *"
            )
        return table.setdefault(stem, len(self._words) + len(self._stems))

    def _ids_of(self, token: str) -> frozenset[int]:
        stems = (self._stems.get(token[:length]) for length in range(SHORTEST_STEM, len(token) + 1))
        ids = {identity for identity in (self._words.get(token), *stems) if identity is not None}
        return frozenset(ids)


def _end(steps: tuple[_Step, ...], start: int, ids: list[frozenset[int]], tokens: list[str]) -> int | None:
    """The end of the phrase that begins at ``start``, or None if there is none."""
    if ids[start].isdisjoint(steps[0].ids):
        return None
    place = start
    for step in steps[1:]:
        left = step.gap
        place += 1
        while True:
            if place >= len(tokens) or tokens[place] in ENDS:
                return None
            if not ids[place].isdisjoint(step.ids):
                break
            if tokens[place] not in PUNCTUATION:
                left -= 1
            elif step.gap == 0 and tokens[place] != '"':
                return None
            if left < 0:
                return None
            place += 1
    return place + 1


def _near(
    steps: tuple[_Step, ...], start: int, end: int, ids: list[frozenset[int]], tokens: list[str]
) -> tuple[int, int] | None:
    """The span that covers [start, end) and the nearest match of ``steps``."""
    for distance in range(NEAR + 1):
        for place in (end + distance, start - 1 - distance):
            if not 0 <= place < len(tokens):
                continue
            other = _end(steps, place, ids, tokens)
            if other is None:
                continue
            low, high = min(start, place), max(end, other)
            if not any(token in ENDS for token in tokens[low:high]):
                return low, high
    return None
