"""Draw three slices through the peak of a map in radiological convention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.explanation.place import Place
from ctclip.explanation.space import in_scan
from ctclip.preprocessing.files import written_beside

LUNG, SOFT = ("lung", -1350.0, 150.0), ("soft tissue", -160.0, 240.0)
# A voxel is in lung if most voxels within a few millimetres are below this HU value.
AERATED, AROUND_MM = -500.0, 12.0
COLOURS = ("#ffd23f", "#ff7b1c", "#d7263d")
# Values below this fraction of the peak are transparent, so that the anatomy remains visible.
FAINT = 0.25
SCALE_MM = 50.0


@dataclass(frozen=True)
class View:
    """One slice: HU and fraction of the map's peak [down, across], the size of a pixel in mm, the pixel of the peak,
    letters for the left, right, upper and lower edge, and a title."""

    hu: np.ndarray
    share: np.ndarray
    mm: tuple[float, float]
    peak: tuple[int, int]
    marks: tuple[str, str, str, str]
    title: str

    @property
    def size(self) -> tuple[float, float]:
        """mm down and across."""
        return self.hu.shape[0] * self.mm[0], self.hu.shape[1] * self.mm[1]


def draw(path: Path, place: Place) -> None:
    """Write a PNG of the axial, coronal and sagittal slices through the peak, overlaid with the map; the patient's
    right is on the left."""
    with written_beside(path, suffix=".png") as partial:
        figure_of(place).savefig(partial, format="png")


def rendered(place: Place) -> np.ndarray:
    """The image as uint8 [row, column, RGB]."""
    figure = figure_of(place)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def figure_of(place: Place) -> Any:
    """The image as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    peak = _peak(place)
    views = list(_views(place, peak))
    name, low, high = _window(place, peak)
    widths = [view.size[1] for view in views]
    tall = max(view.size[0] for view in views)
    figure = Figure(figsize=(13.5, 13.5 * tall / sum(widths) + 1.0), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axis, view in zip(figure.subplots(1, 3, width_ratios=widths), views, strict=True):
        _panel(axis, view, low, high, place.level)
    figure.suptitle(
        f"{place.finding}, probability {place.probability:.0%} ({place.method}); {name} window, {low:.0f} to "
        f"{high:.0f} HU\n"
        f"colour: fraction of the map's peak, outlined at {place.level:.0%}; bar: {SCALE_MM:.0f} mm; research, not for "
        "diagnosis",
        fontsize=11,
    )
    return figure


def _peak(place: Place) -> tuple[int, int, int]:
    """The peak's voxel [slice, row, column] in the oriented scan."""
    scan = place.prepared.scan
    at = np.rint((np.linalg.inv(scan.affine) @ [*place.peak_lps, 1])[:3]).astype(int)
    z, y, x = np.clip(at, 0, np.array(scan.array.shape) - 1)
    return int(z), int(y), int(x)


def _views(place: Place, peak: tuple[int, int, int]) -> Iterator[View]:
    """Slices of the oriented scan. Its slices run upwards, its rows backwards, its columns to the patient's left."""
    scan = place.prepared.scan
    dz, dy, dx = scan.spacing
    shape, (z, y, x) = scan.array.shape, peak
    kinds = (
        ("axial", ("S", "I"), (dy, dx), (y, x), ("R", "L", "A", "P")),
        ("coronal", ("P", "A"), (dz, dx), (shape[0] - 1 - z, x), ("R", "L", "S", "I")),
        ("sagittal", ("L", "R"), (dz, dy), (shape[0] - 1 - z, y), ("A", "P", "S", "I")),
    )
    for axis, (name, ends, mm, at, marks) in enumerate(kinds):
        onto = scan.affine.copy()
        onto[:3, 3] += scan.affine[:3, axis] * peak[axis]
        thin = [1 if other == axis else extent for other, extent in enumerate(shape)]
        share = in_scan(place.values, place.affine, place.prepared, thin, onto).take(0, axis=axis) / place.height
        hu = scan.array.take(peak[axis], axis=axis)
        # Coronal and sagittal slices are flipped so that the head is above.
        hu, share = (hu, share) if axis == 0 else (hu[::-1], share[::-1])
        lps = place.peak_lps[2 - axis]
        title = (
            f"{name}, {abs(lps):.0f} mm {ends[0] if lps >= 0 else ends[1]} (slice {peak[axis] + 1} of {shape[axis]})"
        )
        yield View(hu, share, mm, at, marks, title)


def _window(place: Place, peak: tuple[int, int, int]) -> tuple[str, float, float]:
    """The display window that suits the surroundings of the peak."""
    scan = place.prepared.scan
    box = tuple(
        slice(max(0, at - round(AROUND_MM / mm)), at + round(AROUND_MM / mm) + 1)
        for at, mm in zip(peak, scan.spacing, strict=True)
    )
    return LUNG if np.median(scan.array[box]) < AERATED else SOFT


def _panel(panel: Any, view: View, low: float, high: float, level: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patheffects import withStroke

    (height, width), (dy, dx) = view.size, view.mm
    extent = (0, width, height, 0)
    heat = LinearSegmentedColormap.from_list("heat", COLOURS)(np.clip(view.share, 0, 1))
    heat[..., 3] = np.clip((view.share - FAINT) / (1 - FAINT), 0, 1) * 0.5
    panel.imshow(view.hu, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    panel.imshow(heat, extent=extent, interpolation="bilinear")
    if view.share.max() >= level:
        across, down = (np.arange(view.hu.shape[1]) + 0.5) * dx, (np.arange(view.hu.shape[0]) + 0.5) * dy
        panel.contour(across, down, view.share, levels=[level], colors=[COLOURS[0]], linewidths=1.0)
    panel.plot((view.peak[1] + 0.5) * dx, (view.peak[0] + 0.5) * dy, "+", color="#3df5ff", ms=16, mew=1.4)
    edges = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))  # fmt: skip
    for mark, (x, y, across_from, down_from) in zip(view.marks, edges, strict=True):
        panel.text(x, y, mark, transform=panel.transAxes, ha=across_from, va=down_from, color="w", fontsize=12, fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground="black")])  # fmt: skip
    panel.plot([0.04 * width, 0.04 * width + SCALE_MM], [0.96 * height] * 2, color="w", lw=3, solid_capstyle="butt")
    panel.set(xlim=(0, width), ylim=(height, 0))
    panel.set_title(view.title, fontsize=10)
    panel.axis("off")
