"""Draw the figures of an evaluation report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.evaluation import metrics
from ctclip.preprocessing.files import written_beside

INK, BAR, CONTROL, MARKED = "#222222", "#2f6f9f", "#c07830", "#ffd23f"


@dataclass(frozen=True)
class Focus:
    """A finding and its mask, bool [slice, row, column] on the grid of the volume."""

    finding: str
    mask: np.ndarray

    @property
    def at(self) -> tuple[int, int, int]:
        """The voxel of the mask nearest to its centroid."""
        inside = np.argwhere(self.mask)
        z, y, x = inside[np.argmin(((inside - inside.mean(axis=0)) ** 2).sum(axis=1))]
        return int(z), int(y), int(x)


def example(
    path: Path,
    hu: np.ndarray,
    spacing: tuple[float, float, float],
    report: str,
    detections: list[tuple[str, float, int | None]],
    windows: Mapping[str, tuple[float, float]],
    focus: Focus | None = None,
) -> None:
    """Draw axial, coronal and sagittal slices in two HU windows, with the report and the detections.

    hu [slice, row, column] LPS+, shown in radiological convention: the patient's right on the left of the image, the
    head at the top. The slices go through ``focus``, whose mask is outlined, or through the middle. detections:
    (abnormality, probability, label or None) in the order shown.
    """
    dz, dy, dx = spacing
    z, y, x = focus.at if focus else (hu.shape[0] // 2, hu.shape[1] // 2, int(hu.shape[2] * 0.66))
    mask = focus.mask if focus else np.zeros(hu.shape, bool)
    views = (
        ("axial", hu[z], mask[z], dy, dx, f"slice {z + 1} of {hu.shape[0]}"),
        ("coronal", hu[::-1, y], mask[::-1, y], dz, dx, f"slice {y + 1} of {hu.shape[1]}"),
        ("sagittal", hu[::-1, :, x], mask[::-1, :, x], dz, dy, f"slice {x + 1} of {hu.shape[2]}"),
    )
    # Column widths match the slices, so that all images of a row have the same height.
    widths = [plane.shape[1] * across / (plane.shape[0] * down) for _, plane, _, down, across, _ in views]
    height = max(8 / sum(widths), 2.9)
    figure, axes = _canvas(2, 4, (12.2, 2 * height + 0.5), [*widths, sum(widths) * 0.5])
    for row, (name, (low, high)) in enumerate([*windows.items()][:2]):
        for column, (view, plane, outline, down, across, where) in enumerate(views):
            axis = axes[row][column]
            axis.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=down / across, interpolation="bilinear")
            if outline.any():
                axis.contour(outline.astype(float), levels=[0.5], colors=[MARKED], linewidths=0.9)
            axis.set_title(f"{view}, {where}\n{name}, {low:.0f} to {high:.0f} HU", fontsize=7.5, color=INK)
            _letters(axis, view)
            axis.axis("off")
    lines = textwrap.wrap(report, 58)
    most = int(height * 72 / 11)
    _words(axes[0][3], "Report", "\n".join(lines[:most] + (["[...]"] if len(lines) > most else [])))
    scores = [f"{p:4.0%}  {'+' if y == 1 else '-' if y == 0 else ' '}  {name}" for name, p, y in detections]
    if focus:
        figure.suptitle(f"slices through: {focus.finding} (reference mask outlined)", fontsize=9, color=INK)
    _words(axes[1][3], "Zero-shot probability (+/- label)", "\n".join(scores), mono=True)
    _save(figure, path)


def _letters(axis: Any, view: str) -> None:
    """Label the patient's sides at the edges of a slice, legibly on air and on bone."""
    from matplotlib.patheffects import withStroke

    sides = ("R", "L") if view != "sagittal" else ("A", "P")
    ends = ("A", "P") if view == "axial" else ("S", "I")
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, (x, y, along, down) in zip((*sides, *ends), places, strict=True):
        axis.text(x, y, letter, color="white", transform=axis.transAxes, ha=along, va=down, fontsize=8, path_effects=[withStroke(linewidth=2, foreground="black")])  # fmt: skip


