"""A decoder's text is made to agree with its prompt, in finding, side and negation."""

from __future__ import annotations

from collections.abc import Mapping

from ctclip.drafting.agree import agree
from ctclip.labels import load_labels
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader

CLEANER = Cleaner(RulesReader.build(load_labels("ct_rate_18"), Options()))


class Phrasings:
    """A phrase for each finding, and for the sides of an effusion."""

    def present(self, name: str, section: str, sides: Mapping[str, str]) -> str:
        side = sides.get(name) if name == "Pleural effusion" else None
        return f"{name} on the {side}." if side else f"{name} is seen."


PHRASINGS = Phrasings()


def test_text_states_what_was_told_and_no_more() -> None:
    text = (
        "The trachea is open. There is a left pleural effusion. There is a right pleural effusion. No emphysema is seen. "
        "A nodule is seen. Possible consolidation. No hiatal hernia is seen. No hiatal hernia is seen."
    )
    told, sides = ["Pleural effusion", "Emphysema"], {"Pleural effusion": "right", "Cardiomegaly": "left"}
    agreed = agree({"findings": text, "impression": ""}, told, sides, CLEANER, PHRASINGS)
    assert agreed == {
        "findings": "The trachea is open. There is a right pleural effusion. No hiatal hernia is seen. Emphysema is seen.",
        "impression": "Pleural effusion on the right. Emphysema is seen.",
    }


def test_a_known_side_is_named_once() -> None:
    sides = {"Pleural effusion": "left", "Emphysema": "right"}
    for text, expected in (
        ("There is a pleural effusion.", "Pleural effusion on the left."),
        ("A left pleural effusion. Pleural effusion.", "A left pleural effusion. Pleural effusion."),
        ("Pleural effusion and emphysema are seen.", "Pleural effusion and emphysema are seen. Pleural effusion on the left."),
        ("", "Pleural effusion on the left."),
    ):  # fmt: skip
        told = ["Pleural effusion", *(["Emphysema"] if "emphysema" in text else [])]
        assert agree({"findings": text}, told, sides, CLEANER, PHRASINGS) == {"findings": expected}


def test_a_side_that_is_not_known_is_not_named() -> None:
    agreed = agree({"findings": "There is a left pleural effusion."}, ["Pleural effusion"], {}, CLEANER, PHRASINGS)
    assert agreed == {"findings": "Pleural effusion is seen."}
    nothing = agree({"findings": "There is no pleural effusion. Cardiomegaly is seen."}, [], {}, CLEANER, PHRASINGS)
    assert nothing == {"findings": "There is no pleural effusion."}
