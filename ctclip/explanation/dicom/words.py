"""Text of the DICOM objects: codes of findings, equipment, and the note that they are for research."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ctclip import __version__

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept

    from ctclip.explanation.explain import Explanation

RESEARCH = "RESEARCH, NOT FOR DIAGNOSIS"
# The designator of a private coding scheme begins with 99 (PS3.16, 8.2).
SCHEME = "99CTCLIP"
# Maximum length of a code meaning and of a label.
LONGEST = 64


def plain(text: str, longest: int = LONGEST) -> str:
    """A text without the characters that DICOM forbids in a label, cut to the maximum length."""
    return " ".join("".join(c if c.isprintable() and c != "\\" else " " for c in text).split())[:longest]


def code(finding: str) -> CodedConcept:
    """The code of a finding: a SNOMED CT code if the tables of DICOM (PS3.16) list exactly this name, else a code of
    our private scheme, which depends on the name alone."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    known = getattr(codes.SCT, "".join(word.capitalize() for word in finding.split()) or "none", None)
    if known is not None and known.meaning.lower() == finding.lower():
        return CodedConcept(known.value, known.scheme_designator, known.meaning)
    digest = hashlib.sha256(finding.lower().encode()).hexdigest()
    return CodedConcept(digest[:12], SCHEME, plain(finding) or "finding")


def equipment(explanation: Explanation) -> dict[str, Any]:
    """Arguments for highdicom that describe the equipment that created an object."""
    return {
        "manufacturer": "ctclip", "manufacturer_model_name": algorithm(explanation)[0],
        "software_versions": __version__, "device_serial_number": explanation.model,
    }  # fmt: skip


def algorithm(explanation: Explanation) -> tuple[str, str]:
    """The model's name, and its version: the version of ctclip and the hash of the weights."""
    return plain(f"ctclip {explanation.model_name}"), f"{__version__} model {explanation.model}"
