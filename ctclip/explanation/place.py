"""The peak of a map in the scan, and the size of the region around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ctclip.explanation.space import centres, in_scan
from ctclip.preprocessing.anatomy import find_lungs
from ctclip.preprocessing.pipeline import Prepared
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import FileGrid, Volume

# A region extends from the peak down to this fraction of it.
LEVEL = 0.5
# Maps with at least this many cells are not interpolated to measure regions.
FINE = 2**18
MIDLINE_MM = 15.0


@dataclass(frozen=True)
class Place:
    """One finding in one scan.

    ``peak_lps``, ``peak_ras``: the peak in mm of the scan's space, in the conventions of DICOM and NIfTI;
    ``peak_voxel``: its index [column, row, slice] in the file. ``size_mm``: extent of the region around the peak (at
    least ``level`` of the peak) from right to left, front to back and foot to head; ``volume_ml``: its volume.
    ``side``: side of the body, "" if unknown. ``values`` (d, h, w) and ``affine``: the map on the model's grid, as in
    ``Maps``; ``map()``: the map on the grid of the file.
    """

    finding: str
    probability: float
    score: float
    method: str
    level: float
    peak_lps: tuple[float, float, float]
    peak_voxel: tuple[int, int, int]
    size_mm: tuple[float, float, float]
    volume_ml: float
    side: str
    values: np.ndarray
    affine: np.ndarray
    prepared: Prepared

    @property
    def peak_ras(self) -> tuple[float, float, float]:
        x, y, z = self.peak_lps
        return -x, -y, z

    @cached_property
    def height(self) -> float:
        """The map's value at the peak."""
        return float(np.max(np.where(inside_scan(self.values.shape, self.affine, self.prepared), self.values, -np.inf)))

    def map(self, grid: FileGrid | None = None) -> np.ndarray:
        """The map on the file's grid, or on another grid in the scan's space, float32 [slice, row, column]; 0 outside the
        volume that the model saw."""
        grid = grid or self.prepared.file_grid
        return in_scan(self.values, self.affine, self.prepared, grid.shape, grid.affine)

    def facts(self) -> dict[str, Any]:
        """The finding for JSON."""
        return {
            "finding": self.finding, "probability": round(self.probability, 4), "score": round(self.score, 4),
            "method": self.method, "peak_mm_lps": _rounded(self.peak_lps), "peak_mm_ras": _rounded(self.peak_ras),
            "peak_voxel_column_row_slice": list(self.peak_voxel), "side": self.side or None,
            "size_mm_right_left": round(self.size_mm[0], 1), "size_mm_front_back": round(self.size_mm[1], 1),
            "size_mm_foot_head": round(self.size_mm[2], 1), "volume_ml": round(self.volume_ml, 1),
            "level_of_peak": self.level,
        }  # fmt: skip

    def __str__(self) -> str:
        across, deep, high = self.size_mm
        where = f"{self.side}, " if self.side else ""
        lps = ", ".join(f"{value:.0f}" for value in self.peak_lps)
        return (
            f"{self.finding}: {where}peak at ({lps}) mm LPS, voxel {list(self.peak_voxel)}; "
            f"{across:.0f} x {deep:.0f} x {high:.0f} mm (right-left x front-back x foot-head)"
        )


def locate(
    finding: str,
    probability: float,
    score: float,
    values: np.ndarray,
    affine: np.ndarray,
    prepared: Prepared,
    *,
    method: str,
    level: float = LEVEL,
) -> Place:
    """The peak of a map (d, h, w) with the affine of ``Maps``, among the cells inside the scan, and the region around
    it."""
    peak = peak_of(values, affine, prepared)
    to_lps = prepared.token_affine(affine)
    lps = (to_lps @ [*peak, 1])[:3]
    grid = prepared.file_grid
    voxel = np.rint(np.linalg.inv(grid.affine) @ [*lps, 1])[:3].astype(int)
    voxel = np.clip(voxel, 0, np.array(grid.shape) - 1)
    region = next(iter(regions_of(values, affine, prepared, level)), Region(peak, 0.0, (0.0, 0.0, 0.0), 0.0))
    return Place(
        finding, probability, score, method, level, _triple(lps), (int(voxel[2]), int(voxel[1]), int(voxel[0])),
        region.size_mm, region.volume_ml, side_of(lps, prepared), values, affine, prepared,
    )  # fmt: skip


def peak_of(values: np.ndarray, affine: np.ndarray, prepared: Prepared) -> tuple[int, int, int]:
    """The cell (d, h, w) with the highest value among those with their centre in the scan."""
    inside = inside_scan(values.shape, affine, prepared)
    z, y, x = np.unravel_index(int(np.argmax(np.where(inside, values, -np.inf))), values.shape)
    return int(z), int(y), int(x)


