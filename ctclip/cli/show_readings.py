"""Tables that `ctclip read-reports` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ctclip.preprocessing.files import write_text
from ctclip.report_reading.compare import Agreement, Disagreement, mean_of
from ctclip.report_reading.reader import Status
from ctclip.report_reading.run import Readings, comparison_file

EXAMPLES = 5


def show_counts(result: Readings) -> None:
    """Print the number of reports with each status, by label."""
    width = max(map(len, result.labels.names))
    print(f"{'':{width}}" + "".join(f"{status.value:>15}" for status in Status))
    for name, counts in result.counts().items():
        print(f"{name:{width}}" + "".join(f"{counts[status]:15d}" for status in Status))


def show_agreement(agreements: list[Agreement], disagreements: list[Disagreement], output: Path) -> None:
    """Print the agreement by label and some sentences that are read differently; write all of these to a JSON file
    beside ``output``."""
    width = max(len(agreement.label) for agreement in agreements)
    print(f"\n{'compared':{width}}   reports  agreement    kappa       F1     ours   theirs")
    for a in agreements:
        figures = "".join(f"{'-' if x is None else format(x, '.3f'):>9}" for x in (a.kappa, a.f1))
        agreed = "-" if a.agreement is None else f"{a.agreement:.3f}"
        print(f"{a.label:{width}} {a.reports:9d} {agreed:>10}{figures} {a.ours:8d} {a.theirs:8d}")
    means = {figure: mean_of(agreements, figure) for figure in ("agreement", "kappa", "f1")}
    print("mean: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items() if value is not None))
    for d in disagreements[:EXAMPLES]:
        print(f"differs: {d.report}, {d.label}: {d.ours} by {d.our_sentence!r}, {d.theirs} by {d.their_sentence!r}")
    path = comparison_file(output)
    values = {
        "mean": means, "labels": [asdict(a) for a in agreements], "disagreements": [asdict(d) for d in disagreements]
    }  # fmt: skip
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False))
    print(f"comparison: {path} ({len(disagreements)} disagreements)")
