"""Languages of reports: the words that mark a statement as absent, uncertain or past.

A language is a file in ``configs/languages``, or the user's own. ``negations`` alone suffice for views of reports;
reading labels also needs ``scopes``, and ``common`` words identify reports in another language.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from pydantic import Field

from ctclip.config_files import find_config, read_mapping
from ctclip.schema import Section, validated

# In English reports, at least a third of the words are in the list; in Dutch ones, the most similar, a fifth. Terms are
# Latin in many languages.
COMMON, KNOWN, FEW_LETTERS = 0.25, 0.4, 20


class Scopes(Section):
    """Phrases (see ``ctclip.report_reading.patterns``) that determine the status of a finding in a sentence.

    ``before``: phrases that precede the finding; ``after``: phrases that follow it. Of overlapping phrases, the longest
    counts.
    """

    absent_before: tuple[str, ...] = Field(min_length=1, description="no, without, no evidence of")
    absent_after: tuple[str, ...] = Field((), description="was not observed, has resolved")
    uncertain_before: tuple[str, ...] = Field((), description="possible, suspicious for")
    uncertain_after: tuple[str, ...] = Field((), description="cannot be excluded")
    past_before: tuple[str, ...] = Field((), description="history of, evaluate for: states nothing about this scan")
    no_scope: tuple[str, ...] = Field(
        (), description="no change in, not only: phrases that contain a negation but negate nothing"
    )
    clause_ends: tuple[str, ...] = Field((), description="but, however, except: words that end the scope of a phrase")
    verbs: tuple[str, ...] = Field((), description="is, are, shows: a list of findings ends before a new verb")
    relatives: tuple[str, ...] = Field((), description="which, that: a verb after one of these begins no new statement")
    joins: tuple[str, ...] = Field((), description="and, or, nor: between the items of a list")


class Wording(Section):
    """Words and phrases for cleaning reports, in any case."""

    headings: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="headings of each section")
    sides: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="phrases of left, right and both")
    lobes: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="phrases of upper, middle and lower")
    place_words: tuple[str, ...] = Field((), description="in the, on: words before a location with a side")
    regions: tuple[str, ...] = Field((), description="lung, pleural space: words after a side")
    size_words: tuple[str, ...] = Field((), description="measuring, up to: words before a size")
    size_follows: tuple[str, ...] = Field((), description="in diameter: words after a size")
    articles: tuple[str, ...] = Field((), description="a, the: articles, which may also precede a size")
    comparison: tuple[str, ...] = Field((), description="phrases of comparison with an earlier examination")
    boilerplate: tuple[str, ...] = Field((), description="phrases of sentences that do not describe the scan")
    typos: dict[str, str] = Field(default_factory=dict, description="misspelt words and their corrections")


class Questions(Section):
    """Phrases of closed questions, and their answers. Answers are prompts: {x} is replaced by the finding, {value} by a
    size."""

    side: tuple[str, ...] = Field((), description="phrases that ask for a side")
    lobe: tuple[str, ...] = Field((), description="phrases that ask for a lobe")
    size: tuple[str, ...] = Field((), description="phrases that ask for a size")
    other: tuple[str, ...] = Field(
        (), description="phrases of questions that cannot be answered: how many, has changed"
    )
    sides: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="prompts of each side")
    lobes: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="prompts of each lobe")
    sizes: tuple[str, ...] = Field((), description="prompts of a size")
    values_mm: tuple[float, ...] = Field((), description="sizes to choose from")


class Language(Section):
    """A file of ``configs/languages``."""

    name: str
    negations: tuple[str, ...] = Field(
        min_length=1, description="words that mark a sentence as stating absence or normality"
    )
    common: tuple[str, ...] = Field((), description="the most common words, used to recognise the language")
    scopes: Scopes | None = Field(None, description="phrases used to read labels")
    wording: Wording = Field(Wording(), description="phrases used to clean reports")
    questions: Questions = Field(Questions(), description="phrases used to answer questions")

    def negates(self, sentence: str) -> bool:
        """Whether the wording of a sentence states that something is absent or normal."""
        return self._pattern(self.negations).search(sentence) is not None

    def is_foreign(self, words: Sequence[str], knows: Callable[[str], bool] = lambda word: False) -> bool:
        """Whether a text of these ``words`` (in lower case) is in another language: few of them are common words, and
        few are terms that it ``knows`` (telegraphic reports consist of terms). False for very short texts, or without a
        list of common words."""
        if not self.common or sum(map(len, words)) < FEW_LETTERS:
            return False
        common = frozenset(self.common)
        shares = [
            sum(map(test, words)) / len(words) for test in (common.__contains__, lambda w: w in common or knows(w))
        ]
        return shares[0] < COMMON and shares[1] < KNOWN

    @staticmethod
    @functools.cache
    def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
        return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def load_language(name: str) -> Language:
    """Load a language from a file, or by its name in ``configs/languages``."""
    path = find_config(name, "languages")
    return validated(Language, read_mapping(path), str(path))
