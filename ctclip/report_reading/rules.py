"""Labels by rules: terms of the label set, and phrases of the language for negation and doubt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ctclip.errors import ConfigError
from ctclip.labels import LabelSet
from ctclip.language import Language, load_language
from ctclip.report_reading.patterns import Match, Phrases, tokens_of
from ctclip.report_reading.reader import Options, Reader, Reading, Statement, Status, strongest
from ctclip.report_reading.scopes import Cue, Scoped, cue_phrases
from ctclip.report_reading.terms import LabelTerms, Terms, load_terms
from ctclip.sentences import sentences

GUARD = "guard"
# Reports often repeat sentences, so results are cached.
REMEMBERED = 1 << 18


@dataclass(frozen=True)
class Term:
    """The key of a phrase of a label; ``role`` is a field of ``LabelTerms``. ``guard`` links a phrase with the words
    that must not be in its clause."""

    label: str
    role: str
    guard: int = 0


@dataclass(frozen=True)
class Mention:
    """A label in a sentence: its status, and the tokens [start, end) of the phrase that names it."""

    label: str
    status: Status
    start: int
    end: int


class RulesReader(Reader):
    """Reads the status of each label from each sentence, by phrases."""

    shared = True

    def __init__(self, terms: Terms, language: Language) -> None:
        """Raises ConfigError for a language without scopes."""
        if language.scopes is None:
            raise ConfigError(
                f"the language {language.name!r} has no scopes, so labels cannot be read in it; docs/words.md says how to add them"
            )
        self.terms, self.language = terms, language
        mine = [pair for name, phrases in terms.labels.items() for pair in _phrases(name, phrases)]
        self.phrases = Phrases([*mine, *cue_phrases(language.scopes)])
        self.statuses = lru_cache(maxsize=REMEMBERED)(self._statuses)

    @classmethod
    def build(cls, labels: LabelSet, options: Options) -> RulesReader:
        return cls(load_terms(labels, options.terms), load_language(options.language))

    @property
    def identity(self) -> str:
        scopes = hashlib.sha256(self.language.model_dump_json().encode()).hexdigest()[:8]
        return f"rules: {self.terms.identity()}, {self.language.name} {scopes}"

    def read(self, texts: Sequence[str]) -> list[Reading]:
        return [self._read(text) for text in texts]

    def is_foreign(self, text: str) -> bool:
        words = [token for token in tokens_of(text) if token.isalpha()]
        return self.language.is_foreign(words, self.phrases.knows)

    def _read(self, text: str) -> Reading:
        stated: dict[str, list[Statement]] = {}
        for sentence in sentences(text):
            for name, status in self.statuses(sentence).items():
                stated.setdefault(name, []).append(Statement(status, sentence))
        return {name: strongest(statements) for name, statements in stated.items()}

    def _statuses(self, sentence: str) -> dict[str, Status]:
        """The statement of one sentence about each label that it mentions."""
        stated: dict[str, list[Statement]] = {}
        for mention in self.mentions(sentence):
            stated.setdefault(mention.label, []).append(Statement(mention.status))
        return {name: strongest(statements).status for name, statements in stated.items()}

    def mentions(self, sentence: str) -> list[Mention]:
        """All mentions of labels in one sentence, in order."""
        tokens = tokens_of(sentence)
        matches = self.phrases.find(tokens)
        by_label: dict[str, dict[str, list[Match]]] = {}
        for match in matches:
            if isinstance(match.key, Term):
                by_label.setdefault(match.key.label, {}).setdefault(match.key.role, []).append(match)
        if not by_label:
            return []
        scoped = Scoped(tokens, [match for match in matches if isinstance(match.key, Cue)])
        every = [mention for name, roles in by_label.items() for mention in _mentions(name, scoped, roles)]
        return sorted(every, key=lambda mention: (mention.start, mention.end))


def _phrases(name: str, terms: LabelTerms) -> Iterator[tuple[Term, str]]:
    """The phrases of one label with their keys."""
    for role in LabelTerms.model_fields:
        for number, written in enumerate(getattr(terms, role), start=1):
            phrase, *guards = written.split("!")
            yield Term(name, role, number if guards else 0), phrase
            for guard in guards:
                yield Term(name, GUARD, number), guard


def _mentions(name: str, scoped: Scoped, roles: dict[str, list[Match]]) -> Iterator[Mention]:
    """The status of one label in a sentence, from the positions of its phrases."""
    for match in roles.get("present", ()):
        low, high = scoped.clause(match)
        other = any(match.start < o.end and o.start < match.end for o in roles.get("ignore", ()))
        other |= any(low <= o.start and o.end <= high for o in roles.get("unless", ()))
        if number := match.key.guard:  # type: ignore[attr-defined]
            guards = (o for o in roles.get(GUARD, ()) if o.key.guard == number)  # type: ignore[attr-defined]
            other |= any(low <= o.start and o.end <= high for o in guards)
        status = None if other else scoped.status(match)
        if status is not None:
            yield Mention(name, status, match.start, match.end)
    for match in roles.get("absent", ()):
        # "Heart size is not normal."
        status = Status.present if scoped.denied_inside(match) else Status.absent
        yield Mention(name, status, match.start, match.end)
