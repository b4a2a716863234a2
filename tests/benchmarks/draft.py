"""Drafted reports of phantoms by every method, beside the controls: ``python -m tests.benchmarks.draft``.

``--model``: a calibrated model folder of a demo; ``--store``: its store. ``--work``: a new folder, which gets a copy of the
model with a caption head, an index, the drafts and their evaluations. A head, an index or drafts that are there are used
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import ctclip
from ctclip.adaptation.caption import CaptionConfig, run_caption
from ctclip.config_files import find_config, load_section
from ctclip.drafting.drafter import Drafting, Method
from ctclip.drafting.store import draft_store, write_drafts
from ctclip.evaluation.run_reports import DETECTED, MOST_COMMON, run_reports
from ctclip.inference.index import index_store
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import load_model
from ctclip.preprocessing.store import VolumeStore
from tests.benchmarks.common import machine, table

METRICS = ("macro_f1", "micro_f1", "crg", "bleu_4", "rouge_l")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "store", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--count", type=int, help="draft the first volumes only")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of configs/adapt/caption.yaml")
    given = parser.parse_args()
    model = given.work / "model"
    if not model.is_dir():
        shutil.copytree(given.model, model)
    if not (model / "heads" / "caption").is_dir():
        config = load_section(CaptionConfig, find_config("caption", "adapt"), given.overrides)
        run_caption(load_model(model), given.store, given.work / "caption", config)
    drafts = drafted(model, given.store, given.work, given.split, given.count)
    retrieval = drafts["retrieval"]
    results = {
        name: run_reports(path, given.store, given.work / f"{name}_scores", against=[retrieval] if path != retrieval else [], bootstrap=500)
        for name, path in drafts.items()
    }  # fmt: skip
    print(machine())
    print(scores(results))
    (given.work / "results.json").write_text(json.dumps(results, indent=2))


def drafted(model: Path, store: Path, work: Path, split: str, count: int | None) -> dict[str, Path]:
    """Write the tables of drafts by method."""
    loaded = ctclip.load(model)
    opened = VolumeStore(store)
    if not (work / "index" / "index.json").is_file():
        scans = StoredScans(opened, "train", loaded.spec, model)
        index_store(loaded.folder, scans, work / "index", 8, {})
    settings = {
        "retrieval": Drafting(Method.retrieval, index=work / "index"),
        "template": Drafting(Method.template),
        "caption": Drafting(Method.caption),
        "caption_prompted": Drafting(Method.caption, prompted=True),
    }
    paths = {name: work / f"{name}.csv" for name in settings}
    for name, drafting in settings.items():
        if not paths[name].is_file():
            drafter = loaded.drafter(drafting)
            scans = StoredScans(opened, split, loaded.spec, model)
            write_drafts(draft_store(drafter, scans, {}, count=count), paths[name])
    return paths


def scores(results: dict[str, Any]) -> str:
    """The table of results, with each method's macro F1 compared with the detector's and the neighbour's."""
    first = next(iter(results.values()))
    controls = {name: first["results"][name] for name in (MOST_COMMON, DETECTED)}
    every = {**controls, **{name: result["results"]["drafts"] for name, result in results.items()}}
    detector, neighbour = (one["scores"]["macro_f1"]["value"] for one in (controls[DETECTED], every["retrieval"]))
    rows = []
    for name, one in every.items():
        cells = [_cell(one["scores"].get(metric)) for metric in METRICS]
        macro = one["scores"]["macro_f1"]["value"]
        sides = one.get("sides")
        sided = f"{sides['wrong']} of {sides['compared']} ({sides['named']})" if sides else ""
        rows.append([name, *cells, f"{macro / detector:.2f}", f"{macro - neighbour:+.3f}", sided])
    title = f"Drafts of {first['volumes']} volumes of {first['patients']} patients"
    head = [
        "reports",
        *METRICS,
        "macro F1 by the detector's",
        "minus the neighbour's",
        "wrong side of compared (named)",
    ]
    return table(title, head, rows)


def _cell(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['value']:.3f} ({entry['lower']:.3f} to {entry['upper']:.3f})"


if __name__ == "__main__":
    main()
