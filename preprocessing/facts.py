"""Values of a metadata table for a volume: slope, intercept, and the geometry if the header has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.geometry_check import Geometry, differ, settle
from ctclip.preprocessing.tables import numbers
from ctclip.preprocessing.volume import Volume

# A cohort table's columns of geometry, and what CT-RATE (after DICOM) calls them.
GEOMETRY_COLUMNS = {
    "xy_spacing": "XYSpacing",
    "z_spacing": "ZSpacing",
    "image_orientation": "ImageOrientationPatient",
    "image_position": "ImagePositionPatient",
}
# Tolerance for rounding of lengths and the right angle of stated directions.
ROUNDING = 0.01


@dataclass(frozen=True)
class TableFacts:
    """``slope`` and ``intercept`` convert values to HU. ``spacing`` (x, y, z) mm, ``orientation`` (6,) direction
    cosines of a file's first and second axis and ``position`` (3,) mm of its first voxel, all in LPS+, are None where
    the table lacks them."""

    slope: float = 1.0
    intercept: float = 0.0
    spacing: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    position: tuple[float, ...] | None = None

    @property
    def affine(self) -> np.ndarray | None:
        """The affine (4, 4) from voxel (i, j, k), in file order, to LPS+ mm; None unless all of it is stated.

        As in CT-RATE's own repair script, slices are stacked along the normal of the first two axes.
        """
        if self.spacing is None or self.orientation is None or self.position is None:
            return None
        first, second = (np.array(part) / np.linalg.norm(part) for part in (self.orientation[:3], self.orientation[3:]))
        affine = np.eye(4)
        affine[:3, :3] = np.stack([first, second, np.cross(first, second)], axis=1) * np.array(self.spacing)
        affine[:3, 3] = self.position
        return affine

    @property
    def lacks(self) -> str:
        """Which of the table's columns of geometry are missing, for a message."""
        stated = {
            "XYSpacing or ZSpacing": self.spacing,
            "ImageOrientationPatient": self.orientation,
            "ImagePositionPatient": self.position,
        }
        return ", ".join(name for name, value in stated.items() if value is None)

    @property
    def state_geometry(self) -> bool:
        """Whether the table states any geometry."""
        return any(value is not None for value in (self.spacing, self.orientation, self.position))


def table_facts(row: Mapping[str, Any]) -> TableFacts:
    """The facts in one row of a cohort table; columns of geometry may be absent."""
    plane, step = numbers(row.get("xy_spacing"), 2), numbers(row.get("z_spacing"), 1)
    plane = plane or (numbers(row.get("xy_spacing"), 1) or []) * 2
    turn, place = numbers(row.get("image_orientation"), 6), numbers(row.get("image_position"), 3)
    turn = turn if turn and _are_directions(turn) else None
    spacing = (*plane, abs(step[0])) if plane and step and min(*plane, abs(step[0])) > 0 else None
    return TableFacts(
        float(row["rescale_slope"]), float(row["rescale_intercept"]), spacing,
        tuple(turn) if turn else None, tuple(place) if place else None,
    )  # fmt: skip


def _are_directions(cosines: list[float]) -> bool:
    """Whether six numbers are two directions: of length 1, at a right angle."""
    first, second = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.array([np.linalg.norm(first), np.linalg.norm(second)])
    return bool((np.abs(lengths - 1) <= ROUNDING).all() and abs(first @ second) <= ROUNDING)


def placed(volume: Volume, facts: TableFacts | None, choice: Geometry = "auto") -> Volume:
    """The volume with a trusted geometry: the header's, or the table's if the header is blank or contradicts it.

    DICOM and .npz files have their own geometry, which no table changes. Raises PreprocessingError if neither can be
    trusted.
    """
    if facts is None or not facts.state_geometry or volume.fixed_geometry or choice not in ("auto", "table"):
        return settle(volume, None, choice)
    # The table lists the axes of a file from the fastest.
    order = [0, 1, 2, 3] if volume.columns_first else [2, 1, 0, 3]
    affine = facts.affine
    if affine is not None:
        affine = affine[:, order]
        trusted = choice == "auto" and volume.geometry_doubt is None
        return settle(volume, None if trusted and _same_box(volume, affine) else affine, choice)
    if volume.geometry_doubt is not None and choice == "auto":
        raise PreprocessingError(
            f"{volume.source}: {volume.geometry_doubt}, and its metadata table has no usable {facts.lacks}; "
            f"complete or correct the table, or convert the scan from DICOM again"
        )
    if choice == "table":
        raise PreprocessingError(
            f"{volume.source}: --geometry table, but its metadata table has no usable {facts.lacks}"
        )
    if facts.spacing is None:
        return settle(volume, None, choice)
    spacing = np.array(facts.spacing)[order[:3]]
    # A reoriented header keeps its spacings, but on other axes.
    if np.allclose(np.sort(spacing), np.sort(volume.spacing), rtol=0.01):
        return settle(volume, None, choice)
    turned = volume.affine.copy()
    turned[:3, :3] *= spacing / np.array(volume.spacing)
    return settle(volume, turned, choice)


def _same_box(volume: Volume, table: np.ndarray) -> bool:
    """Whether header and table describe the same box with different axes: then the file was reoriented later, and its
    header is right."""
    if not differ(volume.affine, table):
        return False
    if not np.allclose(np.sort(volume.spacing), np.sort(np.linalg.norm(table[:3, :3], axis=0)), rtol=0.01):
        return False
    shape = np.array(volume.array.shape)
    steps = np.linalg.norm(table[:3, :3], axis=0)
    # The table describes the original axes: each had the length of the header's axis along it.
    along = np.abs((table[:3, :3] / steps).T @ (volume.affine[:3, :3] / np.array(volume.spacing))).argmax(axis=1)
    if len(set(along)) < 3:
        return False
    one, other = _corners(volume.affine, shape), _corners(table, shape[along])
    return bool(np.abs(np.sort(one, axis=0) - np.sort(other, axis=0)).max() <= 0.5 * steps.max())


def _corners(affine: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The centres (8, 3) of the corner voxels in mm."""
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    return (affine[:3, :3] @ ends + affine[:3, 3:]).T
