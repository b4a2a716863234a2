"""Phrases of several words in a sentence: endings, alternatives, gaps, both orders."""

from __future__ import annotations

import pytest

from ctclip.errors import ConfigError
from ctclip.report_reading.patterns import GAP, NEAR, Phrases, tokens_of


def spans(phrase: str, sentence: str) -> list[str]:
    """The part of ``sentence`` that ``phrase`` covers, each a string of words."""
    tokens = tokens_of(sentence)
    return [" ".join(tokens[match.start : match.end]) for match in Phrases([("key", phrase)]).find(tokens)]


@pytest.mark.parametrize(
    ("phrase", "sentence", "covered"),
    [
        ("nodule", "A nodule, two nodules.", ["nodule"]),
        ("nodul*", "A nodule and nodular lesions; no Nodules.", ["nodule", "nodular", "nodules"]),
        ("ground glass", "Ground-glass opacity of ground glass.", ["ground glass", "ground glass"]),
        ("ground glass", "Solid ground, glass in it.", []),
        ("left|right lung", "The left lung and the right lung.", ["left lung", "right lung"]),
        ("heart .. enlarged", "The heart is slightly enlarged.", ["heart is slightly enlarged"]),
        ("heart .. enlarged", "The heart " + "w " * GAP + "enlarged", ["heart " + "w " * GAP + "enlarged"]),
        ("heart .. enlarged", "The heart " + "w " * (GAP + 1) + "enlarged", []),
        ("heart .. enlarged", "The heart; it is enlarged.", []),
        ("aorta & calcif*", "Calcification of the aorta.", ["calcification of the aorta"]),
        ("aorta & calcif*", "The aorta, as before, is calcified.", ["aorta , as before , is calcified"]),
        ("aorta & calcif*", "Calcified nodes; the aorta is wide.", []),
        ("aorta & calcif*", "aorta " + "w " * NEAR + "calcified", ["aorta " + "w " * NEAR + "calcified"]),
        ("aorta & calcif*", "aorta " + "w " * (NEAR + 1) + "calcified", []),
        ("7 mm", "A nodule of 7 mm, another of 17 mm and 0.7 mm.", ["7 mm"]),
    ],
)
def test_a_phrase_covers_its_words(phrase: str, sentence: str, covered: list[str]) -> None:
    assert spans(phrase, sentence) == covered


@pytest.mark.parametrize("phrase", ["", "  ", "..", "nodule ..", "a*", "*", "& aorta", "a & b & c", "no*dule"])
def test_a_phrase_that_means_nothing_is_refused(phrase: str) -> None:
    with pytest.raises(ConfigError, match="phrase") as refused:
        Phrases([("key", phrase)])
    assert "\n" not in str(refused.value)


def test_many_phrases_keep_their_keys() -> None:
    phrases = Phrases([("one", "nodule"), ("two", "lung nodule"), ("three", "lung & nodule")])
    keys = [match.key for match in phrases.find(tokens_of("A lung nodule."))]
    assert sorted(map(str, keys)) == ["one", "three", "two"]
