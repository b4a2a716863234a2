"""Write a report with four sections about a phantom: it states the positive findings and some negative ones, and omits
the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctclip.phantom import language
from ctclip.phantom.findings_lung import Detail
from ctclip.phantom.prevalence import FINDINGS, MEDIASTINUM

NOT_GIVEN = "Not given."
STATED_NEGATIVES = 0.4


def write_report(
    details: Sequence[Detail], random: np.random.Generator, *, contrast: bool, slice_mm: float
) -> dict[str, str]:
    """The four sections, by CT-RATE's column names."""
    return {
        "ClinicalInformation_EN": _pick(language.CLINICAL, random) if random.random() < 0.85 else NOT_GIVEN,
        "Technique_EN": _pick(language.TECHNIQUES[contrast], random).format(slice=f"{slice_mm:g}") if random.random() < 0.9 else NOT_GIVEN,
        "Findings_EN": _findings(details, random),
        "Impressions_EN": _impression(details, random),
    }  # fmt: skip


def _findings(details: Sequence[Detail], random: np.random.Generator) -> str:
    present = {detail.finding: detail for detail in details}
    chest: list[str] = []
    lungs: list[str] = []
    for name in FINDINGS:
        positive, _, negative = language.PHRASES[name]
        sentence = None
        if name in present:
            sentence = _fill(_pick(positive, random), present[name])
        elif random.random() < STATED_NEGATIVES:
            sentence = _pick(negative, random)
        if sentence:
            (chest if name in MEDIASTINUM else lungs).append(sentence)
    for part in (chest, lungs):
        random.shuffle(part)
    normal = [language.NORMAL[i] for i in random.permutation(len(language.NORMAL))[: random.integers(2, 6)]]
    # Radiologists start with the mediastinum or with the lungs.
    first, second = (chest, lungs) if random.random() < 0.7 else (lungs, chest)
    return " ".join([normal[0], *first, *second, *normal[1:]])


def _impression(details: Sequence[Detail], random: np.random.Generator) -> str:
    if random.random() < 0.06:
        return NOT_GIVEN
    # Minor findings are often left out of the impression.
    named = [detail for detail in details if random.random() < (0.6 if detail.severity == "mild" else 0.92)]
    if not named:
        return _pick(language.NORMAL_IMPRESSIONS, random) if not details else NOT_GIVEN
    return " ".join(_fill(_pick(language.PHRASES[d.finding][1], random), d) for d in _shuffled(named, random))


def _fill(template: str, detail: Detail) -> str:
    where, side = _where(detail), {"both": "bilateral"}.get(detail.side, detail.side)
    on_side = "on both sides" if detail.side == "both" else f"on the {detail.side}"
    kind = language.KINDS.get(detail.kind, detail.kind)
    number = "Several nodules are present, a" if detail.count > 1 else "A"
    text = template.format(
        where=where, where_cap=_capital(where), side=side, Side_cap=_capital(side), on_side=on_side,
        size=f"{detail.size_mm:.0f}", severity=detail.severity, Severity=_capital(detail.severity),
        severity_ly=f"{detail.severity}ly".replace("yly", "ily"), kind=kind, Kind=_capital(kind),
        Number=number,
    )  # fmt: skip
    return _capital(text)


def _where(detail: Detail) -> str:
    if detail.side == "both":
        return f"both {detail.lobe} lobes" if detail.lobe in ("upper", "lower") else "both lungs"
    return f"the {detail.side} {detail.lobe} lobe" if detail.lobe else f"the {detail.side} lung"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pick(options: Sequence[str], random: np.random.Generator) -> str:
    return options[int(random.integers(len(options)))]


def _shuffled(items: list[Detail], random: np.random.Generator) -> list[Detail]:
    return [items[i] for i in random.permutation(len(items))]
