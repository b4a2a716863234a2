"""The draft of a report: the claims of each sentence, the detector's probability of each claim, and its location."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ctclip.drafting.writers import SECTIONS, Detected, Writer
from ctclip.errors import DataError, ExplanationError
from ctclip.explanation.explain import explain
from ctclip.explanation.place import Place
from ctclip.heads.head import Head
from ctclip.heads.locator import Locator
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.outputs import check_file, claimed_file
from ctclip.preprocessing.pipeline import Prepared
from ctclip.report_reading.findings import Cleaner, Finding
from ctclip.report_reading.reader import Status

KIND = "ctclip draft"
NOTE = "for research, not for diagnosis; a draft that no radiologist has reviewed is not a report"


@dataclass(frozen=True)
class Claim:
    """One finding that a sentence states.

    ``probability``: the detector's probability of the claim (the probability of absence, if absence is claimed); None
    if the detector does not score the finding. ``denied``: whether the detector contradicts the claim. ``place``: the
    peak of the finding's map, if the finding is claimed to be present; ``elsewhere``: whether the sentence names the
    side opposite to the peak.
    """

    finding: str
    status: Status
    side: str = ""
    probability: float | None = None
    denied: bool = False
    place: Place | None = None

    @property
    def elsewhere(self) -> bool:
        sides = {self.side, self.place.side if self.place is not None else ""}
        return sides == {"left", "right"}

    def facts(self) -> dict[str, Any]:
        """The claim for JSON."""
        place = None
        if self.place is not None:
            kept = ("method", "peak_mm_lps", "peak_mm_ras", "peak_voxel_column_row_slice", "side")
            place = {name: value for name, value in self.place.facts().items() if name in kept}
        return {
            "finding": self.finding, "status": self.status.value, "side": self.side or None,
            "probability": None if self.probability is None else round(self.probability, 4),
            "denied": self.denied, "place": place, "on_the_other_side": self.elsewhere,
        }  # fmt: skip

    def __str__(self) -> str:
        words = [f"{self.finding} {self.status.value}"]
        words[0] += "" if self.probability is None else f" {self.probability:.2f}"
        words += ["denied by the detector"] if self.denied else []
        if self.place is not None:
            lps = ", ".join(f"{value:.0f}" for value in self.place.peak_lps)
            side = f", {self.place.side}" if self.place.side else ""
            words.append(f"peak at ({lps}) mm LPS{side}" + (", not the side named" if self.elsewhere else ""))
        return "; ".join(words)


@dataclass(frozen=True)
class DraftSentence:
    """A sentence of a draft, and its claims."""

    text: str
    claims: tuple[Claim, ...]

    @property
    def denied(self) -> bool:
        """Whether the detector denies any of its claims."""
        return any(claim.denied for claim in self.claims)

    def __str__(self) -> str:
        mark = "[!] " if self.denied else ""
        return f"{mark}{self.text}" + (f"  [{' | '.join(map(str, self.claims))}]" if self.claims else "")


@dataclass(frozen=True)
class Draft:
    """The sections of a drafted report, sentence by sentence. Prints as text."""

    scan: str
    model: str
    method: str
    sections: Mapping[str, tuple[DraftSentence, ...]]
    warnings: tuple[str, ...] = ()

    def text(self, section: str) -> str:
        """The words of one section."""
        return " ".join(sentence.text for sentence in self.sections[section])

    def facts(self) -> dict[str, Any]:
        """The draft for JSON."""
        sections = {
            name: [
                {"text": one.text, "denied": one.denied, "claims": [claim.facts() for claim in one.claims]} for one in sentences
            ]
            for name, sentences in self.sections.items()
        }  # fmt: skip
        return {
            "kind": KIND, "scan": self.scan, "model": self.model, "method": self.method, "note": NOTE, **sections,
            "warnings": list(self.warnings),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{KIND} of {self.scan} ({self.method}; {NOTE})"]
        for name, sentences in self.sections.items():
            lines += ["", name.upper(), *map(str, sentences)]
        if any(sentence.denied for sentences in self.sections.values() for sentence in sentences):
            lines += ["", "[!] the detector denies what this sentence claims"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write ``.json`` or ``.txt``. Raises PreprocessingError if ``path`` is an existing file that is not a
        draft."""
        path = Path(path)
        check_output(path, force=force)
        with claimed_file(path):
            content = json.dumps(self.facts(), indent=2, ensure_ascii=False) if path.suffix == ".json" else str(self)
            write_text(path, content + "\n")
        return path


def draft(
    encoded: Encoded, detected: Detected, writer: Writer, cleaner: Cleaner
) -> dict[str, tuple[DraftSentence, ...]]:
    """The sections that ``writer`` writes of one encoded volume, with the detector's verdict on each claim."""
    written = writer.write(encoded, detected)
    return {
        section: tuple(
            DraftSentence(one.text, tuple(_claim(finding, detected) for finding in one.findings))
            for one in cleaner.clean(written.get(section, ""))
        )
        for section in SECTIONS
    }


def with_places(
    sections: Mapping[str, tuple[DraftSentence, ...]],
    model: DualEncoder,
    detector: Head,
    prepared: Prepared,
    locator: Locator | None = None,
    **naming: str,
) -> tuple[dict[str, tuple[DraftSentence, ...]], list[str]]:
    """Add the place of each finding that is claimed to be present; return the sections and warnings. The maps are
    those of ``locator`` if there is one, else of similarity. ``naming``: ``scan`` and ``model_hash``, see ``explain``."""
    claims = [claim for sentences in sections.values() for sentence in sentences for claim in sentence.claims]
    names = list(dict.fromkeys(claim.finding for claim in claims if _has_place(claim)))
    if not names:
        return dict(sections), []
    try:
        by = "similarity" if locator is None else "learned"
        places = explain(model, detector, prepared, names, by=by, locator=locator, **naming).places  # type: ignore[arg-type]
    except ExplanationError as error:
        return dict(sections), [f"no places: {error}"]
    return {
        name: tuple(DraftSentence(one.text, tuple(_placed(claim, places) for claim in one.claims)) for one in sentences)
        for name, sentences in sections.items()
    }, []


def check_output(path: Path, *, force: bool = False) -> None:
    """Raise unless a draft may be written to ``path``."""
    if path.suffix not in (".json", ".txt"):
        raise DataError(f"{path}: end the name in .json or .txt")
    check_file(path, _is_draft, force=force)


def _claim(finding: Finding, detected: Detected) -> Claim:
    p = detected.probabilities.get(finding.label)
    if p is None:
        return Claim(finding.label, finding.status, finding.side)
    present = finding.status is not Status.absent
    # An uncertain sentence makes no claim that could be denied.
    denied = finding.status is not Status.uncertain and detected.present[finding.label] is not present
    return Claim(finding.label, finding.status, finding.side, p if present else 1 - p, denied)


def _has_place(claim: Claim) -> bool:
    return claim.status is Status.present and claim.probability is not None


def _placed(claim: Claim, places: Mapping[str, Place]) -> Claim:
    place = places.get(claim.finding) if _has_place(claim) else None
    return Claim(claim.finding, claim.status, claim.side, claim.probability, claim.denied, place)


def _is_draft(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return KIND in stream.read(200)
    except OSError:
        return False