def auroc_bars(
    path: Path,
    per_label: dict[str, Any],
    mean: float | None,
    histogram: dict[str, float | None] | None,
    control: float | None,
) -> None:
    """Plot the sorted AUROC of each label with its interval; open markers show the histogram classifier."""
    defined = {name: entry for name, entry in per_label.items() if entry["value"] is not None}
    names = sorted(defined, key=lambda name: defined[name]["value"])
    figure, axes = _canvas(1, 1, (8.6, 0.34 * len(names) + 1.6))
    axis = axes[0][0]
    rows = np.arange(len(names))
    value = np.array([defined[name]["value"] for name in names])
    low, high = (np.array([defined[name][limit] for name in names], dtype=float) for limit in ("lower", "upper"))
    axis.hlines(rows, low, high, color=BAR, alpha=0.45, linewidth=5)
    axis.plot(value, rows, "o", color=BAR, label="zero-shot, 95 % interval")
    if histogram:
        values = [histogram.get(name) for name in names]
        axis.plot(
            [np.nan if v is None else v for v in values],
            rows,
            "D",
            mfc="none",
            color=CONTROL,
            ms=5,
            label="HU-histogram classifier (supervised)",
        )
    axis.axvline(0.5, color="0.6", lw=0.8)
    if mean is not None:
        axis.axvline(mean, color=BAR, lw=0.8, ls="--", label=f"mean {mean:.3f}")
    if control is not None:
        axis.axvline(control, color=CONTROL, lw=0.8, ls="--", label=f"histogram mean {control:.3f}")
    axis.set_yticks(rows, [f"{name}  ({defined[name]['positives']})" for name in names], fontsize=8)
    axis.set_xlim(min([0.45, *(value - 0.02), *(low[np.isfinite(low)] - 0.02)]), 1.01)
    axis.set_xlabel("AUROC on held-out patients (positives in brackets)")
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def auroc_pair(path: Path, names: Sequence[str], sides: Sequence[dict[str, Any]]) -> None:
    """Plot the AUROC of each label in two evaluations with intervals, sorted by the first."""
    labels = [name for name in sides[0] if name in sides[1] and None not in (sides[0][name]["value"], sides[1][name]["value"])]  # fmt: skip
    labels.sort(key=lambda name: sides[0][name]["value"])
    figure, axes = _canvas(1, 1, (8.6, 0.4 * len(labels) + 1.4))
    axis = axes[0][0]
    for name, side, colour, mark, shift in zip(names, sides, (BAR, CONTROL), "os", (0.13, -0.13), strict=True):
        rows = np.arange(len(labels)) + shift
        low, value, high = (
            np.array([side[label][key] for label in labels], dtype=float) for key in ("lower", "value", "upper")
        )
        axis.hlines(rows, low, high, color=colour, alpha=0.45, linewidth=4)
        axis.plot(value, rows, mark, color=colour, ms=5, label=f"{name}, 95 % interval")
    axis.axvline(0.5, color="0.6", lw=0.8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    lowest = [side[label][key] for side in sides for label in labels for key in ("lower", "value")]
    axis.set_xlim(min([0.45, *(value - 0.02 for value in lowest if value is not None)]), 1.01)
    axis.set_xlabel("AUROC on held-out patients")
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def loss_curve(path: Path, steps: list[int], losses: list[float], chance: float | None) -> None:
    """Plot the training loss and the chance level."""
    figure, axes = _canvas(1, 1, (6.4, 3.6))
    axis = axes[0][0]
    axis.plot(steps, losses, color=BAR, lw=1.4)
    if chance is not None:
        axis.axhline(chance, color="0.6", lw=0.8, ls="--")
        axis.text(steps[-1], chance, " chance", va="bottom", ha="right", fontsize=8, color="0.4")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats)")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def similarity(path: Path, matrix: np.ndarray) -> None:
    """Plot the cosine similarity of reports (rows) and volumes (columns) of the same scans; the diagonal should stand
    out."""
    figure, axes = _canvas(1, 1, (5.2, 4.6))
    axis = axes[0][0]
    image = axis.imshow(matrix, cmap="viridis", interpolation="nearest")
    axis.set_xlabel("volumes")
    axis.set_ylabel("reports")
    figure.colorbar(image, ax=axis, label="cosine similarity", shrink=0.8)
    _save(figure, path)


def reliability(path: Path, probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """Plot observed frequency against predicted probability, for all labels together and for each, with 95 % intervals
    (Wilson 1927); the area of a point is proportional to its number of volumes. ``probabilities``, ``labels`` (n, L);
    NaN labels are ignored."""
    known = ~np.isnan(labels)
    panels = [("all labels", probabilities[known], labels[known])]
    for index, name in enumerate(names):
        kept = known[:, index]
        panels.append((name, probabilities[kept, index], labels[kept, index]))
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _canvas(rows, columns, (2.35 * columns, 2.45 * rows), share=True)
    for axis, (name, p, y) in zip(axes.flat, panels, strict=False):
        axis.plot([0, 1], [0, 1], color="0.75", lw=0.8)
        error = "no volume"
        if len(y):
            predicted, observed, count = metrics.reliability(y, p)
            axis.vlines(predicted, *_wilson(observed, count), color=BAR, alpha=0.35, lw=1.5)
            axis.plot(predicted, observed, color=BAR, lw=0.8)
            axis.scatter(
                predicted, observed, s=4 + 90 * count / count.sum(), color=BAR, alpha=0.8, linewidths=0, clip_on=False
            )
            error = f"calibration error {metrics.calibration_error(y, p):.3f}"
        axis.set_title("\n".join([*textwrap.wrap(name, 24), error]), fontsize=8, color=INK)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_aspect("equal")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("predicted probability", fontsize=9)
    figure.supylabel("observed frequency", fontsize=9)
    _save(figure, path)


def _wilson(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Confidence limits of a binomial fraction of ``count``."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return middle - half, middle + half


def _canvas(rows: int, columns: int, size: tuple[float, float], widths: list[float] | None = None, share: bool = False):  # type: ignore[no-untyped-def]
    # matplotlib's object interface instead of pyplot needs no global state and no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=widths, sharex=share, sharey=share)


def _words(axis: Any, title: str, text: str, mono: bool = False) -> None:
    axis.axis("off")
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    axis.text(
        0,
        0.98,
        text,
        va="top",
        fontsize=8,
        family="monospace" if mono else None,
        transform=axis.transAxes,
        color=INK,
    )


def _save(figure: Any, path: Path) -> None:
    with written_beside(path, suffix=".png") as partial:
        figure.savefig(partial, dpi=110, format="png")
