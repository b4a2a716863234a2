"""Recognise a text that states an absence, such as "no pleural effusion", where a finding is expected."""

from __future__ import annotations

from functools import lru_cache

from ctclip.language import load_language
from ctclip.report_reading.patterns import Phrases, tokens_of


def states_absence(text: str, language: str = "english") -> bool:
    """Whether a text begins with a phrase of the language by which a report states an absence."""
    return any(match.start == 0 for match in _phrases(language).find(tokens_of(text)))


@lru_cache
def _phrases(language: str) -> Phrases:
    scopes = load_language(language).scopes
    return Phrases((phrase, phrase) for phrase in (() if scopes is None else scopes.absent_before))
