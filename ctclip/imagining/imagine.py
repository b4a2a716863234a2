"""Volumes of texts by one model: checks the texts, generates each volume, and scores it with the model's own
detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctclip.errors import DataError
from ctclip.explanation.find import told_from
from ctclip.heads.head import Head
from ctclip.heads.text import TextHead
from ctclip.imagining.dream import dream, noise_volume
from ctclip.imagining.synthetic import Synthetic, to_hu
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader

MEAN_OF = 200


@dataclass(frozen=True)
class Imagining:
    """How volumes are made. number: of each text; steps: of the optimisation; store and split: of the mean volume that a
    dream begins with, else it begins with noise; language: of the texts."""

    number: int = 1
    seed: int = 0
    steps: int = 100
    store: Path | None = None
    split: str = "train"
    language: str = "english"


def imagine(folder: ModelFolder, detector: Head, texts: Sequence[str], given: Imagining) -> list[Synthetic]:
    """``number`` volumes of each text, by `dream`. Raises DataError for a text that names no finding, or a store of
    another spec."""
    check_texts(folder, texts, given.language)
    mean = None if given.store is None else mean_volume(folder, given.store, given.split)
    wanted = TextHead(folder.model, list(texts), told_from(detector)).directions
    volumes = []
    for text, direction in zip(texts, wanted, strict=True):
        for number in range(given.number):
            seed = given.seed + number
            begin = noise_volume(folder.model, seed) if mean is None else mean
            made = dream(folder.model, direction, begin, steps=given.steps, seed=seed, everywhere=mean is None)
            origin = "noise" if mean is None else f"the mean of the split {given.split}"
            words = f"{given.steps} steps from {origin}, cosine with the text {made.before:.2f} to {made.after:.2f}"
            volumes.append(
                Synthetic(
                    to_hu(made.voxels, folder.spec), text, "dream", folder.hash, seed, words,
                    _detected(folder, detector, made.voxels),
                )
            )  # fmt: skip
    return volumes


def check_texts(folder: ModelFolder, texts: Sequence[str], language: str = "english") -> None:
    """Raise DataError unless every text names a finding of the model's label set."""
    cleaner = Cleaner(RulesReader.build(folder.labels, Options(language=language)))
    for text in texts:
        if not any(sentence.findings for sentence in cleaner.clean(text)):
            some = ", ".join(folder.labels.names[:4])
            raise DataError(
                f"{text[:80]!r}: names no finding of the label set {folder.labels.name} ({some} ...); write it as a report would"
            )


def mean_volume(folder: ModelFolder, store: Path, split: str) -> Tensor:
    """The mean (1, 1, D, H, W) of the first volumes of a split. Raises DataError for a store of another spec."""
    scans = StoredScans(VolumeStore(store), split, folder.spec, folder.path)
    count = min(MEAN_OF, len(scans.table))
    if not count:
        raise DataError(f"{store}: no volume in split {split!r}")
    total: np.ndarray | None = None
    for index in track(range(count), count, "mean volume", "scans"):
        voxels = scans.voxels(index)[0].astype(np.float64)
        total = voxels if total is None else total + voxels
    assert total is not None
    return torch.from_numpy((total / count).astype(np.float32))[None, None].to(folder.model.device)


@torch.inference_mode()
def _detected(folder: ModelFolder, detector: Head, voxels: np.ndarray) -> dict[str, float]:
    encoded = folder.model.encode(torch.from_numpy(voxels)[None, None].to(folder.model.device))
    probabilities = detector.probabilities(detector.score(encoded).float())[0].tolist()
    return dict(zip(detector.names, probabilities, strict=True))
