"""The report of an evaluation, or of two side by side: figures and a page from the files of other commands."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ctclip.errors import EvaluationError
from ctclip.evaluation import figures
from ctclip.evaluation.pages import (
    MARK,
    UNTRUSTED_MEANS,
    comparison_table,
    interval_words,
    label_table,
    number,
    split_note,
    write_page,
)
from ctclip.evaluation.published import published_table
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.outputs import check_file, claimed_file, file_holds
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.preprocessing.scratch import scratch_folder

INTERVALS = (
    "Volumes are ranked by their margins before calibration. Intervals are by patient: for the AUROC of an abnormality "
    "from the larger of two variances (evaluation/intervals.py), for all other metrics by bootstrap. "
    f"{UNTRUSTED_MEANS}"
)
METRICS = {
    "f1": "F1", "weighted_f1": "F1, weighted over present and absent (as published)", "brier": "Brier score",
}  # fmt: skip


@dataclass
class Example:
    """An example volume: ``hu`` [slice, row, column] LPS+, ``spacing`` in mm, its report, and (abnormality,
    probability, label); ``focus``: the finding that the slices pass through."""

    title: str
    hu: np.ndarray
    spacing: tuple[float, float, float]
    report: str
    detections: list[tuple[str, float, int | None]]
    windows: Mapping[str, tuple[float, float]]
    focus: figures.Focus | None = None

    @property
    def caption(self) -> str:
        """The caption of the image."""
        where = f"slices through {self.focus.finding.lower()}" if self.focus else "slices through the middle"
        return f"{self.title}: axial, coronal and sagittal {where}, its report and its probabilities"


@dataclass
class Pictures:
    """Data for figures beyond the metrics: examples, similarity of reports and volumes, (probabilities, labels)."""

    examples: Sequence[Example] = ()
    matrix: np.ndarray | None = None
    scores: tuple[np.ndarray, np.ndarray] | None = None


def write_report(
    output: Path, name: str, metrics: dict[str, Any], *, run: Path | None = None, pictures: Pictures | None = None
) -> Path:
    """Write ``report.html`` and its PNGs to ``output``; ``run`` is the folder of the training run."""
    pictures = pictures or Pictures()
    zero, controls = metrics["zero_shot"], metrics.get("controls", {})
    histogram = controls.get("histogram_auroc")
    bars = output / "auroc.png"
    figures.auroc_bars(bars, zero["auroc"], zero["mean_auroc"], histogram, controls.get("histogram_mean_auroc"))
    sections: list[dict[str, Any]] = [{
        "title": "Zero-shot detection", "words": f"{_protocol(metrics)}. {INTERVALS}.",
        "figures": [("AUROC per abnormality", bars)], "table": label_table(zero["auroc"], histogram),
    }]  # fmt: skip
    if metrics.get("paired"):
        sections.append(_paired_section(metrics["paired"]))
    sections.append(_threshold_section(output, zero, pictures))
    sections += _picture_sections(output, metrics, pictures)
    if run is not None and (run / "metrics.jsonl").is_file():
        with _figures_of(run / "metrics.jsonl", run / "config.yaml", command="train"):
            sections += _run_sections(output, run)
    sections.append(_published_section(metrics))
    seconds = metrics.get("seconds")
    if seconds:
        sections.append({"title": "Time", "table": [["stage", "seconds"], *[[k, f"{v:.0f}"] for k, v in seconds.items()]]})  # fmt: skip
    write_page(output / "report.html", title=name, headline=_headline(metrics), sections=sections, subtitle=_subtitle(metrics))  # fmt: skip
    return output / "report.html"


def compare_reports(first: Path, second: Path | None, output: Path) -> Path:
    """One page of one evaluation folder, or of two side by side; ``output`` is the HTML file."""
    check_file(output, file_holds(MARK))
    evaluations = [_metrics_of(folder) for folder in (first, second) if folder is not None]
    names = _names([folder for folder, _ in evaluations])
    with scratch_folder("ctclip-report-") as scratch:
        sections, headline = [], []
        for name, (folder, one) in zip(names, evaluations, strict=True):
            with _figures_of(folder / "metrics.json"):
                sections += _own_sections(name, one)
                headline += [(value, f"{words}: {name}") for value, words in _headline(one)]
        sections = _pictures(names, [folder for folder, _ in evaluations]) + sections
        if len(evaluations) == 2:
            with _figures_of(*(folder / "metrics.json" for folder, _ in evaluations)):
                sections = _side_by_side(names, [one for _, one in evaluations], scratch / "pair.png") + sections
        with claimed_file(output), _figures_of(*(folder / "metrics.json" for folder, _ in evaluations)):
            write_page(output, title=" against ".join(names), headline=headline, sections=sections, subtitle="Research only; not a medical device.")  # fmt: skip
    return output


def _own_sections(name: str, one: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of one of the evaluations of a page."""
    words = f"{_protocol(one)}. {_subtitle(one)} Thresholds: {one['zero_shot']['thresholds']}."
    table = label_table(one["zero_shot"]["auroc"], one.get("controls", {}).get("histogram_auroc"))
    sections: list[dict[str, Any]] = [{"title": name, "words": words, "table": table}]
    if one.get("retrieval"):
        sections.append({"title": f"Retrieval: {name}", **_retrieval(one["retrieval"])})
    return [*sections, _published_section(one) | {"title": f"Published figures beside {name}"}]


