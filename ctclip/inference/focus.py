"""Locate a finding in a stored volume from masks of the scan, to choose the slices of an example."""

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

# Minimum fraction of a stored voxel that the mask must cover, because small findings cover no voxel completely.
FILLED = 0.25


def smallest_finding(
    cohort: Path, masks: Path, spec: PreprocessingSpec, layout: str = "phantom"
) -> Callable[[str], Focus | None]:
    """Return a function from a volume's id to its smallest finding with a mask, on the grid of ``spec`` [slice, row,
    column]; large findings are visible on any slice. The function returns None if there is no mask, or no masked
    finding lies in the grid. Raises ExplanationError or PreprocessingError if a mask or a scan cannot be read."""
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