def inside_scan(shape: tuple[int, ...], affine: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Cells with their centre in the file's grid rather than in the padding of the model's grid: bool (d, h, w). All
    cells, if there is none."""
    grid = prepared.file_grid
    place = centres(shape, np.linalg.inv(grid.affine) @ prepared.token_affine(affine))
    inside: np.ndarray = np.all((place >= -0.5) & (place <= np.array(grid.shape) - 0.5), axis=-1)
    return inside if inside.any() else np.ones(shape, bool)


def side_of(lps: np.ndarray, prepared: Prepared) -> str:
    """The side of the body: right, left or midline (within 15 mm of the body's middle); "" if no lungs are seen."""
    if not prepared.lungs.is_chest:
        return ""
    offset = float(lps[0] - _middle(prepared))
    return "midline" if abs(offset) <= MIDLINE_MM else "left" if offset > 0 else "right"


def _middle(prepared: Prepared) -> float:
    """x of the body's middle in mm. Columns of an oriented scan run to the patient's left, as x does in LPS."""
    return float(prepared.scan.affine[0, 3] + prepared.scan.affine[0, 2] * prepared.lungs.midline())


def by_side(values: np.ndarray, affine: np.ndarray, prepared: Prepared) -> dict[str, float]:
    """The highest value of a map (d, h, w) in the right and in the left half of the body; empty if no lungs are seen,
    or if the scan shows only one half."""
    if not prepared.lungs.is_chest:
        return {}
    left = centres(values.shape, prepared.token_affine(affine))[..., 0] > _middle(prepared)
    inside = inside_scan(values.shape, affine, prepared)
    halves = {"right": values[inside & ~left], "left": values[inside & left]}
    return {side: float(half.max()) for side, half in halves.items()} if all(map(len, halves.values())) else {}


def stored_by_side(
    values: np.ndarray, affine: np.ndarray, voxels: np.ndarray, spec: PreprocessingSpec
) -> dict[str, float]:
    """``by_side`` for voxels (D, H, W) of a store, whose columns run to the patient's left, in [-1, 1] of the spec's
    window."""
    low, high = spec.hu_window
    hu = ((voxels + 1) / 2 * (high - low) + low).astype(np.float32)
    lungs = find_lungs(Volume(hu, np.diag([*spec.spacing, 1.0]), "a stored volume"))
    if not lungs.is_chest:
        return {}
    left = centres(values.shape, affine)[..., 2] > lungs.midline() * spec.spacing[2]
    halves = {"right": values[~left], "left": values[left]}
    return {side: float(half.max()) for side, half in halves.items()} if all(map(len, halves.values())) else {}


@dataclass(frozen=True)
class Region:
    """A connected region of a map: its highest cell (d, h, w), the value there, its extent in mm from right to left,
    front to back and foot to head, and its volume."""

    peak: tuple[int, int, int]
    height: float
    size_mm: tuple[float, float, float]
    volume_ml: float


def regions_of(values: np.ndarray, affine: np.ndarray, prepared: Prepared, level: float) -> list[Region]:
    """Connected regions at or above ``level`` of the map's peak, the highest first, inside the scan. Sizes are measured
    in steps of a third of a cell, or of a cell if there are many, along the axes of the oriented scan."""
    from scipy import ndimage

    values = np.where(inside_scan(values.shape, affine, prepared), values, values.min())
    top = float(values.max())
    if top <= 0:
        return []
    # Odd, so that the centres of cells are sampled; a map with detail is fine enough.
    steps = np.array([3 if extent > 1 and values.size < FINE else 1 for extent in values.shape])
    fine = ndimage.zoom(values, steps, order=1, mode="nearest", grid_mode=True)
    inside = fine >= level * float(fine.max())
    labels, count = ndimage.label(inside)
    to_lps = prepared.token_affine(affine)
    cell = np.linalg.norm(to_lps[:3, :3], axis=0) / steps
    # The axes of the map that run along x, y and z.
    along = np.abs(to_lps[:3, :3]).argmax(axis=1)
    regions = []
    for number, box in enumerate(ndimage.find_objects(labels, count), start=1):
        part = labels[box] == number
        highest = np.unravel_index(int(np.argmax(np.where(part, fine[box], -np.inf))), part.shape)
        at = np.array(highest) + [side.start for side in box]
        z, y, x = (int(place) for place in at // steps)
        peak = (z, y, x)
        reach = [(side.stop - side.start) * mm for side, mm in zip(box, cell, strict=True)]
        regions.append(
            Region(peak, float(values[peak]), _triple([reach[axis] for axis in along]), float(part.sum() * np.prod(cell) / 1000))
        )  # fmt: skip
    return sorted(regions, key=lambda region: -region.height)


def _triple(values: object) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)  # type: ignore[attr-defined]
    return x, y, z


def _rounded(values: tuple[float, float, float]) -> list[float]:
    return [round(value, 1) for value in values]
