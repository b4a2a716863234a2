"""Only sides and sizes are removed from sentences."""

from __future__ import annotations

import pytest

from ctclip.labels import load_labels
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.reduce import Reducer
from ctclip.report_reading.rules import RulesReader

CLEANER = Cleaner(RulesReader.build(load_labels("ct_rate_18"), Options()))
REDUCER = Reducer(CLEANER)


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("A consolidation is seen in the right upper lobe.", "A consolidation is seen."),
        ("There is a mild bilateral pleural effusion.", "There is a mild pleural effusion."),
        ("Left pleural effusion.", "Pleural effusion."),
        ("Pleural fluid is seen on both sides.", "Pleural fluid is seen."),
        ("The bronchi of the left lung are dilated.", "The bronchi are dilated."),
        ("No nodule is seen in either lung; consolidation in the left lower lobe.", "No nodule is seen in either lung; consolidation."),
        ("Cardiomegaly is present.", "Cardiomegaly is present."),
        # The location is the subject of the sentence.
        ("The left lower lobe shows a consolidation.", None),
        ("Bands of atelectasis cross both lower lobes.", None),
    ],
)  # fmt: skip
def test_sides(text: str, without: str | None) -> None:
    (sentence,) = CLEANER.clean(text)
    reduced = REDUCER.without_sides(sentence)
    assert (None if reduced is None else reduced.text) == without
    if reduced is not None:
        assert not any(finding.side or finding.lobe for finding in reduced.findings)
        assert [(f.label, f.status) for f in reduced.findings] == [(f.label, f.status) for f in sentence.findings]


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("A 9 mm lung nodule is present in the left lung.", "A lung nodule is present in the left lung."),
        ("A nodule of 13 x 9 mm in diameter is observed.", "A nodule is observed."),
        ("Pericardial fluid measuring 1.5 cm is seen.", "Pericardial fluid is seen."),
        ("Nodule, 11 mm.", "Nodule."),
        ("Enlarged lymph nodes up to 17 mm are seen.", "Enlarged lymph nodes are seen."),
        ("There is a nodule in segment 6.", "There is a nodule in segment 6."),
        # The size is the subject of the sentence.
        ("Several lymph nodes exceed 10 mm in short axis.", None),
    ],
)
def test_sizes(text: str, without: str | None) -> None:
    (sentence,) = CLEANER.clean(text)
    reduced = REDUCER.without_sizes(sentence)
    assert (None if reduced is None else reduced.text) == without
    if reduced is not None:
        assert all(finding.size_mm is None for finding in reduced.findings)
        assert [(f.label, f.side) for f in reduced.findings] == [(f.label, f.side) for f in sentence.findings]
