"""Accuracy and cost of maps: ``python -m tests.benchmarks.where --demo runs/demo --scans 200``.

Prints the tables of RESULTS.md. The main tables are of findings with a zero-shot AUROC above 0.9 on
all held-out volumes (``metrics.json`` of the demo); the others follow.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import ctclip
from ctclip.errors import ExplanationError
from ctclip.evaluation.pages import number
from ctclip.explanation.masks import Masks, load_layout
from ctclip.explanation.method import METHODS, SLOW, Subject, method
from ctclip.explanation.shifts import maps_of
from ctclip.inference.locate import CONTROLS, chosen_volumes, locate_cohort
from ctclip.inference.model import Model
from ctclip.preprocessing import prepare
from ctclip.preprocessing.cohorts import read_cohort
from tests.benchmarks.common import machine, table

GOOD = 0.9


def cost(model: Model, scan: Path, by: str, shifts: int | None) -> tuple[float, float]:
    """Processor seconds of one encoding, and of the maps of all findings."""
    ready = prepare(scan, model.spec)
    volume = torch.from_numpy(ready.voxels)[None, None]
    head = model.head()
    model.encode(volume)
    began = time.process_time()
    for _ in range(3):
        model.encode(volume)
    encoding = (time.process_time() - began) / 3
    began = time.process_time()
    subject = Subject(model.dual, head, range(len(head.names)), volume, locator=model.locator())
    maps_of(method(by), subject, None if by in SLOW else shifts)
    return encoding, time.process_time() - began


def row(name: str, findings: list[str], result: dict[str, Any], kind: str = "map") -> list[str]:
    """Means over findings."""
    cells = [name]
    for figure in ("pointing", "auroc", "average_precision", "dice", "hit"):
        values = [result["findings"][one][kind][figure]["value"] for one in findings if one in result["findings"]]
        known = [value for value in values if value is not None]
        cells.append(f"{sum(known) / len(known):.2f}" if known else "")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--model", type=Path, help="a model to use instead of the demo's")
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--slow-scans", type=int, default=20, help="number of scans for occlusion and counterfactual")
    parser.add_argument(
        "--shifts", type=int, help="positions of the cells along each axis, for methods that are not slow"
    )
    given = parser.parse_args()
    model = ctclip.load(given.model or given.demo / "train" / "model")
    cohort = read_cohort(given.demo / "cohort")
    masks = Masks(given.demo / "cohort" / "masks", load_layout("phantom"))
    results: dict[str, tuple[str, dict[str, Any], float, float]] = {}
    for by in given.methods:
        count = given.slow_scans if by in SLOW else given.scans
        volumes = chosen_volumes(cohort, masks, "valid", count, 0)
        shifts = None if by in SLOW else given.shifts
        try:
            encoding, seconds = cost(model, cohort.files[volumes[0]], by, shifts)
            result = locate_cohort(
                model.dual, model.head(), cohort, masks, volumes, by=by, shifts=shifts, locator=model.locator()
            )
        except ExplanationError as error:
            print(f"{by}: {error}")
            continue
        results[by] = (f"{by} ({count} scans)", result, encoding, seconds)
    # Read after the maps are computed, because the demo may not have finished when this starts.
    scored = json.loads((given.demo / "metrics.json").read_text())["zero_shot"]["auroc"]
    good = [name for name, entry in scored.items() if (entry["value"] or 0) > GOOD]
    print(f"{machine()}, {date.today()}; {len(good)} findings above {GOOD}\n")
    rows = []
    for name, result, encoding, seconds in results.values():
        rows.append([*row(name, good, result), f"{seconds / encoding:.1f}", f"{seconds:.1f}"])
    first = results[given.methods[0]][1]
    rows += [[*row(f"control of {given.methods[0]}: {kind}", good, first, kind), "", ""] for kind in CONTROLS]
    head = ["method", "pointing", "voxel AUROC", "voxel AP", "Dice", "Hit", "encodings' time", "processor s, all maps"]
    print(table(f"Means over the {len(good)} findings", head, rows))
    lines = []
    for name, entry in sorted(first["findings"].items(), key=lambda item: -(scored[item[0]]["value"] or 0)):
        point, free = entry["map"]["pointing"], entry["free_response"]
        other = [f"{entry[kind]['pointing']['value']:.2f}" for kind in CONTROLS]
        lines.append([
            name, f"{scored[name]['value']:.3f}", str(entry["map"]["scans"]),
            f"{point['value']:.2f} ({number(point['lower'], 2)} to {number(point['upper'], 2)})", *other,
            f"{entry['map']['distance_mm']['value']:.0f}", number(entry["map"]["auroc"]["value"], 2),
            number(entry["map"]["dice"]["value"], 2), number(free["1"], 2),
        ])  # fmt: skip
    columns = ["finding", "zero-shot AUROC", "scans", "pointing (95 % interval)", *CONTROLS, "mm to mask, median", "voxel AUROC", "Dice", "lesions at 1 false a scan"]  # fmt: skip
    print(table(f"{given.methods[0]}, each finding", columns, lines))


if __name__ == "__main__":
    main()
