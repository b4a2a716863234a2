"""Phantom reports with their true findings, without drawing volumes."""

from __future__ import annotations

import numpy as np

from ctclip.phantom.findings_lung import Detail
from ctclip.phantom.prevalence import FINDINGS, draw_findings
from ctclip.phantom.report import NOT_GIVEN, write_report

KINDS = {
    "Medical material": ("pacemaker", "sternotomy", "port", "stent"),
    "Lung nodule": ("solid", "subsolid"),
    "Lymphadenopathy": ("mediastinal", "axillary"),
}


def phantom_reports(count: int, seed: int = 0) -> tuple[list[dict[str, str]], np.ndarray]:
    """``count`` reports with CT-RATE's column names, and the findings among the 18 for which each is written (count,
    18)."""
    reports, truth = [], np.zeros((count, len(FINDINGS)), dtype=bool)
    for row in range(count):
        random = np.random.default_rng([seed, row])
        present = draw_findings(random)
        details = [_detail(name, random) for name in FINDINGS if name in present]
        report = write_report(details, random, contrast=bool(row % 4 == 0), slice_mm=1.5)
        reports.append({name: "" if text == NOT_GIVEN else text for name, text in report.items()})
        truth[row] = [name in present for name in FINDINGS]
    return reports, truth


def _detail(name: str, random: np.random.Generator) -> Detail:
    side = str(random.choice(["left", "right", "both"]))
    lobes = ["upper", "lower", "middle", ""] if side == "right" else ["upper", "lower", ""]
    return Detail(
        name,
        side=side,
        lobe=str(random.choice(lobes)),
        size_mm=float(random.integers(4, 40)),
        severity=str(random.choice(["mild", "moderate", "severe"])),
        count=int(random.integers(1, 4)),
        kind=str(random.choice(KINDS.get(name, ("",)))),
    )
