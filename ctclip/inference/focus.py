"""The location of a finding in a stored volume, from masks of the scan: the place at which an example is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ctclip.evaluation.figures import Focus
from ctclip.explanation.masks import Masks, load_layout
from ctclip.explanation.space import resample
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.facts import table_facts
from ctclip.preprocessing.pipeline import prepare
from ctclip.preprocessing.spec import PreprocessingSpec

# Of a voxel of the store, what a mask must fill to count: small findings fill none wholly.
FILLED = 0.25


def smallest_finding(
    cohort: Path, masks: Path, spec: PreprocessingSpec, layout: str = "phantom"
) -> Callable[[str], Focus | None]:
    """A function from a volume's id to the smallest finding that a mask shows in it, on the grid of ``spec`` [slice, row,
    column]: large ones are on any slice. It returns None where there is no mask, or none of its findings is in the grid.
    Raises ExplanationError or PreprocessingError where a mask or a scan cannot be read."""
    drawn, scans = Masks(masks, load_layout(layout)), read_cohort(cohort)
    facts = scans.table.set_index("volume")

    def of(volume: str) -> Focus | None:
        if volume not in drawn.volumes or volume not in scans.files:
            return None
        known = {str(key): value for key, value in facts.loc[volume].items()}
        ready = prepare(scans.files[volume], spec, table=table_facts(known), series=scans.series.get(volume))
        shape = ready.stored.shape
        candidates = []
        for finding, mask in drawn.of(volume, ready.file_grid):
            share = resample(mask.astype(np.float32), ready.file_grid.affine, shape, ready.affine)
            inside = share >= min(FILLED, float(share.max()) / 2) if share.max() > 0 else np.zeros(shape, bool)
            if inside.any():
                candidates.append(Focus(finding, inside))
        return min(candidates, key=lambda focus: int(focus.mask.sum()), default=None)

    return of
