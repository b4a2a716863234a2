"""Make a decoder's text agree with its prompt.

A small decoder does not follow its prompt exactly. Sentences with other claims are removed; findings that no sentence
states, or whose known side no sentence names, are added, in a phrasing that makes no other claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ctclip.report_reading.findings import Cleaner, CleanSentence
from ctclip.report_reading.reader import Status


class Phrasings(Protocol):
    """The sentence that a finding is present in a section, on its side if ``sides`` has it and there is a phrase for it."""

    def present(self, name: str, section: str, sides: Mapping[str, str]) -> str: ...


def agree(
    sections: Mapping[str, str],
    findings: Sequence[str],
    sides: Mapping[str, str],
    cleaner: Cleaner,
    phrasings: Phrasings,
) -> dict[str, str]:
    """Return the corrected ``sections``. ``findings``: exactly the findings to state; ``sides``: the side of each
    finding whose side is known. A sentence is never repeated."""
    texts = {}
    for section, text in sections.items():
        kept = [one for one in cleaner.clean(text) if _fits(one, findings, sides)]
        added = []
        for name in findings:
            phrase = phrasings.present(name, section, sides)
            stated = [one for one in kept if _says(one, name)]
            if phrase != phrasings.present(name, section, {}):
                if any(_says(one, name, sides[name]) for one in stated):
                    continue
                # A sentence about this finding alone would only say less.
                kept = [one for one in kept if one not in stated or {each.label for each in one.findings} != {name}]
                added.append(phrase)
            elif not stated:
                added.append(phrase)
        texts[section] = " ".join(dict.fromkeys([*(one.text for one in kept), *added]))
    return texts


def _says(sentence: CleanSentence, name: str, side: str = "") -> bool:
    """Whether a sentence states that a finding is present, on ``side`` if given."""
    return any(
        one.label == name and one.status is Status.present and (not side or one.side == side)
        for one in sentence.findings
    )


def _fits(sentence: CleanSentence, findings: Sequence[str], sides: Mapping[str, str]) -> bool:
    """Whether a sentence claims presence only of ``findings``, with no side but a known one, and absence only of others."""
    for one in sentence.findings:
        if (one.status is not Status.absent) is not (one.label in findings):
            return False
        if one.side and one.status is not Status.absent and sides.get(one.label) != one.side:
            return False
    return True
