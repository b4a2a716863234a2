"""The findings of a sentence, each with side, lobe, size and certainty.

"A 7 mm nodule in the right upper lobe and a left pleural effusion" states two findings. An attribute belongs to the
finding in the same part of the sentence; parts end at commas, and at "and" between two findings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctclip.errors import ConfigError
from ctclip.language import Language
from ctclip.report_reading.patterns import Phrases, tokens_of
from ctclip.report_reading.reader import Status
from ctclip.report_reading.rules import Mention, RulesReader
from ctclip.report_reading.scopes import Cue, cue_phrases
from ctclip.sentences import sentences

BOTH = "both"
MM = {"mm": 1.0, "cm": 10.0}
SIZE = re.compile(r"\d+(?:[.,]\d+)?")


@dataclass(frozen=True)
class Finding:
    """One finding that a sentence states. ``side``: left, right, both or ""; ``lobe``: one of the language's lobes or
    ""; ``size_mm``: the largest size stated, or None."""

    label: str
    status: Status
    side: str = ""
    lobe: str = ""
    size_mm: float | None = None


@dataclass(frozen=True)
class CleanSentence:
    """A sentence with misspellings corrected, its findings, and whether it compares with an earlier examination or does
    not describe the scan."""

    text: str
    findings: tuple[Finding, ...]
    comparison: bool
    boilerplate: bool


class Cleaner:
    """Splits reports into findings by rules."""

    def __init__(self, reader: RulesReader) -> None:
        """Raises ConfigError for a language without scopes."""
        self.reader, self.language = reader, reader.language
        self.typos = _typos(self.language)
        wording = self.language.wording
        places = place_phrases(self.language)
        marks = [("comparison", phrase) for phrase in wording.comparison]
        marks += [("boilerplate", phrase) for phrase in wording.boilerplate]
        if self.language.scopes is None:
            raise ConfigError(
                f"the language {self.language.name!r} has no scopes, so findings cannot be separated in it"
            )
        joins = [
            (key, phrase)
            for key, phrase in cue_phrases(self.language.scopes)
            if key in (Cue("joins"), Cue("clause_ends"))
        ]
        self.phrases = Phrases([*places, *marks, *joins])

    def clean(self, text: str) -> list[CleanSentence]:
        """The sentences of a section."""
        return [self._sentence(self.mended(sentence)) for sentence in sentences(text)]

    def mended(self, sentence: str) -> str:
        """Correct the misspellings in a sentence that the language lists."""
        if self.typos is None:
            return sentence
        return self.typos.sub(lambda match: _cased(self.language.wording.typos[match[0].lower()], match[0]), sentence)

    def _sentence(self, sentence: str) -> CleanSentence:
        tokens = tokens_of(sentence)
        matches = self.phrases.find(tokens)
        keys = {match.key for match in matches}
        parts = {place for place, token in enumerate(tokens) if token in ",;"}
        parts |= {match.start for match in matches if isinstance(match.key, Cue)}
        mentions = _outermost(self.reader.mentions(sentence))
        places = [(match.key, match.start) for match in matches if isinstance(match.key, tuple)]
        findings = tuple(
            _finding(mention, tokens[low:high], [key for key, start in places if low <= start < high])
            for mention, low, high in _portions(mentions, sorted(parts), len(tokens))
        )
        return CleanSentence(sentence, findings, "comparison" in keys, "boilerplate" in keys and not findings)


def place_phrases(language: Language) -> list[tuple[tuple[str, str], str]]:
    """Phrases for sides and lobes, with the keys ("side", name) and ("lobe", name)."""
    tables = {"side": language.wording.sides, "lobe": language.wording.lobes}
    return [((kind, name), phrase) for kind, table in tables.items() for name, each in table.items() for phrase in each]


def _outermost(mentions: Sequence[Mention]) -> list[Mention]:
    """Merge overlapping mentions of the same label."""
    kept: list[Mention] = []
    for mention in sorted(mentions, key=lambda m: m.start - m.end):
        if all(m.label != mention.label or mention.end <= m.start or m.end <= mention.start for m in kept):
            kept.append(mention)
    return sorted(kept, key=lambda m: (m.start, m.end))


def _portions(mentions: Sequence[Mention], parts: Sequence[int], length: int) -> Iterator[tuple[Mention, int, int]]:
    """Each mention with the tokens [low, high) of its part of the sentence, which ends at the last separator before the
    next mention. Mentions without a separator between them share a part."""
    for number, mention in enumerate(mentions):
        low, high = 0, length
        for other in mentions[:number]:
            low = max([low, *(part for part in parts if other.end <= part < mention.start)])
        for other in mentions[number + 1 :]:
            between = [part for part in parts if mention.end <= part < other.start]
            high = min([high, *between[-1:]])
        yield mention, low, high


def _finding(mention: Mention, tokens: Sequence[str], places: Sequence[tuple[str, str]]) -> Finding:
    sides = {name for kind, name in places if kind == "side"}
    lobes = {name for kind, name in places if kind == "lobe"}
    side = BOTH if BOTH in sides or len(sides) > 1 else next(iter(sides), "")
    lobe = next(iter(lobes)) if len(lobes) == 1 else ""
    return Finding(mention.label, mention.status, side, lobe, _size(tokens))


def _size(tokens: Sequence[str]) -> float | None:
    """The largest size in mm: numbers before "mm" or "cm", also in "13 x 9 mm"."""
    sizes = []
    for place, token in enumerate(tokens):
        if token in MM:
            before = place - 1
            while before >= 0 and (SIZE.fullmatch(tokens[before]) or tokens[before] in ("x", "by")):
                if SIZE.fullmatch(tokens[before]):
                    sizes.append(float(tokens[before].replace(",", ".")) * MM[token])
                before -= 1
    return max(sizes, default=None)


def _typos(language: Language) -> re.Pattern[str] | None:
    typos = language.wording.typos
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, typos))})\b", re.IGNORECASE) if typos else None


def _cased(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[:1].isupper() else word
