"""Cleaning reports: headings in many styles, findings with places and sizes, and sentences that do not describe the
scan."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ctclip.cli import main
from ctclip.labels import load_labels
from ctclip.language import load_language
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from ctclip.report_reading.sections import split_sections

HEADINGS = load_language("english").wording.headings
CLEANER = Cleaner(RulesReader.build(load_labels("ct_rate_18"), Options()))


@pytest.mark.parametrize(
    "text",
    [
        "Technique: Axial CT.\nFindings: A nodule.\nNo effusion.\nImpression: Nodule.",
        "TECHNIQUE:\nAxial CT.\n\nFINDINGS:\nA nodule.\nNo effusion.\n\nIMPRESSION:\nNodule.",
        "TECHNIQUE: Axial CT. FINDINGS: A nodule.\nNo effusion. IMPRESSION: Nodule.",
        "**Technique:** Axial CT.\n**Findings:** A nodule.\nNo effusion.\n**Impression:** Nodule.",
        "## Technique\nAxial CT.\n## Findings\nA nodule.\nNo effusion.\n## Conclusion\nNodule.",
        "Technique\n---------\nAxial CT.\nFindings\n--------\nA nodule.\nNo effusion.\nOpinion\n-------\nNodule.",
        "[TECHNIQUE]\nAxial CT.\n[FINDINGS]\nA nodule.\nNo effusion.\n[IMPRESSION]\nNodule.",
        "1. Technique: Axial CT.\n2. Findings: A nodule.\nNo effusion.\n3. Impression: Nodule.",
        "Technique - Axial CT.\nFindings - A nodule.\nNo effusion.\nImpression - Nodule.",
    ],
)
def test_headings_of_many_styles(text: str) -> None:
    sections = split_sections(text, HEADINGS)
    assert {name: part.split() for name, part in sections.items()} == {
        "technique": ["Axial", "CT."], "findings": ["A", "nodule.", "No", "effusion."], "impression": ["Nodule."],
    }  # fmt: skip


def test_words_within_a_sentence_are_no_headings() -> None:
    text = "The findings are unchanged. Results of the last CT: a nodule. History of cancer."
    assert split_sections(text, HEADINGS) == {"text": text}
    assert split_sections("Before. \nFindings: One.\nImpression: Two.\nFindings: Three.", HEADINGS) == {
        "text": "Before.", "findings": "One.\nThree.", "impression": "Two.",
    }  # fmt: skip


FINDINGS = {
    "A 7 mm nodule in the right upper lobe.": [("Lung nodule", "present", "right", "upper", 7.0)],
    "There is a 7 mm nodule in the right upper lobe and a left pleural effusion.": [
        ("Lung nodule", "present", "right", "upper", 7.0),
        ("Pleural effusion", "present", "left", "", None),
    ],
    "Nodule of 1.2 x 0.9 cm, left lower lobe.": [("Lung nodule", "present", "", "", 12.0)],
    "13x9 mm nodule at the left base.": [("Lung nodule", "present", "left", "lower", 13.0)],
    "Bilateral pleural effusions.": [("Pleural effusion", "present", "both", "", None)],
    "Atelectasis in the right and left lower lobes.": [("Atelectasis", "present", "both", "lower", None)],
    "Possible consolidation in the middle lobe.": [("Consolidation", "uncertain", "", "middle", None)],
    "No pleural effusion on the right.": [("Pleural effusion", "absent", "right", "", None)],
    "The trachea is open.": [],
}


@pytest.mark.parametrize("sentence", FINDINGS)
def test_a_finding_with_its_side_lobe_size_and_certainty(sentence: str) -> None:
    (clean,) = CLEANER.clean(sentence)
    got = [(f.label, f.status.value, f.side, f.lobe, f.size_mm) for f in clean.findings]
    if sentence.startswith("Nodule of 1.2"):
        # The words after the comma belong to it: nothing else there could own them.
        assert got == [("Lung nodule", "present", "left", "lower", 12.0)]
    else:
        assert got == FINDINGS[sentence]


def test_comparison_boilerplate_and_typos_are_marked_and_mended() -> None:
    text = "The Nodul in the left lung is unchanged since the previous CT. Clinical correlation is recommended. PLUERAL effusion."
    first, second, third = CLEANER.clean(text)
    assert (first.text.split()[1], first.comparison, first.boilerplate) == ("Nodule", True, False)
    assert first.findings[0].label == "Lung nodule"
    assert (second.comparison, second.boilerplate) == (False, True)
    assert third.text == "PLEURAL effusion."
    assert third.findings[0].label == "Pleural effusion"


def test_the_command_writes_a_row_for_each_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "FINDINGS: A 7 mm nodule in the right upper lobe. The trachea is open. IMPRESSION: Nodule."
    pd.DataFrame({"study_id": ["s1"], "text": [text]}).to_csv(tmp_path / "r.csv", index=False)
    arguments = ["clean-reports", str(tmp_path / "r.csv"), "--label-set", "ct_rate_18", "-o", str(tmp_path / "f.csv")]
    for _ in range(2):
        assert main(arguments) == 0
    table = pd.read_csv(tmp_path / "f.csv", keep_default_na=False)
    assert table[["study_id", "section", "label", "side", "lobe", "size_mm"]].values.tolist() == [
        ["s1", "findings", "Lung nodule", "right", "upper", "7.0"],
        ["s1", "findings", "", "", "", ""],
        ["s1", "impression", "Lung nodule", "", "", ""],
    ]
    pd.DataFrame({"study_id": ["s1"], "text": ["A nodule."]}).to_csv(tmp_path / "r.csv", index=False)
    assert main(arguments) == 2
    assert "holds other findings; give another --output, or replace it with --force" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "f.csv")) == 3
    assert main([*arguments, "--force"]) == 0
    assert len(pd.read_csv(tmp_path / "f.csv")) == 1
    parquet = [*arguments[:-1], str(tmp_path / "f.parquet")]
    assert main(parquet) == main(parquet) == 0
    (tmp_path / "f.csv").write_text("mine\n")
    assert main(arguments) == 2
    assert "was not written by this command" in capsys.readouterr().err


def test_reports_without_findings_that_could_be_read_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = (
        "Es zeigt sich ein ausgedehnter Pleuraerguss auf der linken Seite mit Kompression der Lunge und des Herzens."
    )
    rows = pd.DataFrame({"id": ["a", "b", "c"], "text": ["A nodule is seen.", " ", german]})
    rows.to_csv(tmp_path / "r.csv", index=False)
    assert (
        main(["clean-reports", str(tmp_path / "r.csv"), "--label-set", "ct_rate_18", "-o", str(tmp_path / "f.csv")])
        == 0
    )
    printed = capsys.readouterr().out
    assert "note: report 'b' is empty: its findings are not listed" in printed
    assert "note: report 'c' is not in english, judging by its words: its findings are not listed" in printed
