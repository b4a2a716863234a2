"""Reports as one text, and the contents of their views, from many draws."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctclip.data.reports import (
    MOST_SENTENCES,
    NO_REPORT,
    Report,
    ReportViews,
    reports_of,
    sentence_numbers,
    stated_sentences,
)
from ctclip.errors import ConfigError
from ctclip.language import Language, load_language

ENGLISH = load_language("english")
FIVE = ["Nodule in the apex.", "No effusion.", "Large heart.", "Clear airways.", "Dense bone."]


def draws(views: ReportViews, report: Report, count: int = 400) -> list[str]:
    return [views.draw(report, np.random.default_rng(seed)) for seed in range(count)]


def of(*findings: str) -> Report:
    return Report({"findings": " ".join(findings)})


@pytest.mark.parametrize(
    ("sentence", "negates"),
    [
        ("NO nodule.", True),
        ("Lungs are free of nodules.", True),
        ("Freedom of movement.", False),
        ("A notable, abnormal, nodular opacity.", False),
        ("Nodules: not seen", True),
    ],
)
def test_whole_words_of_negation_in_any_case(sentence: str, negates: bool) -> None:
    assert ENGLISH.negates(sentence) is negates


def test_a_language_of_ones_own_takes_its_phrases_literally(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nnegations: [k.A]\n")
    mine = load_language(str(file))
    assert mine.negates("Erguss k.A")
    assert not mine.negates("Erguss kxA")
    assert not mine.negates("No effusion."), "the words of another language"
    file.write_text("name: mine\nnegations: []\n")
    with pytest.raises(ConfigError, match="negations"):
        load_language(str(file))


def test_a_report_is_its_sections_in_order_and_cannot_be_changed() -> None:
    report = Report({"impression": " Nodule. ", "technique": "  ", "findings": "\nHeart large."})
    assert report.text() == "Nodule. Heart large."
    assert Report({}).text() == ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.sections = {}  # type: ignore[misc]


def test_reports_of_a_table_have_the_sections_asked_for() -> None:
    table = pd.DataFrame({"findings": ["A.", None, "C."], "impression": [np.nan, "5", 6]}, index=[7, 3, 5])
    assert reports_of(table, ("impression", "findings", "absent")) == [
        Report({"impression": "", "findings": "A."}),
        Report({"impression": "5", "findings": ""}),
        Report({"impression": "6", "findings": "C."}),
    ]
    assert list(reports_of(table, ("impression", "findings"))[0].sections) == ["impression", "findings"]
    assert reports_of(table, ("absent",)) == [Report({})] * 3


def test_views_are_drawn_as_often_as_their_weights_say() -> None:
    report = Report({"findings": "F.", "impression": "I.", "technique": "T."})
    views = ReportViews({"findings": 3, "technique": 0, "impression": 1}, ENGLISH)
    assert views.names == ["findings", "impression"]
    counts = Counter(draws(views, report, 2000))
    assert set(counts) == {"F.", "I."}
    assert counts["F."] / 2000 == pytest.approx(0.75, abs=0.04)


def test_one_sentence_is_any_of_them_equally_often() -> None:
    counts = Counter(draws(ReportViews({"sentence": 1}, ENGLISH), of(*FIVE), 1500))
    assert set(counts) == set(FIVE)
    assert min(counts.values()) / 1500 == pytest.approx(0.2, abs=0.04)
    assert max(counts.values()) / 1500 == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize(("available", "most"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4)])
def test_some_sentences_are_one_to_four_different_ones_in_any_order(available: int, most: int) -> None:
    report = of(*FIVE[:available])
    texts = draws(ReportViews({"sentences": 1}, ENGLISH), report)
    parts = [[f"{sentence}." for sentence in text.rstrip(".").split(". ")] for text in texts]
    counts = Counter(map(len, parts))
    assert set(counts) == set(range(1, most + 1))
    assert min(counts.values()) / len(texts) == pytest.approx(1 / most, abs=0.08)
    assert all(len(set(part)) == len(part) and set(part) <= set(FIVE[:available]) for part in parts)
    assert {part[0] for part in parts} == set(FIVE[:available])


def test_positive_sentences_are_those_that_negate_nothing() -> None:
    positive = ReportViews({"positive": 1}, ENGLISH)
    assert set(draws(positive, of(*FIVE), 5)) == {"Nodule in the apex. Large heart. Dense bone."}
    assert set(draws(positive, of("No nodule.", "Normal heart."), 5)) == {"No nodule. Normal heart."}, (
        "the whole report"
    )


def test_an_empty_view_is_the_report_and_an_empty_report_says_so() -> None:
    for name in ("report", "sentence", "sentences", "positive", "findings", "absent"):
        assert ReportViews({name: 1}, ENGLISH).draw(Report({"findings": " "}), np.random.default_rng(0)) == NO_REPORT
    assert set(draws(ReportViews({"absent": 1}, ENGLISH), of(*FIVE), 3)) == {" ".join(FIVE)}


def test_sentences_are_shuffled_only_if_asked() -> None:
    report = of(*FIVE[:2])
    assert set(draws(ReportViews({"report": 1}, ENGLISH), report)) == {" ".join(FIVE[:2])}
    counts = Counter(draws(ReportViews({"report": 1}, ENGLISH, shuffle=True), report))
    assert set(counts) == {" ".join(FIVE[:2]), " ".join(FIVE[1::-1])}
    assert min(counts.values()) > 150


def test_two_languages_do_not_share_their_words() -> None:
    german, turkish = (Language(name=name, negations=(word,)) for name, word in (("de", "kein"), ("tr", "yok")))
    assert [language.negates("kein Erguss") for language in (german, turkish, german)] == [True, False, True]


def test_sentences_are_numbered_by_a_list() -> None:
    """Each once per report and in its order, over all sections; those that the list lacks have no number."""
    reports = [Report({"findings": " ".join(FIVE[:2]), "impression": FIVE[0]}), of(FIVE[4], FIVE[0]), Report({})]
    stated = stated_sentences(reports)
    assert stated == [FIVE[:2], [FIVE[4], FIVE[0]], [""]]
    assert sentence_numbers(stated, FIVE).tolist() == [[0, 1], [4, 0], [-1, -1]]
    assert sentence_numbers(stated, FIVE[:2]).tolist() == [[0, 1], [0, -1], [-1, -1]]
    assert sentence_numbers(stated, FIVE[2:4]).tolist() == [[-1], [-1], [-1]]
    assert stated_sentences([of("...")]) == [["..."]], "as in the text encoder"


def test_the_sentences_of_a_very_long_report_are_cut() -> None:
    known = [f"Nodule {number} of many." for number in range(2 * MOST_SENTENCES)]
    assert sentence_numbers([known[::-1]], known).tolist() == [[*range(2 * MOST_SENTENCES - 1, MOST_SENTENCES - 1, -1)]]
