"""A CT volume in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FileGrid:
    """The voxel grid of a scan in its file, before orientation: ``shape`` and ``affine`` (4, 4) from index to LPS+ mm,
    both [slice, row, column] in the file's axis order (reversed for NIfTI)."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray, columns_first: bool) -> FileGrid:
        """The grid of a volume as read."""
        i, j, k = shape
        return cls((k, j, i), affine[:, [2, 1, 0, 3]]) if columns_first else cls((i, j, k), affine)

    @property
    def nifti_affine(self) -> np.ndarray:
        """The affine (4, 4) from [column, row, slice] to RAS+ mm, as in NIfTI."""
        ras: np.ndarray = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine)[:, [2, 1, 0, 3]]
        return ras


@dataclass
class Volume:
    """``array`` [slice, row, column], int16 or float32, in HU after ``hounsfield.to_hu``.

    ``affine`` (4, 4) maps indices (slice, row, column, 1) to LPS+ millimetres: columns run to the patient's left, rows
    to the back, slices to the head, unless the axes have not been oriented yet. ``source`` is the file's name for
    messages; no patient identifier is kept. ``geometry_doubt`` states in one line why the header's geometry cannot be
    trusted (missing, blank or contradictory), or is None; ``geometry_check.settle`` then resolves the doubt or refuses
    the volume. ``columns_first``: ``array`` is [column, row, slice], as in NIfTI, until it is oriented.
    ``fixed_geometry``: the format itself (DICOM, .npz) defines the geometry, which no table may change. ``headers``:
    headers of the DICOM images of the slices, in the same order. They identify the patient, and are passed on only on
    request (``Reading.headers``).
    """

    array: np.ndarray
    affine: np.ndarray
    source: str
    warnings: list[str] = field(default_factory=list)
    geometry_doubt: str | None = None
    columns_first: bool = False
    fixed_geometry: bool = False
    headers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Spacing in mm along [slice, row, column]."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(steps[0]), float(steps[1]), float(steps[2])
