"""Write the page and the JSON file of `ctclip analyze`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctclip.audit import geometry
from ctclip.audit.analyze import Analysis, analyse, embed_pairs, models_of
from ctclip.audit.groups import group_columns, label_columns
from ctclip.evaluation.pages import number, write_page
from ctclip.inference.run import run_key
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.outputs import claimed_folder, made_by_us
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.store import VolumeStore

TABLES = ("analysis.json", "analysis.html")
COMMAND = "analyze"
# Minimum range of an AUROC axis.
LEAST_SPAN = 0.05
MOST_PICTURES, MOST_POINTS = 9, 3000
COLOURS = ("#2f6f9f", "#c07830", "#4b8b3b", "#8c4a9e", "#b03a48", "#6b6b6b", "#1f9e9e", "#a89020")
WORDS = (
    "Gap: distance between the centroids of volumes and reports. Cosines: between a volume and its own report, a "
    "volume and the report of another scan, two volumes, and two reports (near 1: a narrow cone). Effective rank: exp "
    "of the entropy of the singular values; below it, the number of dimensions that hold 90 % of the variance. "
    "Uniformity: lower values mean more evenly spread embeddings."
)


def write_analysis(
    models: Sequence[str],
    store: VolumeStore,
    output: Path,
    device: torch.device,
    *,
    split: str | None = "valid",
    embeddings: Path | None = None,
    batch: int = 8,
    force: bool = False,
) -> list[Analysis]:
    """Analyse every model (a model folder, or a run folder with all its checkpoints) and write ``TABLES`` to
    ``output``."""
    key = run_key([str(Path(model)) for model in models], str(store.path.resolve()), split)
    with claimed_folder(output, COMMAND, key, TABLES, lambda folder: made_by_us(folder), force=force):
        analyses = []
        for model in models:
            for name, loaded, head in models_of(model, device):
                pairs = embed_pairs(loaded, store, split, embeddings or output / "embeddings", batch)
                analyses.append(analyse(name, loaded, head, pairs))
        facts = {"store": store.path.name, "split": split, "models": [analysis.facts for analysis in analyses]}
        write_text(output / "analysis.json", json.dumps(_plain(facts), indent=1, allow_nan=False))
        _write_page(output / "analysis.html", store, split, analyses)
    return analyses


def _write_page(path: Path, store: VolumeStore, split: str | None, analyses: Sequence[Analysis]) -> None:
    last = analyses[-1]
    with scratch_folder("ctclip-audit-") as scratch:
        folder = scratch
        sections: list[dict[str, Any]] = [
            {"title": "Geometry of the embeddings", "words": WORDS, "table": _columns(numbers_table([one.facts for one in analyses]))},
            _shift_section(folder, analyses),
            {
                "title": "Neighbours", "table": neighbours_table(last.facts),
                "words": f"Fraction of a volume's {geometry.NEIGHBOURS} nearest neighbours from other patients that "
                         f"share its value, and the fraction expected by chance ({last.name}). A scanner or kernel "
                         f"well above chance is a possible shortcut.",
            },
            {
                "title": "Principal axes", "beside": True, "figures": _pictures(folder, last),
                "words": f"The first two principal axes of {last.name}: for volumes and reports together, then for "
                         f"volumes alone.",
            },
        ]  # fmt: skip
        facts = last.facts
        headline = [
            (number(facts["modality_gap"], 2), "modality gap"),
            (number(facts["cosine_of_pairs"], 2), f"cosine of pairs ({facts['cosine_of_strangers']:.2f} of strangers)"),
            (f"{facts['volumes']['effective_rank']:.0f} of {facts['dim']}", "effective rank of volumes"),
            (f"{facts['inverse_temperature']:.1f}", "inverse temperature"),
        ]
        subtitle = f"{facts['scans']:,} scans of {store.path.name}, split {split or 'all'}; headline: {last.name}"
        write_page(path, title="Analysis of embeddings", subtitle=subtitle, headline=headline, sections=sections)


def _plain(value: Any) -> Any:
    """Replace undefined numbers with null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers_table(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per model."""
    head = ["", "modality gap", "cosine of pairs", "cosine of strangers", "cosine of volumes", "cosine of reports",
            "alignment", "uniformity of volumes", "uniformity of reports", "effective rank of volumes",
            "dimensions of 90 %, volumes", "effective rank of reports", "dimensions of 90 %, reports", "inverse temperature"]  # fmt: skip
    rows = [head]
    for one in models:
        v, r = one["volumes"], one["reports"]
        values = [one["modality_gap"], one["cosine_of_pairs"], one["cosine_of_strangers"], v["mean_cosine"], r["mean_cosine"],
                  one["alignment"], v["uniformity"], r["uniformity"]]  # fmt: skip
        ranks = [f"{v['effective_rank']:.1f}", str(v["dimensions_of_90_percent"]), f"{r['effective_rank']:.1f}", str(r["dimensions_of_90_percent"])]  # fmt: skip
        rows.append([one["name"], *[number(value, 3) for value in values], *ranks, f"{one['inverse_temperature']:.1f}"])
    return rows


def _columns(rows: list[list[str]]) -> list[list[str]]:
    """Transpose to one column per model, which fits a narrow page."""
    return [list(column) for column in zip(*rows, strict=True)]


def neighbours_table(facts: dict[str, Any]) -> list[list[str]]:
    """One row per group, sorted by the difference from chance, largest first."""
    rows = sorted(facts["neighbours"].items(), key=lambda item: item[1]["chance"] - item[1]["share"])
    return [
        ["group", "neighbours with the same value", "by chance", "above chance"],
        *[[name, number(p["share"]), number(p["chance"]), f"{p['share'] - p['chance']:+.3f}"] for name, p in rows if p["share"] == p["share"]],
    ]  # fmt: skip


def _shift_section(folder: Path, analyses: Sequence[Analysis]) -> dict[str, Any]:
    curves = [(one.name, one.facts["shift"]) for one in analyses if one.facts.get("shift")]
    words = (
        "Volumes and reports are moved towards each other by a fraction of the gap and normalised again (Liang et al. "
        "2022): 0 leaves them unchanged, 1 closes the gap. The figure shows zero-shot AUROC, averaged over labels."
    )
    section: dict[str, Any] = {"title": "Gap and accuracy", "words": words}
    if not curves:
        return {**section, "words": "No label of this split has both classes, or the model has no prompts."}
    figure, axis = _canvas((6, 3.6))
    for (name, points), colour in zip(curves, COLOURS * len(curves), strict=False):
        axis.plot([p["share"] for p in points], [p["mean_auroc"] for p in points], "o-", ms=3, color=colour, label=name)
    axis.axvline(0, color="#999", lw=0.8)
    low, high = axis.get_ylim()
    # The axis has a minimum range, so that small differences do not look large.
    margin = max(0.0, LEAST_SPAN - (high - low)) / 2
    axis.set_ylim(low - margin, high + margin)
    axis.set(xlabel="fraction of the gap closed", ylabel="mean AUROC")
    axis.legend(fontsize=7)
    _save(figure, folder / "shift.png")
    rows = [["share closed", *[f"{point['share']:g}" for point in curves[0][1]]]]
    rows += [[name, *[number(point["mean_auroc"]) for point in points]] for name, points in curves]
    return {**section, "figures": [("Zero-shot AUROC against the fraction of the gap closed", folder / "shift.png")], "table": rows}  # fmt: skip


def _pictures(folder: Path, analysis: Analysis) -> list[tuple[str, Path]]:
    """Plot volumes and reports together, then volumes coloured by each group and by the labels whose neighbours agree
    most."""
    table, volumes, reports = analysis.embedded.table, analysis.embedded.volumes, analysis.embedded.reports
    rows = np.sort(np.random.default_rng(0).permutation(len(volumes))[:MOST_POINTS])
    both = np.concatenate([volumes[rows], reports[rows]])
    sides = np.repeat(["volume", "report"], len(rows))
    figures = [_scatter(folder, "volumes and reports", *_projected(both), sides)]
    neighbours = analysis.facts["neighbours"]
    labels = sorted(label_columns(table), key=lambda name: neighbours[name]["chance"] - neighbours[name]["share"])
    coloured = group_columns(table)
    coloured |= {name: np.where(table[name].fillna(0) == 1, name, "without") for name in labels}
    places, shares = _projected(volumes[rows])
    for name, values in list(coloured.items())[: MOST_PICTURES - 1]:
        figures.append(_scatter(folder, name, places, shares, values[rows]))
    return figures


def _projected(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, 2) of vectors (n, dim) on their first two principal axes, and the fractions of variance of these."""
    mean, axes = geometry.principal_axes(vectors)
    return (vectors - mean) @ axes.T, geometry.spectrum(vectors)[:2]


def _scatter(folder: Path, name: str, places: np.ndarray, shares: np.ndarray, values: np.ndarray) -> tuple[str, Path]:
    figure, axis = _canvas((4.6, 4.0))
    for value, colour in zip([v for v in np.unique(values) if v != ""], COLOURS * 3, strict=False):
        mine = values == value
        axis.scatter(*places[mine].T, s=5, alpha=0.6, lw=0, color=colour, label=f"{value} ({mine.sum()})")
    axis.set(xlabel=f"first axis ({shares[0]:.0%} of the variance)", ylabel=f"second axis ({shares[1]:.0%})")
    axis.legend(fontsize=6, markerscale=2)
    path = folder / f"{len(list(folder.iterdir()))}.png"
    _save(figure, path)
    return name, path


def _canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    # matplotlib's object interface instead of pyplot needs no global state and no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    with written_beside(path, suffix=".png") as partial:
        figure.savefig(partial, dpi=110, format="png")
