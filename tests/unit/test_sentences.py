"""Sentences of reports as typed: lists, lines, full stops that do not end a sentence, and speed."""

from __future__ import annotations

import re
import time

import pytest

from ctclip.phantom.scan import make_scan
from ctclip.sentences import sentences

TABLE = [
    # Plain
    ("The heart is enlarged. No effusion.", ["The heart is enlarged.", "No effusion."]),
    ("", []),
    (" \n ", []),
    ("No full stop", ["No full stop"]),
    ("Nodule? Infiltration! Mass.", ["Nodule?", "Infiltration!", "Mass."]),
    ("no effusion. heart normal.", ["no effusion.", "heart normal."]),
    ("Oedematous appearance (mediastinitis?) is seen. Normal.", ["Oedematous appearance (mediastinitis?) is seen.", "Normal."]),
    ("Stable nodule (see the last scan.) No effusion.", ["Stable nodule (see the last scan.)", "No effusion."]),
    ("Nodule... follow-up advised. None.", ["Nodule...", "follow-up advised.", "None."]),
    # Decimals and units
    ("A nodule of 1.5 cm. No mass.", ["A nodule of 1.5 cm.", "No mass."]),
    ("Nodes of 13x9.3 mm and 0.8 cm are seen.", ["Nodes of 13x9.3 mm and 0.8 cm are seen."]),
    ("Stable since 2019. No mass.", ["Stable since 2019.", "No mass."]),
    ("A nodule in segment 6. No effusion.", ["A nodule in segment 6.", "No effusion."]),
    # Abbreviations
    ("Seen by Dr. Smith. No mass.", ["Seen by Dr. Smith.", "No mass."]),
    ("Discussed with Dr. J. Smith today. Stable.", ["Discussed with Dr. J. Smith today.", "Stable."]),
    ("A nodule of approx. 5 mm. Stable.", ["A nodule of approx. 5 mm.", "Stable."]),
    ("Changes, e.g. nodules, are seen. Stable.", ["Changes, e.g. nodules, are seen.", "Stable."]),
    ("Scanned after i.v. contrast. No embolus.", ["Scanned after i.v. contrast.", "No embolus."]),
    ("Nodule vs. Granuloma. Follow up.", ["Nodule vs. Granuloma.", "Follow up."]),
    ("As described by Smith et al. in 2019. Stable.", ["As described by Smith et al. in 2019.", "Stable."]),
    ("See series 3, im. 45. No mass.", ["See series 3, im. 45.", "No mass."]),
    ("Station No. 7 is enlarged. Effusion: no. Mass: no.", ["Station No. 7 is enlarged.", "Effusion: no.", "Mass: no."]),
    ("Effusion in the lt. lower lobe. None on the rt. Stable.", ["Effusion in the lt. lower lobe.", "None on the rt.", "Stable."]),
    ("Operated oesophageal ca. Free air is seen.", ["Operated oesophageal ca.", "Free air is seen."]),
    ("Nodules, scars, etc. are seen. No mass.", ["Nodules, scars, etc. are seen.", "No mass."]),
    ("A fracture of the 4. rib is seen. No mass.", ["A fracture of the 4. rib is seen.", "No mass."]),
    # Missing spaces
    ("No effusion.No nodule.", ["No effusion.", "No nodule."]),
    ("A nodule of 5 mm.No mass (at 3.5 cm).The heart is normal.", ["A nodule of 5 mm.", "No mass (at 3.5 cm).", "The heart is normal."]),
    ("Scanned after i.v.Contrast.", ["Scanned after i.v.Contrast."]),
    ("No effusion.no nodule of 5 mm.no mass.", ["No effusion.", "no nodule of 5 mm.", "no mass."]),
    ("Effusion.RUL clear.HEART: Normal.", ["Effusion.", "RUL clear.", "HEART: Normal."]),
    ("Discussed with Dr.Smith at approx.five today.", ["Discussed with Dr.Smith at approx.five today."]),
    ("Stored as image.dcm today. Stable.", ["Stored as image.dcm today.", "Stable."]),
    ("Mild oedema…No effusion… stable.", ["Mild oedema…", "No effusion…", "stable."]),
    ("Patterns (airway disease?vessel disease?) are seen. None.", ["Patterns (airway disease?vessel disease?) are seen.", "None."]),
    ("Postop.defective and post-op.other changes. None.", ["Postop.defective and post-op.other changes.", "None."]),
    # More abbreviations
    ("LAD calc. are seen, max. diam. 5.4 mm. F/u in 3 mo. advised.", ["LAD calc. are seen, max. diam. 5.4 mm.", "F/u in 3 mo. advised."]),
    ("The U.S. shows none. Z.n. Lobektomie. St.p. lobectomy.", ["The U.S. shows none.", "Z.n. Lobektomie.", "St.p. lobectomy."]),
    ("Th. 12 is fractured. Stable.", ["Th. 12 is fractured.", "Stable."]),
    # Full stops of other scripts
    ("心脏增大。无胸腔积液。", ["心脏增大。", "无胸腔积液。"]),
    ("肺结节？建议随访！ 无积液", ["肺结节？", "建议随访！", "无积液"]),
    ("心影增大．结节1．5厘米｡无积液．", ["心影增大．", "结节1．5厘米｡", "无积液．"]),
    ("फेफड़े साफ हैं। कोई द्रव नहीं।", ["फेफड़े साफ हैं।", "कोई द्रव नहीं।"]),
    ("هل يوجد انصباب؟ لا", ["هل يوجد انصباب؟", "لا"]),
    # Lists
    ("1. Cardiomegaly. 2. No effusion.", ["Cardiomegaly.", "No effusion."]),
    ("1. Cardiomegaly.\n2. No effusion.\n", ["Cardiomegaly.", "No effusion."]),
    ("1. Cardiomegaly\n2. Nodule of 1.5 cm\n10. No effusion", ["Cardiomegaly", "Nodule of 1.5 cm", "No effusion"]),
    ("1) Cardiomegaly 2) no effusion 3) nodule", ["Cardiomegaly", "no effusion", "nodule"]),
    ("1. Cardiomegaly 2. No effusion", ["Cardiomegaly", "No effusion"]),
    ("1. Nodule in segment 2. No effusion", ["Nodule in segment 2.", "No effusion"]),
    ("(1) Cardiomegaly.\n(2) Nodule.", ["Cardiomegaly.", "Nodule."]),
    ("a) Cardiomegaly\nb) Nodule", ["Cardiomegaly", "Nodule"]),
    ("1.Cardiomegaly\n2.Nodule", ["Cardiomegaly", "Nodule"]),
    ("- nodule\n- no effusion", ["nodule", "no effusion"]),
    ("-nodule\n–no effusion", ["nodule", "no effusion"]),
    ("• Cardiomegaly.\r\n• Nodule. Stable.\r\n", ["Cardiomegaly.", "Nodule.", "Stable."]),
    ("* A nodule that is seen\n  in both lobes.\n* None", ["A nodule that is seen", "in both lobes.", "None"]),
    ("·A few nodes are seen ·No change (implants?) · Hepatic steatosis", ["A few nodes are seen", "No change (implants?)", "Hepatic steatosis"]),
    ("I. Cardiomegaly\nII. Effusion\nIV. None", ["Cardiomegaly", "Effusion", "None"]),
    ("A. Nodule\nB. Effusion", ["Nodule", "Effusion"]),
    ("A) Nodule B) Effusion c) none", ["Nodule", "Effusion", "none"]),
    ("i) nodule\nii) effusion", ["nodule", "effusion"]),
    ("1 - Nodule\n2- Effusion\n3: Mass\n#4 Cyst\n[5] None", ["Nodule", "Effusion", "Mass", "Cyst", "None"]),
    ("1) Nodule (2.5 cm), 2) effusion", ["Nodule (2.5 cm)", "effusion"]),
    ("①结节 ②积液", ["结节", "积液"]),
    ("1、肺结节 2、胸腔积液", ["肺结节", "胸腔积液"]),
    ("1．肺结节。2．胸腔积液。", ["肺结节。", "胸腔积液。"]),
    ("-nodule -effusion -mass", ["nodule", "effusion", "mass"]),
    ("+ nodule\n> effusion\n→ mass", ["nodule", "effusion", "mass"]),
    ("A nodule in segment I. Normal heart.", ["A nodule in segment I.", "Normal heart."]),
    ("V. cava is dilated. None.", ["V. cava is dilated.", "None."]),
    ("-5 HU on average", ["-5 HU on average"]),
    ("5 mm nodule. 6 mm nodule.", ["5 mm nodule.", "6 mm nodule."]),
    # Lines
    ("Lungs clear\nHeart normal\nNo effusion", ["Lungs clear", "Heart normal", "No effusion"]),
    ("lungs clear\nheart normal", ["lungs clear", "heart normal"]),
    ("Lungs clear\n\nHeart normal", ["Lungs clear", "Heart normal"]),
    ("FINDINGS:\nThe heart is enlarged.", ["FINDINGS: The heart is enlarged."]),
    (
        "There is a nodule of five millimetres in the upper lobe of\nthe left lung, and none elsewhere. The heart is of\nnormal size.",
        ["There is a nodule of five millimetres in the upper lobe of the left lung, and none elsewhere.", "The heart is of normal size."],
    ),
    (
        "No pleural effusion is seen on either side of the chest today\nThe heart is of normal size and shape\nno nodule",
        ["No pleural effusion is seen on either side of the chest today", "The heart is of normal size and shape", "no nodule"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), TABLE)
def test_sentences_of_reports_as_they_are_typed(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_the_phantom_speaks_in_plain_sentences() -> None:
    """Its reports need only a split at every full stop followed by a space."""
    for patient in range(8):
        for text in make_scan(3, patient, scale=10.0, rare_floor=0.2).report.values():
            plain = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part.strip()]
            assert sentences(text) == plain


def test_a_whole_cohort_takes_seconds() -> None:
    """CT-RATE's 24,128 reports have 1,800 characters on average: a part of them, at a rate far below one minute for
    all."""
    report = " ".join(text for text, _ in TABLE[:26] * 2)
    began = time.process_time()
    for _ in range(300):
        sentences(report)
    # A third of it on an idle machine.
    assert time.process_time() - began < 2
    assert len(report) > 1800
