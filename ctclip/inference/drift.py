"""Compute a model's summary of its training scans from a store, and compare it with every scan that is scored."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ctclip.data.dataset import stored_volumes
from ctclip.drift.facts import Source
from ctclip.drift.summary import FEWEST, FILE, RATE, WORST_RATE, Described, TrainingSummary
from ctclip.inference.scans import Scans, StoredScans, prefetch
from ctclip.models.folder import ModelFolder, check_addition, load_model
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore

# Default numbers of training patients and held-out patients for a summary.
MOST_PATIENTS = 300
HELD_OUT = "calibration"


def usable_summary(loaded: ModelFolder) -> TrainingSummary | None:
    """The summary in a model folder; None, with a warning, if it belongs to other weights."""
    summary = TrainingSummary.load(loaded.path)
    if summary is not None and summary.model != loaded.hash:
        print(
            f"warning: the summary of training scans in {loaded.path} belongs to other weights ({summary.model}), so "
            f"it is not used; run `ctclip summarise` to compute one",
            file=sys.stderr,
        )
        return None
    return summary


def drift_warnings(
    summary: TrainingSummary | None,
    spec: PreprocessingSpec,
    voxels: Sequence[np.ndarray] | np.ndarray,
    embeddings: np.ndarray,
    sources: Sequence[Source | None],
) -> list[str]:
    """A warning for each scan that is far from the training scans, "" for the others; all "" without a summary.

    ``voxels``: those of each scan [slice, row, column] in [-1, 1]; ``embeddings`` (n, dim) unit vectors.
    """
    if summary is None:
        return [""] * len(voxels)
    scans = zip(voxels, embeddings, sources, strict=True)
    verdicts = [summary.judge(Described.of(one, spec, vector, source)) for one, vector, source in scans]
    return [verdict.warning() if verdict.far else "" for verdict in verdicts]


def summarise(
    model: str | Path,
    store: VolumeStore,
    device: str | torch.device = "cpu",
    *,
    split: str = "train",
    held_out: str | None = None,
    most: int = MOST_PATIENTS,
    rate: float = RATE,
    seed: int = 0,
) -> TrainingSummary | None:
    """Summarise ``split`` of the store and save the summary in the folder of ``model``; None if there are too few
    patients.

    Uses one volume per patient, of at most ``most`` patients, chosen at random. ``held_out``: a split of patients that
    the model was not trained on, which sets the limit; by default ``calibration`` if it has enough patients, else
    cross-validation within ``split``.
    """
    if _patients(store, split) < FEWEST:
        return None
    loaded = load_model(model, device)
    check_addition(loaded.path, FILE)
    if held_out is None and split != HELD_OUT and _patients(store, HELD_OUT) + 1 >= 1 / WORST_RATE:
        held_out = HELD_OUT
    training = _described(loaded, store, split, most, seed)
    others = _described(loaded, store, held_out, most, seed) if held_out is not None else []
    summary = TrainingSummary.fit(training, others, model=loaded.hash, rate=rate, seed=seed)
    if summary is not None:
        summary.save(loaded.path)
    return summary


def _patients(store: VolumeStore, split: str) -> int:
    """The number of patients with a stored volume in a split."""
    table = store.cohort[store.cohort["split"] == split]
    return int(table["patient"][table["volume"].isin(set(store.volumes))].nunique())


def one_a_patient(table: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """One volume for each of at most ``most`` patients, drawn at random."""
    return table.sample(frac=1, random_state=seed).drop_duplicates("patient").head(most).sort_values("volume")


def _described(loaded: ModelFolder, store: VolumeStore, split: str, most: int, seed: int) -> list[Described]:
    scans = StoredScans(store, split, loaded.spec, loaded.path)
    scans.table = one_a_patient(stored_volumes(store, split), most, seed).reset_index(drop=True)
    return describe(loaded, scans, f"describing {split}")


def describe(loaded: ModelFolder, scans: Scans, what: str = "describing") -> list[Described]:
    """Describe every readable scan, encoded one at a time."""
    described = []
    indices = range(len(scans.table))
    for index, result in track(zip(indices, prefetch(scans.voxels, indices), strict=True), len(indices), what, "scans"):
        try:
            voxels, _ = result()
        except PreprocessingError as error:
            print(f"refused: {error}", file=sys.stderr)
            continue
        with torch.inference_mode():
            vector = loaded.model.encode_volume(torch.from_numpy(voxels)[None, None].to(loaded.model.device))
        described.append(Described.of(voxels, loaded.spec, vector[0].float().cpu().numpy(), scans.source(index)))
    return described
