"""A CT volume in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FileGrid:
    """The voxel grid of a scan as its file has it, before it is oriented: ``shape`` and ``affine`` (4, 4) from index to
    LPS+ mm, both [slice, row, column] in the file's own order of axes (a NIfTI's reversed)."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray, columns_first: bool) -> FileGrid:
        """The grid of a volume as it was read."""
        i, j, k = shape
        return cls((k, j, i), affine[:, [2, 1, 0, 3]]) if columns_first else cls((i, j, k), affine)

    @property
    def nifti_affine(self) -> np.ndarray:
        """(4, 4) from [column, row, slice] to RAS+ mm, as NIfTI counts."""
        ras: np.ndarray = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine)[:, [2, 1, 0, 3]]
        return ras


@dataclass
class Volume:
    """``array`` [slice, row, column], int16 or float32, in HU once ``hounsfield.to_hu`` has passed it.

    ``affine`` (4, 4) maps indices (slice, row, column, 1) to LPS+ millimetres: columns run to the patient's
    left, rows to the back, slices to the head, unless the axes have not been oriented yet. ``source`` is the
    file's name for messages; no patient identifier is kept. ``geometry_doubt`` says in one line why the header's geometry
    cannot be taken as it is (missing, blank or contradictory), and is None where it can; ``geometry_check.settle``
    decides what becomes of the volume then. ``columns_first``: ``array`` is [column, row, slice] as a NIfTI's, which holds
    until it is oriented. ``fixed_geometry``: no table may state another, as the format itself (DICOM, .npz) says where voxels
    lie. ``headers``: those of the DICOM images that the slices come from, in the slices' order, which
    identify the patient: they are not passed on unless they are asked for (``Reading.headers``).
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
        """mm along [slice, row, column]."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(steps[0]), float(steps[1]), float(steps[2])
