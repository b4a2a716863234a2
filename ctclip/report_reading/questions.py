"""Closed questions about findings, and the answers to choose from.

The label is recognised by the terms of the label set; the kind of question and the location by phrases of the language.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ctclip.errors import ConfigError, PromptError
from ctclip.report_reading.findings import BOTH, place_phrases
from ctclip.report_reading.patterns import Phrases, tokens_of
from ctclip.report_reading.reader import Status
from ctclip.report_reading.rules import RulesReader

# The key of phrases of questions that cannot be answered.
OTHER = "other"


class Kind(StrEnum):
    """The kinds of question."""

    present = "present"
    side = "side"
    lobe = "lobe"
    size = "size"


@dataclass(frozen=True)
class Question:
    """A question about a label; ``side`` and ``lobe`` if a yes-or-no question names them."""

    label: str
    kind: Kind
    side: str = ""
    lobe: str = ""


class Questioner:
    """Parses questions in the language of a reader, about its labels."""

    def __init__(self, reader: RulesReader) -> None:
        """Raises ConfigError for a language without questions."""
        self.reader, self.asked = reader, reader.language.questions
        if not self.asked.sides:
            raise ConfigError(
                f"the language {reader.language.name!r} has no questions; docs/words.md says how to add them"
            )
        kinds = [
            (kind, phrase) for kind in (Kind.side, Kind.lobe, Kind.size) for phrase in getattr(self.asked, kind.value)
        ]
        other = [(OTHER, phrase) for phrase in self.asked.other]
        self.phrases = Phrases([*kinds, *other, *place_phrases(reader.language)])

    def question(self, text: str) -> Question:
        """Parse ``text``. Raises PromptError if it names no label, or several, or if it is negated or asks for what cannot
        be answered, such as a change or a number."""
        mentions = self.reader.mentions(text)
        labels = {mention.label for mention in mentions}
        if len(labels) != 1:
            names = list(self.reader.terms.labels)
            named = (
                f"names {', '.join(sorted(labels))}: ask about one"
                if labels
                else f"names none of {', '.join(names[:5])} ..."
            )
            raise PromptError(f"the question {text[:80]!r} {named}")
        if any(mention.status is Status.absent for mention in mentions):
            raise PromptError(f"the question {text[:80]!r} is negated; ask whether the finding is present")
        tokens = tokens_of(text)
        # "Increased" in "is the heart size increased" names the finding.
        terms = [range(mention.start, mention.end) for mention in mentions]
        keys = {
            match.key for match in self.phrases.find(tokens)
            if match.key != OTHER or not any(match.start in words and match.end - 1 in words for words in terms)
        }  # fmt: skip
        (label,) = labels
        kind = next((kind for kind in (Kind.side, Kind.lobe, Kind.size) if kind in keys), Kind.present)
        places = {key for key in keys if isinstance(key, tuple)}
        if kind is not Kind.present:
            return Question(label, kind)
        if OTHER in keys or any(token[0].isdigit() for token in tokens):
            raise PromptError(
                f"the question {text[:80]!r} is not only about presence; what can be answered is whether, on which side, in "
                f"which lobe, and how large"
            )
        sides, lobes = ({name for group, name in places if group == wanted} for wanted in ("side", "lobe"))
        side = BOTH if len(sides) > 1 else next(iter(sides), "")
        return Question(label, kind, side, next(iter(lobes)) if len(lobes) == 1 else "")

    def answers(self, label: str, kind: Kind) -> dict[str, list[str]]:
        """The possible answers with their prompts, for questions other than yes or no."""
        if kind is Kind.size:
            return {
                f"{value:g} mm": [_filled(prompt, label, value) for prompt in self.asked.sizes]
                for value in self.asked.values_mm
            }
        prompts = self.asked.sides if kind is Kind.side else self.asked.lobes
        return {name: [_filled(prompt, label) for prompt in each] for name, each in prompts.items()}


def _filled(prompt: str, label: str, value: float | None = None) -> str:
    text = prompt.replace("{x}", label.lower())
    text = text if value is None else text.replace("{value}", f"{value:g}")
    return text[:1].upper() + text[1:]
