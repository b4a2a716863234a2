"""A clinic of random volumes whose means encode two findings, and a model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from ctclip.heads.folder import write_prompt_head
from ctclip.labels import labels_of_columns
from ctclip.models.folder import save_model
from ctclip.preprocessing.cohorts.table import cohort_table
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from tests.unit.small import VIT, dual_encoder, spec_of

NAMES = ("Nodule", "Effusion")
SPEC = spec_of((8, 8, 8))


class Clinic(NamedTuple):
    store: Path
    model: Path


def cohort() -> pd.DataFrame:
    """80 volumes of 40 patients, two each: 28 to train, 12 to test; both volumes of a patient have the same labels."""
    records = []
    for number in range(80):
        patient = number // 2
        records.append({
            "volume": f"v{number:02d}", "patient": f"p{patient:02d}", "scan": f"s{number:02d}", "path": f"v{number:02d}.nii.gz",
            "split": "train" if patient < 28 else "valid", "findings": f"Report {number}.",
            "Nodule": patient % 2, "Effusion": int(patient % 4 in (1, 2)),
        })  # fmt: skip
    table = cohort_table(records)
    return table.assign(**{name: table[name].astype("Int8") for name in NAMES})


def write_clinic(folder: Path) -> Clinic:
    """The clinic's store and a model with random weights, in ``folder``."""
    store = VolumeStore.create(folder / "store", SPEC)
    table = cohort()
    random = np.random.default_rng(0)
    for row in table.itertuples():
        hu = random.normal(0, 60, SPEC.shape)
        hu[:4] += 500 * int(row.Nodule)
        hu[:, 4:] += 500 * int(row.Effusion)
        store.write(str(row.volume), hu.round().astype(np.int16))
    table.to_parquet(store.path / "cohort.parquet")
    labels = labels_of_columns("clinic", NAMES)
    labels.save(store.path / "labels.yaml")
    model = dual_encoder(VIT, SPEC, standardise=True).eval()
    save_model(
        folder / "model", model, labels, write_more=lambda f: write_prompt_head(f, load_prompts("generic"), NAMES)
    )
    return Clinic(store.path, folder / "model")


@pytest.fixture(scope="session")
def clinic_files(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    return write_clinic(tmp_path_factory.mktemp("clinic"))


@pytest.fixture
def clinic(clinic_files: Clinic, tmp_path: Path) -> Clinic:
    """The clinic's store, and a copy of its model to which a test may add heads."""
    import shutil

    shutil.copytree(clinic_files.model, tmp_path / "model")
    return Clinic(clinic_files.store, tmp_path / "model")