def _pictures(names: list[str], folders: list[Path]) -> list[dict[str, Any]]:
    """The images saved with the metrics; for two evaluations, their AUROC is drawn in one figure."""
    sections = []
    for file, title in (("auroc.png", "AUROC per abnormality"), ("reliability.png", "Reliability"), ("loss.png", "Training loss")):  # fmt: skip
        images = [(name, folder / file) for name, folder in zip(names, folders, strict=True) if (folder / file).is_file()]  # fmt: skip
        if images and not (len(folders) == 2 and file == "auroc.png"):
            sections.append({"title": title, "figures": images, "beside": len(images) == 2 and file == "loss.png"})
    return sections


@contextlib.contextmanager
def _figures_of(*paths: Path, command: str = "evaluate") -> Iterator[None]:
    """Context manager for using files that may be damaged: raises EvaluationError, naming them, if a value is missing
    or has the wrong type."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, yaml.YAMLError) as error:
        names = " or ".join(map(str, paths))
        raise EvaluationError(
            f"{names}: does not hold what `ctclip {command}` writes ({type(error).__name__}: {' '.join(str(error).split())[:100]}); "
            f"run it again"
        ) from error


def _side_by_side(names: list[str], pair: list[dict[str, Any]], picture: Path) -> list[dict[str, Any]]:
    """The differences between the protocols of two evaluations, then their AUROC for each label."""
    ours, theirs = (one["zero_shot"] for one in pair)
    figures.auroc_pair(picture, names, [ours["auroc"], theirs["auroc"]])
    table = comparison_table(names[0], ours, names[1], theirs)
    words = "Intervals of each; for an interval of the difference, paired by patient: ctclip evaluate ... --against ..."
    return [
        _protocol_differences(names, *pair),
        {"title": "Side by side", "words": words, "figures": [("AUROC per abnormality", picture)], "table": table},
    ]


def _names(folders: list[Path]) -> list[str]:
    """The shortest distinct endings of folder paths."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _metrics_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An evaluation's folder (the one given, or ``evaluation`` in it) and its metrics."""
    for place in (folder, folder / "evaluation"):
        if (place / "metrics.json").is_file():
            try:
                metrics: dict[str, Any] = plain_json.read(place / "metrics.json")
            except ValueError as error:
                raise EvaluationError(f"{place / 'metrics.json'}: is not JSON ({error}); run `ctclip evaluate` again") from error  # fmt: skip
            if isinstance(metrics, dict) and "zero_shot" in metrics:
                return place, metrics
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
    scored = f"{metrics['volumes']:,} volumes of {metrics['patients']:,} held-out patients"
    size = metrics["protocol"].get("size")
    if not metrics.get("whole_set", True):
        scored += f" (not the {size:,} of the protocol's set: not the published test)"
    if split_note(metrics):
        scored += f"; {split_note(metrics)}"
    learned = "; ".join(filter(None, [metrics.get("supervision"), metrics.get("trained_on")]))
    return (
        f"{scored}. {f'The model was trained on: {learned}. ' if learned else ''}Research only; not a medical device."
    )


def _protocol(metrics: dict[str, Any]) -> str:
    """The description of the protocol, capitalised."""
    describes: str = metrics["protocol"]["describes"]
    return f"{describes[:1].upper()}{describes[1:]}"


