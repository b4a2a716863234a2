"""The report of an evaluation, or of two side by side: figures and a page from what the other commands left."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ctclip.errors import EvaluationError
from ctclip.evaluation import figures
from ctclip.evaluation.pages import comparison_table, label_table, number, published_table, write_page


@dataclass
class Example:
    """A volume to show: hu [slice, row, column] LPS+, spacing mm, its report, (abnormality, probability, label)."""

    title: str
    hu: np.ndarray
    spacing: tuple[float, float, float]
    report: str
    found: list[tuple[str, float, int | None]]


@dataclass
class Pictures:
    """What metrics alone cannot draw: examples, similarity of reports and volumes, (probabilities, labels)."""

    examples: Sequence[Example] = ()
    matrix: np.ndarray | None = None
    scores: tuple[np.ndarray, np.ndarray] | None = None


def write_report(
    output: Path, name: str, metrics: dict[str, Any], *, run: Path | None = None, pictures: Pictures | None = None
) -> Path:
    """Write ``report.html`` and its PNGs into ``output``; ``run`` is the training run's folder."""
    pictures = pictures or Pictures()
    zero, controls = metrics["zero_shot"], metrics.get("controls", {})
    histogram = controls.get("histogram_auroc")
    bars = output / "auroc.png"
    figures.auroc_bars(bars, zero["auroc"], zero["mean_auroc"], histogram, controls.get("histogram_mean_auroc"))
    sections: list[dict[str, Any]] = [{
        "title": "Zero-shot detection", "words": metrics["protocol"]["describes"] + ". Intervals: bootstrap by patient.",
        "figures": [("AUROC per abnormality", bars)], "table": label_table(zero["auroc"], histogram),
    }]  # fmt: skip
    if metrics.get("paired"):
        sections.append(_paired_section(metrics["paired"]))
    sections.append(_threshold_section(output, zero, pictures))
    sections += _picture_sections(output, metrics, pictures)
    if run is not None and (run / "metrics.jsonl").is_file():
        sections += _run_sections(output, run)
    sections.append(_published_section(zero["mean_auroc"]))
    seconds = metrics.get("seconds")
    if seconds:
        sections.append({"title": "Time", "table": [["stage", "seconds"], *[[k, f"{v:.0f}"] for k, v in seconds.items()]]})  # fmt: skip
    write_page(output / "report.html", title=name, headline=_headline(metrics), sections=sections, subtitle=_subtitle(metrics))  # fmt: skip
    return output / "report.html"


def compare_reports(first: Path, second: Path | None, output: Path) -> Path:
    """One page of one evaluation folder, or of two side by side; ``output`` is the HTML file."""
    found = [(folder, _metrics_of(folder)) for folder in (first, second) if folder is not None]
    folder, metrics = found[0]
    sections: list[dict[str, Any]] = []
    if len(found) == 2:
        other, theirs = found[1]
        words = _protocol_differences(metrics, theirs)
        sections.append({
            "title": "Side by side", "words": words,
            "table": comparison_table(folder.name, metrics["zero_shot"], other.name, theirs["zero_shot"]),
        })  # fmt: skip
    for place, one in found:
        shown = [
            (caption, place / name)
            for caption, name in (("AUROC per abnormality", "auroc.png"), ("Loss", "loss.png"), ("Reliability", "reliability.png"))
            if (place / name).is_file()
        ]  # fmt: skip
        histogram = one.get("controls", {}).get("histogram_auroc")
        words = f"{one['protocol']['describes']}. {_subtitle(one)}"
        sections.append({"title": str(place), "words": words, "figures": shown, "table": label_table(one["zero_shot"]["auroc"], histogram)})  # fmt: skip
    sections.append(_published_section(metrics["zero_shot"]["mean_auroc"]))
    headline = [(value, f"{words} ({place.name})") for place, one in found for value, words in _headline(one)]
    write_page(output, title=" against ".join(str(place) for place, _ in found), headline=headline, sections=sections, subtitle=_subtitle(metrics))  # fmt: skip
    return output


def _metrics_of(folder: Path) -> dict[str, Any]:
    for place in (folder, folder / "evaluation"):
        if (place / "metrics.json").is_file():
            found: dict[str, Any] = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
            if "zero_shot" in found:
                return found
    raise EvaluationError(f"{folder}: no metrics.json of an evaluation in it; `ctclip evaluate --output {folder}` writes one")  # fmt: skip


