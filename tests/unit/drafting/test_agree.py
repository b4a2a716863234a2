"""A decoder's text is made to agree with its prompt, in finding, side and negation."""

from __future__ import annotations

from ctclip.drafting.agree import agree
from ctclip.labels import load_labels
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader

CLEANER = Cleaner(RulesReader.build(load_labels("ct_rate_18"), Options()))
PHRASINGS = {
    (name, True, section): f"{name} is seen."
    for name in ("Emphysema", "Pleural effusion", "Cardiomegaly")
    for section in ("findings", "impression")
}


def test_text_states_what_was_told_and_no_more() -> None:
    text = (
        "The trachea is open. There is a left pleural effusion. There is a right pleural effusion. No emphysema is seen. "
        "A nodule is seen. Possible consolidation. No hiatal hernia is seen. No hiatal hernia is seen."
    )
    told, sides = ["Pleural effusion", "Emphysema"], {"Pleural effusion": "right", "Cardiomegaly": "left"}
    agreed = agree({"findings": text, "impression": ""}, told, sides, CLEANER, PHRASINGS)
    assert agreed == {
        "findings": "The trachea is open. There is a right pleural effusion. No hiatal hernia is seen. Emphysema is seen.",
        "impression": "Pleural effusion is seen. Emphysema is seen.",
    }


def test_a_side_that_is_not_known_is_not_named() -> None:
    agreed = agree({"findings": "There is a left pleural effusion."}, ["Pleural effusion"], {}, CLEANER, PHRASINGS)
    assert agreed == {"findings": "Pleural effusion is seen."}
    nothing = agree({"findings": "There is no pleural effusion. Cardiomegaly is seen."}, [], {}, CLEANER, PHRASINGS)
    assert nothing == {"findings": "There is no pleural effusion."}
