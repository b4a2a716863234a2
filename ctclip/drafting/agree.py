"""Make a decoder's text agree with its prompt.

A small decoder does not follow its prompt exactly. Sentences with other claims are removed; findings that no sentence
states are added, in a phrasing that makes no other claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctclip.report_reading.findings import Cleaner, CleanSentence
from ctclip.report_reading.reader import Status


def agree(
    sections: Mapping[str, str],
    findings: Sequence[str],
    sides: Mapping[str, str],
    cleaner: Cleaner,
    phrasings: Mapping[tuple[str, bool, str], str],
) -> dict[str, str]:
    """Return the corrected ``sections``. ``findings``: exactly the findings to state; ``sides``: the side of each
    finding whose side is known; ``phrasings``: a sentence for each finding, presence and section. A sentence is never
    repeated."""
    texts = {}
    for section, text in sections.items():
        kept = [one for one in cleaner.clean(text) if _fits(one, findings, sides)]
        stated = {finding.label for one in kept for finding in one.findings if finding.status is Status.present}
        missing = [phrasings[name, True, section] for name in findings if name not in stated]
        texts[section] = " ".join(dict.fromkeys([*(one.text for one in kept), *missing]))
    return texts


def _fits(sentence: CleanSentence, findings: Sequence[str], sides: Mapping[str, str]) -> bool:
    """Whether a sentence claims presence only of ``findings``, with no side but a known one, and absence only of others."""
    for one in sentence.findings:
        if (one.status is not Status.absent) is not (one.label in findings):
            return False
        if one.side and one.status is not Status.absent and sides.get(one.label) != one.side:
            return False
    return True
