"""F1 and speed of reading labels by rules: ``python -m tests.benchmarks.read_reports [--labelled TABLE]``.

Uses 24,128 phantom reports, the number of scans in CT-RATE's training split; and, if given, a table of reports with the
18 labels of CT-RATE, in two halves by the hash of the id. The terms were written with the first half in view.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.labels import load_labels
from ctclip.phantom.prevalence import FINDINGS
from ctclip.report_reading.reader import NOTHING, Options, Status
from ctclip.report_reading.reports import load_reports
from ctclip.report_reading.rules import RulesReader
from tests.benchmarks.common import machine, table
from tests.phantom_reports import phantom_reports

SCANS = 24_128


def read(texts: list[str]) -> tuple[np.ndarray, float]:
    """Labels present (texts, 18), and processor seconds of one process with an empty cache."""
    reader = RulesReader.build(load_labels("ct_rate_18"), Options())
    began = time.process_time()
    readings = reader.read(texts)
    seconds = time.process_time() - began
    present = [[reading.get(name, NOTHING).status is Status.present for name in FINDINGS] for reading in readings]
    return np.array(present), seconds


def f1(truth: np.ndarray, present: np.ndarray) -> list[float]:
    """Of each label."""
    both, either = (truth & present).sum(axis=0), truth.sum(axis=0) + present.sum(axis=0)
    return [float(value) for value in 2 * both / np.maximum(either, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labelled", type=Path)
    given = parser.parse_args()
    print(machine())
    reports, truth = phantom_reports(SCANS)
    present, seconds = read(["\n".join((r["Findings_EN"], r["Impressions_EN"])) for r in reports])
    print(f"phantom: macro F1 {np.mean(f1(truth, present)):.4f}, {seconds:.1f} processor seconds for {SCANS} reports")
    if given.labelled is None:
        return
    source = load_reports(given.labelled)
    labels = pd.read_csv(given.labelled)[list(FINDINGS)].to_numpy() > 0
    present, seconds = read(source.texts())
    looked_at = np.array([hashlib.sha256(name.encode()).digest()[0] % 2 == 0 for name in source.ids])
    parts = [f1(labels[rows], present[rows]) for rows in (looked_at, ~looked_at)]
    rows = [[name, *(f"{part[number]:.3f}" for part in parts)] for number, name in enumerate(FINDINGS)]
    rows.append(["mean", *(f"{np.mean(part):.3f}" for part in parts)])
    print(table("F1 on labelled reports", ["label", "terms written on these", "held out"], rows))
    print(f"{seconds:.1f} processor seconds for {len(labels)} reports, {seconds * SCANS / len(labels):.0f} for {SCANS}")


if __name__ == "__main__":
    main()
