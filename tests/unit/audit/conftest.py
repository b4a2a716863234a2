"""A store of synthetic volumes: smooth random textures that differ between patients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from ctclip.preprocessing.cohort_run import write_table
from ctclip.preprocessing.cohorts import cohort_table
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore

SPEC = PreprocessingSpec("textures", spacing=(9.0, 9.0, 9.0), shape=(24, 28, 32))
TEXT = "There is a consolidation in the right lower lobe with a small effusion, and the heart is of normal size. No nodule."


def texture(seed: int) -> np.ndarray:
    """HU [slice, row, column], a body in air."""
    noise = np.random.default_rng(seed).normal(0, 1, SPEC.shape)
    inside = np.zeros(SPEC.shape, bool)
    inside[2:-2, 3:-3, 3:-3] = True
    return np.where(inside, -300 + 900 * gaussian_filter(noise, 1.2), -1000).astype(np.float32)


def copy_of(hu: np.ndarray) -> np.ndarray:
    """Cropped at one end, shifted, noisy, with reversed slices."""
    moved = np.full_like(hu, -1000)
    moved[:-5, 1:, :-2] = hu[5:, :-1, 2:]
    return (moved + np.random.default_rng(1).normal(0, 8, hu.shape))[::-1].astype(np.float32)


@pytest.fixture(scope="package")
def textures(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """30 patients; the last is a changed copy of the fourth under another name and split, with its report."""
    store = VolumeStore.create(tmp_path_factory.mktemp("textures") / "store", SPEC)
    records = []
    for number in range(30):
        hu = copy_of(texture(3)) if number == 29 else texture(number)
        store.write(f"volume_{number}", hu)
        findings = TEXT if number in (3, 29) else f"{TEXT} Measured {number} mm."
        split = "valid" if number >= 25 else "train"
        records.append({"volume": f"volume_{number}", "patient": f"p{number}", "split": split, "path": "x", "findings": findings})  # fmt: skip
    write_table(store, pd.DataFrame(cohort_table(records)))
    return store