def _protocol_differences(names: list[str], first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The differences between two evaluations, with both values."""
    rows = [["what", *names]]
    for key in first["protocol"]:
        pair = [metrics["protocol"].get(key) for metrics in (first, second)]
        if pair[0] == pair[1]:
            continue
        if key == "labels":
            pair = [f"{len(mine)} labels" + (f", with {', '.join(more)}" if (more := [n for n in mine if n not in other]) else "")
                    for mine, other in (pair, pair[::-1])]  # fmt: skip
        rows.append([f"protocol: {key}", *map(str, pair)])
    for key in ("volumes", "patients", "supervision", "trained_on", "model", "spec", "prompts"):
        pair = [metrics.get(key) for metrics in (first, second)]
        if pair[0] != pair[1]:
            rows.append([key.replace("_", " "), *(str(value or "not stated") for value in pair)])
    decisive = [row[0] for row in rows[1:] if row[0].startswith("protocol") or row[0] in ("volumes", "patients")]
    words = "Both were evaluated by the same protocol, on the same number of volumes and patients."
    if decisive:
        words = "The protocols differ, so the results cannot be compared directly."
    section: dict[str, Any] = {"title": "What differs", "words": words}
    return section | ({"table": rows} if len(rows) > 1 else {})


def _paired_section(paired: dict[str, Any]) -> dict[str, Any]:
    rows = [["abnormality", "AUROC", "other", "difference", "95 % interval", "p"]]
    for name, entry in [("mean", paired["mean"]), *paired["labels"].items()]:
        limits = interval_words(entry["lower"], entry["upper"], entry.get("interval_trusted", True))
        rows.append([name, number(entry["first"]), number(entry["second"]), number(entry["difference"]), limits, number(entry["p"])])  # fmt: skip
    words = (
        f"Against {paired['against']}. Intervals: the same {paired['resamples']} resamples of patients; p: "
        f"{paired.get('test', 'the same resamples')}, two-sided, not corrected for the number of labels. "
        f"{UNTRUSTED_MEANS}."
    )
    return {"title": "Paired comparison", "words": words, "table": rows}


def _threshold_section(output: Path, zero: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    rows = [["metric", "mean over labels", "95 % interval"]]
    for metric, entry in zero["means"].items():
        limits = f"{number(entry['interval'][0])} to {number(entry['interval'][1])}"
        rows.append([METRICS.get(metric, metric.replace("_", " ")), number(entry["value"]), limits])
    pooled = zero.get("pooled_calibration_error")
    rows.append(["calibration error, all labels together", number(pooled), ""])
    rows += [[f"F1, {kind} over labels", number(value), ""] for kind, value in zero["f1"].items()]
    section: dict[str, Any] = {"title": "Thresholds and calibration", "words": f"Thresholds: {zero['thresholds']}.", "table": rows}  # fmt: skip
    if pictures.scores is not None:
        figures.reliability(output / "reliability.png", *pictures.scores, list(zero["auroc"]))
        caption = "Reliability: on the diagonal predicted and observed frequencies agree; the area of a point is its share of the volumes"
        section["figures"] = [(caption, output / "reliability.png")]
    return section


def _picture_sections(output: Path, metrics: dict[str, Any], pictures: Pictures) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = []
    examples = []
    for index, item in enumerate(pictures.examples, start=1):
        path = output / f"example_{index}.png"
        figures.example(path, item.hu, item.spacing, item.report, item.detections, item.windows, item.focus)
        examples.append((item.caption, path))
    if examples:
        sections.append({"title": "Examples", "figures": examples})
    if pictures.matrix is not None:
        path = output / "similarity.png"
        figures.similarity(path, pictures.matrix)
        figure = ("Similarity of reports and volumes of held-out scans", path)
        sections.append({"title": "Reports and volumes", "figures": [figure]})
    if metrics.get("retrieval"):
        sections.append({"title": "Retrieval", **_retrieval(metrics["retrieval"])})
    return sections


def _run_sections(output: Path, run: Path) -> list[dict[str, Any]]:
    lines = [plain_json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    config = read_yaml(run / "config.yaml")
    batch, clip = config["training"]["batch"], config["objectives"].get("clip")
    path = output / "loss.png"
    chance = None
    if isinstance(clip, dict) and list(config["objectives"]) == ["clip"]:
        # Volume to text, and text to volume.
        chance = clip["weight"] * (math.log(batch + clip.get("queue", 0)) + math.log(batch)) / 2
    figures.loss_curve(path, [line["step"] for line in lines], [line["loss"] for line in lines], chance)
    return [
        {"title": "Training", "figures": [("Contrastive loss of the global batch", path)]},
        {"title": "Configuration", "pre": (run / "config.yaml").read_text() + "\n" + (run / "run.json").read_text()},
    ]


def _published_section(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "Published figures, for context",
        "words": "Zero-shot AUROC as published. The protocols and the training data differ; state this wherever two of these numbers are compared.",
        "table": published_table(metrics),
    }  # fmt: skip


def _retrieval(directions: dict[str, Any]) -> dict[str, Any]:
    """One column for each direction; the text above describes the pool and what counts as a hit."""
    words = [
        f"{name.replace('_', ' ')}: the pool is {direction['pool_is']}; {direction['duplicates']}."
        for name, direction in directions.items()
    ]
    words += [
        f"MAP: relevant is a {direction['relevant']}."
        for direction in list(directions.values())[:1]
        if "relevant" in direction
    ]
    rows = [["measure", *[name.replace("_", " ") for name in directions]]]
    for key in dict.fromkeys(key for direction in directions.values() for key in direction):
        values = [direction.get(key) for direction in directions.values()]
        if any(isinstance(value, str) for value in values):
            continue
        # Fractions, followed by counts and ranks.
        form = ".3f" if "@" in key or "precision" in key else "g"
        name = key.replace("@", " at ").replace("_", " ").replace("map", "MAP").replace("jaccard", "mean Jaccard")
        rows.append([name, *["" if value is None else f"{value:{form}}" for value in values]])
    return {"words": " ".join(word[0].upper() + word[1:] for word in words), "table": rows}
