"""The report of a run: metrics, figures and the page, from the files the other commands left."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ctclip.evaluation import figures
from ctclip.evaluation.pages import label_table, number, published_table, write_page


@dataclass
class Example:
    """A volume to show: hu [slice, row, column] LPS+, spacing mm, its report, (abnormality, probability, label)."""

    title: str
    hu: np.ndarray
    spacing: tuple[float, float, float]
    report: str
    found: list[tuple[str, float, int | None]]


def write_report(
    output: Path,
    name: str,
    metrics: dict[str, Any],
    *,
    run: Path | None = None,
    examples: Sequence[Example] = (),
    matrix: np.ndarray | None = None,
) -> Path:
    """Write ``report.html`` and its PNGs into ``output``; ``run`` is the training run's folder."""
    zero, controls = metrics["zero_shot"], metrics.get("controls", {})
    histogram = controls.get("histogram_auroc")
    sections: list[dict[str, Any]] = []
    bars = output / "auroc.png"
    figures.auroc_bars(bars, zero["auroc"], zero["mean_auroc"], histogram, controls.get("histogram_mean_auroc"))
    sections.append({
        "title": "Zero-shot detection", "words": metrics["protocol"]["describes"] + ". Intervals: bootstrap by patient.",
        "figures": [("AUROC per abnormality", bars)], "table": label_table(zero["auroc"], histogram),
    })  # fmt: skip
    shown = []
    for index, item in enumerate(examples, start=1):
        path = output / f"example_{index}.png"
        figures.example(path, item.hu, item.spacing, item.title, item.report, item.found)
        shown.append((item.title, path))
    if shown:
        sections.append({"title": "Examples", "figures": shown})
    if matrix is not None:
        path = output / "similarity.png"
        figures.similarity(path, matrix)
        sections.append(
            {
                "title": "Reports and volumes",
                "words": _retrieval_words(metrics),
                "figures": [("Similarity of reports and volumes of held-out scans", path)],
            }
        )
    if run is not None and (run / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        config = yaml.safe_load((run / "config.yaml").read_text())
        path = output / "loss.png"
        figures.loss_curve(
            path,
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
            math.log(config["training"]["batch"]),
        )
        sections.append({"title": "Training", "figures": [("Contrastive loss of the global batch", path)]})
        sections.append(
            {
                "title": "Configuration",
                "pre": (run / "config.yaml").read_text() + "\n" + (run / "run.json").read_text(),
            }
        )
    sections.append(
        {
            "title": "Published figures, for context",
            "words": "Protocols differ; never put two numbers side by side without saying so.",
            "table": published_table(zero["mean_auroc"]),
        }
    )
    seconds = metrics.get("seconds")
    if seconds:
        sections.append(
            {"title": "Time", "table": [["stage", "seconds"], *[[k, f"{v:.0f}"] for k, v in seconds.items()]]}
        )
    low, high = zero["mean_auroc_interval"]
    headline = [
        (
            number(zero["mean_auroc"]),
            f"mean AUROC ({number(low)} to {number(high)}), {zero['labels_defined']} labels",
        )
    ]
    if controls.get("histogram_mean_auroc") is not None:
        headline.append((number(controls["histogram_mean_auroc"]), "HU-histogram classifier (control)"))
    headline.append((number(controls.get("shuffled_mean_auroc")), "against shuffled labels (control)"))
    write_page(output / "report.html", title=name, headline=headline, sections=sections,
               subtitle=f"{metrics['volumes']} volumes of {metrics['patients']} held-out patients. Research only; not a medical device.")  # fmt: skip
    return output / "report.html"


def _retrieval_words(metrics: dict[str, Any]) -> str:
    found = metrics.get("retrieval", {}).get("report_to_volume")
    if not found:
        return ""
    hits = ", ".join(f"{found[f'recall@{k}']:.1%} at {k}" for k in (1, 5, 10) if f"recall@{k}" in found)
    return f"Report to volume: recall {hits}, in a pool of {found['pool']} volumes (median rank {found['median_rank']:.0f})."
