"""Negation, doubt and past tense in a sentence, and their scopes.

After NegEx (Chapman et al. 2001) and NegBio (Peng et al. 2018): a phrase before or after a finding applies up to the
end of its clause. A list after "no" is negated as a whole; a verb followed by a comma or "and" begins another
statement.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from ctclip.language import Scopes
from ctclip.report_reading.patterns import PUNCTUATION, Match
from ctclip.report_reading.reader import Status

CUES = ("absent_before", "absent_after", "uncertain_before", "uncertain_after", "past_before", "no_scope")
MARKS = ("clause_ends", "verbs", "relatives", "joins")
# Maximum number of words between a finding and a question mark that expresses doubt.
DOUBTED = 2


@dataclass(frozen=True)
class Cue:
    """The key of a phrase of a language; ``role`` is a field of ``Scopes``."""

    role: str


def cue_phrases(scopes: Scopes) -> Iterator[tuple[Hashable, str]]:
    """The phrases of a language, with their keys."""
    for role in (*CUES, *MARKS):
        for phrase in getattr(scopes, role):
            yield Cue(role), phrase


class Scoped:
    """A sentence with the phrases of the language that occur in it."""

    def __init__(self, tokens: Sequence[str], matches: Sequence[Match]) -> None:
        self.tokens = tokens
        cues = [match for match in matches if isinstance(match.key, Cue)]
        self.cues = _longest([match for match in cues if match.key.role in CUES])  # type: ignore[attr-defined]
        inside = {place for cue in self.cues for place in range(cue.start, cue.end)}
        self.marks: dict[str, list[int]] = {role: [] for role in MARKS}
        for match in cues:
            role = match.key.role  # type: ignore[attr-defined]
            if role in MARKS and match.start not in inside:
                self.marks[role].append(match.start)
        behind = {place + 1 for place in self.marks["relatives"]}
        self.verbs = [place for place in self.marks["verbs"] if place not in behind]
        self.ends = sorted({*self.marks["clause_ends"], *(i for i, token in enumerate(tokens) if token == ";")})
        commas = [place for place, token in enumerate(tokens) if token == ","]
        self.parts = sorted({*commas, *self.marks["joins"]})

    def clause(self, match: Match) -> tuple[int, int]:
        """The tokens of the clause that contains ``match``."""
        before = max((end for end in self.ends if end < match.start), default=-1)
        return before + 1, min((end for end in self.ends if end >= match.end), default=len(self.tokens))

    def status(self, match: Match) -> Status | None:
        """The status of a finding mentioned at ``match``; None if the sentence refers to the past."""
        roles = {cue.key.role.partition("_")[0] for cue in self.cues if self._reaches(cue, match)}  # type: ignore[attr-defined]
        if "past" in roles:
            return None
        if "absent" in roles:
            return Status.absent
        if "uncertain" in roles or self._questioned(match):
            return Status.uncertain
        return Status.present

    def denied_inside(self, match: Match) -> bool:
        """Whether ``match`` itself contains a phrase of absence."""
        return any(
            cue.key.role.startswith("absent") and match.start <= cue.start and cue.end <= match.end  # type: ignore[attr-defined]
            for cue in self.cues
        )

    def _reaches(self, cue: Match, match: Match) -> bool:
        role = cue.key.role  # type: ignore[attr-defined]
        if role == "no_scope":
            return False
        if match.start <= cue.start and cue.end <= match.end:
            return True
        low, high = self.clause(match)
        if cue.start < low or cue.end > high:
            return False
        if role.endswith("_before"):
            return cue.end <= match.start and not self._new_statement(cue.end, match.start)
        return match.end <= cue.start and not self._new_statement(match.end, cue.start)

    def _new_statement(self, start: int, end: int) -> bool:
        """Whether a new statement begins between two positions: there is a verb, followed by a comma or "and"."""
        verb = next((place for place in self.verbs if start <= place < end), None)
        return verb is not None and any(verb < part < end for part in self.parts)

    def _questioned(self, match: Match) -> bool:
        words = 0
        for token in self.tokens[match.end :]:
            if token == "?":
                return True
            words += token not in PUNCTUATION
            if words > DOUBTED or token in ",;":
                return False
        return False


def _longest(cues: Sequence[Match]) -> list[Match]:
    """The longest of overlapping cues. A phrase that works in both directions gives two cues at the same position."""
    kept: list[Match] = []
    for cue in sorted(cues, key=lambda cue: cue.start - cue.end):
        places = {(other.start, other.end) for other in kept if cue.start < other.end and other.start < cue.end}
        if places <= {(cue.start, cue.end)}:
            kept.append(cue)
    return kept
