"""Remove sides and sizes from report sentences, so that a decoder does not learn to invent them.

"A nodule of 9 mm is seen in the right upper lobe" becomes "A nodule is seen". Rules remove words, and the result is
read again: it is used only if it states the same findings and no side (or size).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ctclip.language import Language
from ctclip.report_reading.findings import Cleaner, CleanSentence, Finding

NUMBERS = r"\d+(?:[.,]\d+)?(?:\s*(?:x|×|by|-|–|to)\s*\d+(?:[.,]\d+)?)*\s*(?:mm|cm)\b"
SPACES = re.compile(r"\s+(?=[.,;:])|\s{2,}")


class Reducer:
    """Cuts sides and sizes out of sentences."""

    def __init__(self, cleaner: Cleaner) -> None:
        self.cleaner = cleaner
        self.sizes = _size_patterns(cleaner.language)
        self.sides = _side_patterns(cleaner.language)

    def without_sizes(self, sentence: CleanSentence) -> CleanSentence | None:
        """The sentence without sizes; None if it makes no sense without them."""
        if all(finding.size_mm is None for finding in sentence.findings):
            return sentence
        kept = [(one.label, one.status, one.side, one.lobe, None) for one in sentence.findings]
        return self._reduced(sentence, self.sizes, kept)

    def without_sides(self, sentence: CleanSentence) -> CleanSentence | None:
        """The sentence without sides and lobes; None if it makes no sense without them."""
        if not any(finding.side or finding.lobe for finding in sentence.findings):
            return sentence
        kept = [(one.label, one.status, "", "", one.size_mm) for one in sentence.findings]
        return self._reduced(sentence, self.sides, kept)

    def _reduced(
        self, sentence: CleanSentence, patterns: tuple[re.Pattern[str], ...], kept: Sequence[tuple[object, ...]]
    ) -> CleanSentence | None:
        text = sentence.text
        for pattern in patterns:
            text = pattern.sub(lambda match: match.groupdict().get("kept", ""), text)
        text = SPACES.sub(lambda match: "" if match.end() < len(text) and text[match.end()] in ".,;:" else " ", text)
        text = text.strip(" ,;")
        again = self.cleaner.clean(text[:1].upper() + text[1:])
        if len(again) != 1 or [_facts(one) for one in again[0].findings] != list(kept):
            return None
        return again[0]


def _facts(finding: Finding) -> tuple[object, ...]:
    return finding.label, finding.status, finding.side, finding.lobe, finding.size_mm


def _side_patterns(language: Language) -> tuple[re.Pattern[str], ...]:
    """A preposition with a place that names a side ("in the right upper lobe"), then the words of sides alone."""
    wording = language.wording
    sides = _choices(phrase for each in wording.sides.values() for phrase in each)
    lobes = _choices(phrase for each in wording.lobes.values() for phrase in each)
    before, regions = _choices(wording.place_words), _choices(wording.regions)
    if not sides or not before or not regions:
        return ()
    place = (
        rf"(?:(?:{lobes})\s+)?(?:{sides})(?:\s+(?:{lobes}|{regions}))*"
        if lobes
        else rf"(?:{sides})(?:\s+(?:{regions}))*"
    )
    flags = re.IGNORECASE
    return re.compile(rf"\s+(?:{before})\s+{place}\b", flags), re.compile(rf"\b(?:{sides})\s+", flags)


def _size_patterns(language: Language) -> tuple[re.Pattern[str], ...]:
    """A size with the words or the comma before it ("measuring 9 mm") and the words that follow it; or a size at the
    beginning or after an article ("a 9 mm nodule"). Elsewhere the sentence is about the size ("exceeds 10 mm")."""
    wording = language.wording
    leads, follows, articles = (_choices(each) for each in (wording.size_words, wording.size_follows, wording.articles))
    behind = rf"(?:\s+(?:{follows})\b)?" if follows else ""
    led = rf"(?:,\s*|,?\s*\b(?:{leads})\s+){NUMBERS}{behind}" if leads else rf",\s*{NUMBERS}{behind}"
    alone = rf"(?P<kept>^|\b(?:{articles})\s+){NUMBERS}\s*" if articles else rf"(?P<kept>^){NUMBERS}\s*"
    return re.compile(led, re.IGNORECASE), re.compile(alone, re.IGNORECASE)


def _choices(phrases: Iterable[str]) -> str:
    """A pattern of any of the phrases, the longest first; "a|b" within a phrase is either word."""
    every: list[str] = []
    for phrase in phrases:
        options = [[re.escape(word) for word in choice.split("|")] for choice in phrase.replace("-", " ").split()]
        every.append(r"[\s-]+".join(f"(?:{'|'.join(each)})" if len(each) > 1 else each[0] for each in options))
    return "|".join(sorted(every, key=len, reverse=True))
