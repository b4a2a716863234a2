"""Known weaknesses of such systems: negation before and after, lists, pseudo-negation, doubt, the past, numbers, sides.
Each case is our own sentence with the status that a radiologist would assign.
"""

from __future__ import annotations

import pytest

from ctclip.labels import load_labels
from ctclip.language import load_language
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from ctclip.report_reading.terms import LabelTerms, Terms

TERMS = Terms(
    name="test",
    labels={
        "nodule": LabelTerms(present=("nodule*",), ignore=("thyroid nodule*",)),
        "effusion": LabelTerms(present=("pleura* & effusion*", "effusion* ! pericard*")),
        "pericardial": LabelTerms(present=("pericard* & effusion*",)),
        "consolidation": LabelTerms(present=("consolidation*",)),
        "heart": LabelTerms(present=("heart .. enlarged", "cardiomegaly"), absent=("heart size .. normal",)),
        "catheter": LabelTerms(present=("catheter*",)),
    },
)
READER = RulesReader(TERMS, load_language("english"))

CASES = {
    "stated": [
        ("A 7 mm nodule is seen.", {"nodule": "present"}),
        ("Bilateral pleural effusions, larger on the right.", {"effusion": "present"}),
    ],
    "negation before": [
        ("No nodule is seen.", {"nodule": "absent"}),
        ("There is no evidence of a pleural effusion.", {"effusion": "absent"}),
        ("Lungs without nodules.", {"nodule": "absent"}),
        ("The heart is not enlarged.", {"heart": "absent"}),
        ("Neither consolidation nor effusion is present.", {"consolidation": "absent", "effusion": "absent"}),
        ("Negative for consolidation.", {"consolidation": "absent"}),
    ],
    "negation behind": [
        ("Pleural effusion was not observed.", {"effusion": "absent"}),
        ("Consolidation is absent.", {"consolidation": "absent"}),
        ("Pleural effusion: none.", {"effusion": "absent"}),
        ("Nodules or consolidation have not been detected.", {"nodule": "absent", "consolidation": "absent"}),
    ],
    "lists": [
        (
            "No evidence of consolidation, effusion or nodules.",
            {"consolidation": "absent", "effusion": "absent", "nodule": "absent"},
        ),
        (
            "Consolidation, pleural effusion and nodules were not observed.",
            {"consolidation": "absent", "effusion": "absent", "nodule": "absent"},
        ),
        ("No consolidation, nodule is seen.", {"consolidation": "absent", "nodule": "absent"}),
        ("Nodules in both lungs and no effusion.", {"nodule": "present", "effusion": "absent"}),
        (
            "Pleural effusion is seen on the right and pericardial effusion was not observed.",
            {"effusion": "present", "pericardial": "absent"},
        ),
        (
            "No consolidation was detected, and a nodule is seen on the left.",
            {"consolidation": "absent", "nodule": "present"},
        ),
    ],
    "clauses": [
        ("No consolidation, but a nodule is present.", {"consolidation": "absent", "nodule": "present"}),
        ("No effusion; nodules in both lungs.", {"effusion": "absent", "nodule": "present"}),
        ("No consolidation except for nodules at the base.", {"consolidation": "absent", "nodule": "present"}),
        ("Nodule on the left; however, no effusion.", {"nodule": "present", "effusion": "absent"}),
    ],
    "pseudo-negation": [
        ("No change in the nodule.", {"nodule": "present"}),
        ("No significant increase in the size of the pleural effusion.", {"effusion": "present"}),
        ("The nodule has not changed.", {"nodule": "present"}),
        ("Not only consolidation but also an effusion.", {"consolidation": "present", "effusion": "present"}),
        ("The nodule cannot be evaluated without contrast.", {"nodule": "uncertain"}),
        ("Because of the lack of intravenous contrast, the effusion is seen poorly.", {"effusion": "present"}),
    ],
    "doubt": [
        ("Consolidation cannot be excluded.", {"consolidation": "uncertain"}),
        ("Possible consolidation at the left base.", {"consolidation": "uncertain"}),
        ("Opacity suspicious for consolidation.", {"consolidation": "uncertain"}),
        ("Small density on the left (nodule?).", {"nodule": "uncertain"}),
        ("A pleural effusion cannot be ruled out.", {"effusion": "uncertain"}),
        ("No possible nodule.", {"nodule": "absent"}),
        ("Pleural effusion is unlikely.", {"effusion": "uncertain"}),
        ("Consolidation versus atelectasis.", {"consolidation": "uncertain"}),
    ],
    "the past": [
        ("The pleural effusion has resolved.", {"effusion": "absent"}),
        ("Complete resolution of the consolidation.", {"consolidation": "absent"}),
        ("The nodule is no longer seen.", {"nodule": "absent"}),
        ("History of pleural effusion.", {}),
        ("Evaluate for pleural effusion.", {}),
        ("Interval removal of the catheter.", {"catheter": "absent"}),
        ("The catheter seen before has been removed.", {"catheter": "absent"}),
        ("The consolidation, which was seen in May, was not observed.", {"consolidation": "absent"}),
    ],
    "said of something else": [
        ("A thyroid nodule of 9 mm.", {}),
        ("An effusion is seen in the pericardial space.", {"pericardial": "present"}),
        ("A thyroid nodule and a nodule in the right lung.", {"nodule": "present"}),
    ],
    "normal": [
        ("Heart size is normal.", {"heart": "absent"}),
        ("Heart size is not normal.", {"heart": "present"}),
    ],
    "numbers": [
        ("Nodule of 7.5 mm. No. 3 of the series.", {"nodule": "present"}),
        ("A 13x9 mm nodule and a 4 mm nodule, neither of them growing.", {"nodule": "present"}),
    ],
    "sides": [
        ("Effusion on the right, none on the left.", {"effusion": "present"}),
        ("No pleural effusion on the right. Pleural effusion on the left.", {"effusion": "present"}),
    ],
}


@pytest.mark.parametrize(
    ("sentence", "labels"), [case for cases in CASES.values() for case in cases], ids=lambda value: str(value)[:60]
)
def test_what_a_sentence_says(sentence: str, labels: dict[str, str]) -> None:
    read = READER.read([sentence])[0]
    assert {name: statement.status.value for name, statement in read.items()} == labels


def test_a_finding_that_is_stated_counts_before_doubt_and_denial() -> None:
    text = "No nodule on the left. Possible nodule at the base. A nodule is seen on the right. No other nodule."
    assert READER.read([text])[0]["nodule"].sentence == "A nodule is seen on the right."
    assert READER.read(["No nodule on the left. Possible nodule at the base."])[0]["nodule"].status == "uncertain"


def test_without_a_file_of_terms_names_and_aliases_are_looked_for() -> None:
    labels = load_labels({"name": "mine", "labels": [{"name": "Renal cyst", "aliases": ["Kidney cyst"]}, "free_air"]})
    reader = RulesReader.build(labels, Options())
    read = reader.read(["Kidney cysts on the left. No free air."])[0]
    assert {name: statement.status.value for name, statement in read.items()} == {
        "Renal cyst": "present", "free_air": "absent",
    }  # fmt: skip