def _headline(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    zero, controls = metrics["zero_shot"], metrics.get("controls", {})
    low, high = zero["mean_auroc_interval"]
    words = f"mean AUROC ({number(low)} to {number(high)}), {zero['labels_defined']} labels"
    headline = [(number(zero["mean_auroc"]), words)]
    if controls.get("histogram_mean_auroc") is not None:
        headline.append((number(controls["histogram_mean_auroc"]), "HU-histogram classifier (control)"))
    headline.append((number(controls.get("shuffled_mean_auroc")), "against shuffled labels (control)"))
    return headline


def _subtitle(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['volumes']} volumes of {metrics['patients']} held-out patients. Research only; not a medical device."
    )


def _protocol_differences(first: dict[str, Any], second: dict[str, Any]) -> str:
    ours, theirs = first["protocol"], second["protocol"]
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if first["volumes"] != second["volumes"]:
        differing.append("volumes scored")
    if not differing:
        return "Both were scored by the same protocol on as many volumes."
    return f"Not the same protocol: {', '.join(differing)} differ. The figures cannot be compared directly."


def _paired_section(paired: dict[str, Any]) -> dict[str, Any]:
    rows = [["abnormality", "AUROC", "other", "difference", "95 % interval", "p"]]
    for name, entry in [("mean", paired["mean"]), *paired["labels"].items()]:
        limits = f"{number(entry['lower'])} to {number(entry['upper'])}"
        rows.append([name, number(entry["first"]), number(entry["second"]), number(entry["difference"]), limits, number(entry["p"])])  # fmt: skip
    words = f"Against {paired['against']}, in the same {paired['resamples']} resamples of patients; p two-sided, not corrected for the number of labels."
    return {"title": "Paired comparison", "words": words, "table": rows}


def _threshold_section(output: Path, zero: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    rows = [["", "mean over labels", "95 % interval"]]
    for metric, entry in zero["means"].items():
        limits = f"{number(entry['interval'][0])} to {number(entry['interval'][1])}"
        rows.append([metric.replace("_", " "), number(entry["value"]), limits])
    rows += [[f"F1, {kind}", number(value), ""] for kind, value in zero["f1"].items()]
    section: dict[str, Any] = {"title": "Thresholds and calibration", "words": f"Thresholds: {zero['thresholds']}.", "table": rows}  # fmt: skip
    if pictures.scores is not None:
        figures.reliability(output / "reliability.png", *pictures.scores)
        section["figures"] = [("Reliability, all labels together", output / "reliability.png")]
    return section


def _picture_sections(output: Path, metrics: dict[str, Any], pictures: Pictures) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = []
    shown = []
    for index, item in enumerate(pictures.examples, start=1):
        path = output / f"example_{index}.png"
        figures.example(path, item.hu, item.spacing, item.title, item.report, item.found)
        shown.append((item.title, path))
    if shown:
        sections.append({"title": "Examples", "figures": shown})
    if pictures.matrix is not None:
        path = output / "similarity.png"
        figures.similarity(path, pictures.matrix)
        figure = ("Similarity of reports and volumes of held-out scans", path)
        sections.append({"title": "Reports and volumes", "words": _retrieval_words(metrics), "figures": [figure]})
    return sections


def _run_sections(output: Path, run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    batch = yaml.safe_load((run / "config.yaml").read_text())["training"]["batch"]
    path = output / "loss.png"
    figures.loss_curve(path, [line["step"] for line in lines], [line["loss"] for line in lines], math.log(batch))
    return [
        {"title": "Training", "figures": [("Contrastive loss of the global batch", path)]},
        {"title": "Configuration", "pre": (run / "config.yaml").read_text() + "\n" + (run / "run.json").read_text()},
    ]


def _published_section(mean: float | None) -> dict[str, Any]:
    return {
        "title": "Published figures, for context",
        "words": "Protocols differ; never put two numbers side by side without saying so.",
        "table": published_table(mean),
    }


def _retrieval_words(metrics: dict[str, Any]) -> str:
    found = metrics.get("retrieval", {}).get("report_to_volume")
    if not found:
        return ""
    hits = ", ".join(f"{found[f'recall@{k}']:.1%} at {k}" for k in (1, 5, 10) if f"recall@{k}" in found)
    return f"Report to volume: recall {hits}, in a pool of {found['pool']} volumes (median rank {found['median_rank']:.0f})."
