"""A clinic of small random volumes with reports that state two findings and a side, and a model with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest

from ctclip.heads.folder import write_prompt_head
from ctclip.labels import labels_of_columns
from ctclip.models.folder import save_model
from ctclip.preprocessing.cohorts.table import cohort_table
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from tests.unit.small import VIT, dual_encoder, spec_of

NAMES = ("Nodule", "Effusion")
SPEC = spec_of((8, 8, 8), (2.0, 2.0, 2.0))
VOLUMES = 12


class Clinic(NamedTuple):
    store: Path
    model: Path
    scan: Path


def report(number: int) -> tuple[str, str]:
    side = "left" if number % 4 < 2 else "right"
    findings = f"A nodule is seen on the {side}." if number % 2 else "No nodule is seen."
    return f"{findings} There is no effusion.", "A nodule is seen." if number % 2 else "No nodule is seen."


@pytest.fixture(scope="session")
def clinic_files(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    folder = tmp_path_factory.mktemp("drafting")
    records = []
    for number in range(VOLUMES):
        findings, impression = report(number)
        records.append({
            "volume": f"v{number:02d}", "patient": f"p{number:02d}", "scan": f"s{number:02d}", "path": f"v{number:02d}.nii.gz",
            "split": "train" if number < 8 else "valid", "findings": findings, "impression": impression,
            "Nodule": number % 2, "Effusion": 0,
        })  # fmt: skip
    table = cohort_table(records)
    store = VolumeStore.create(folder / "store", SPEC)
    random = np.random.default_rng(0)
    for row in table.itertuples():
        hu = random.normal(-300, 60, SPEC.shape)
        hu[2:6, 2:6, slice(5, 8) if int(str(row.volume)[1:]) % 4 < 2 else slice(0, 3)] += 600 * int(row.Nodule)
        store.write(str(row.volume), hu.round().astype(np.int16))
    table.assign(**{name: table[name].astype("Int8") for name in NAMES}).to_parquet(store.path / "cohort.parquet")
    labels = labels_of_columns("clinic", NAMES)
    labels.save(store.path / "labels.yaml")
    save_model(
        folder / "model", dual_encoder(VIT, SPEC, standardise=True).eval(), labels,
        write_more=lambda partial: write_prompt_head(partial, load_prompts("generic"), NAMES),
    )  # fmt: skip
    voxels = np.full((16, 16, 16), -1000, np.int16)
    voxels[3:13, 3:13, 3:13] = random.normal(40, 10, (10, 10, 10))
    nib.save(nib.Nifti1Image(voxels, np.diag([-1.1, -1.1, 1.2, 1.0])), folder / "scan.nii.gz")
    return Clinic(store.path, folder / "model", folder / "scan.nii.gz")


@pytest.fixture
def clinic(clinic_files: Clinic, tmp_path: Path) -> Clinic:
    """With a copy of the model, because heads are saved in it."""
    shutil.copytree(clinic_files.model, tmp_path / "model")
    return Clinic(clinic_files.store, tmp_path / "model", clinic_files.scan)
