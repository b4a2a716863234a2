"""What the DICOM objects say of themselves: codes of findings, the equipment, and that they are research."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ctclip import __version__

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept

    from ctclip.explanation.explain import Explanation

RESEARCH = "RESEARCH, NOT FOR DIAGNOSIS"
# A scheme of one's own begins with 99 (PS3.16, 8.2).
SCHEME = "99CTCLIP"
# Of a coded value, and of a label.
LONGEST = 64


def plain(text: str, longest: int = LONGEST) -> str:
    """A text without what DICOM does not take in a label, cut to its length."""
    return " ".join("".join(c if c.isprintable() and c != "\\" else " " for c in text).split())[:longest]


def code(finding: str) -> CodedConcept:
    """The code of a finding: that of SNOMED CT where DICOM's own tables (PS3.16) have one of this very name, else one of our
    own scheme, the same for the same name."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    known = getattr(codes.SCT, "".join(word.capitalize() for word in finding.split()) or "none", None)
    if known is not None and known.meaning.lower() == finding.lower():
        return CodedConcept(known.value, known.scheme_designator, known.meaning)
    digest = hashlib.sha256(finding.lower().encode()).hexdigest()
    return CodedConcept(digest[:12], SCHEME, plain(finding) or "finding")


def equipment(explanation: Explanation) -> dict[str, Any]:
    """The arguments of highdicom that say what made an object."""
    return {
        "manufacturer": "ctclip", "manufacturer_model_name": algorithm(explanation)[0],
        "software_versions": __version__, "device_serial_number": explanation.model,
    }  # fmt: skip


def algorithm(explanation: Explanation) -> tuple[str, str]:
    """The model's name, and its version: ours with the hash of its weights."""
    return plain(f"ctclip {explanation.model_name}"), f"{__version__} model {explanation.model}"
