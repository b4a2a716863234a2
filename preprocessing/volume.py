"""A CT volume in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Volume:
    """``array`` [slice, row, column], int16 or float32, in HU once ``hounsfield.to_hu`` has passed it.

    ``affine`` (4, 4) maps indices (slice, row, column, 1) to LPS+ millimetres: columns run to the patient's
    left, rows to the back, slices to the head, unless the axes have not been oriented yet. ``source`` is the
    file's name for messages; no patient identifier is kept. ``geometry_doubt`` says in one line why the header's geometry
    cannot be taken as it is (missing, blank or contradictory), and is None where it can; ``geometry_check.settle``
    decides what becomes of the volume then.
    """

    array: np.ndarray
    affine: np.ndarray
    source: str
    warnings: list[str] = field(default_factory=list)
    geometry_doubt: str | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along [slice, row, column]."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(steps[0]), float(steps[1]), float(steps[2])
