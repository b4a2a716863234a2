"""Detection over a store or over files of a user: batches in, one prediction table out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ctclip.data.dataset import stored_rows
from ctclip.errors import DataError
from ctclip.evaluation.tables import prediction_table
from ctclip.inference.detector import Detector
from ctclip.models.folder import ModelFolder
from preprocessing.cohorts import FILES
from preprocessing.errors import PreprocessingError
from preprocessing.pipeline import prepare
from preprocessing.progress import track
from preprocessing.store import VolumeStore


@dataclass
class Detections:
    """A prediction table and the unit embeddings (n, dim) of its volumes; ``refused`` scans with their reason."""

    table: pd.DataFrame
    embeddings: np.ndarray
    refused: dict[str, str]


def detect_store(
    loaded: ModelFolder, detector: Detector, store: VolumeStore, split: str | None, batch: int
) -> Detections:
    """Every stored volume of a split. A store of another spec than the model's is refused."""
    if store.spec.hash != loaded.spec.hash:
        raise DataError(
            f"{store.path}: prepared with spec {store.spec.name!r} ({store.spec.hash}), the model {loaded.path} wants "
            f"{loaded.spec.name!r} ({loaded.spec.hash}); run `ctclip preprocess --spec {loaded.path}/preprocessing.yaml`"
        )
    rows = stored_rows(store, split)
    batches = [rows["volume"].iloc[start : start + batch] for start in range(0, len(rows), batch)]
    voxels = (np.stack([loaded.spec.normalise(store.read(name)) for name in names]) for names in batches)
    scores = list(track(_scored(detector, voxels), len(batches), "detecting", "batches"))
    return _table(loaded, detector, rows, scores, {})


def detect_files(
    loaded: ModelFolder,
    detector: Detector,
    paths: Sequence[Path],
    *,
    trust: str = "auto",
    expect: str = "any",
) -> Detections:
    """Scans of a user: files, DICOM folders, or folders of files. One that is refused does not stop the others."""
    rows, voxels, refused = [], [], {}
    scores = []
    for path in track(_expanded(paths), len(_expanded(paths)), "detecting", "scans"):
        try:
            ready = prepare(path, loaded.spec, trust=trust, expect=expect)  # type: ignore[arg-type]
        except PreprocessingError as error:
            refused[str(path)] = str(error)
            continue
        name = _name(path)
        rows.append({"volume": name, "patient": name, "scan": name, "warnings": "; ".join(ready.warnings)})
        voxels = [ready.voxels[None]]
        scores += list(_scored(detector, voxels))
    if not rows:
        raise DataError(next(iter(refused.values()), "no scans given"))
    return _table(loaded, detector, pd.DataFrame(rows), scores, refused)


def _scored(detector: Detector, batches: Iterator[np.ndarray] | list[np.ndarray]) -> Iterator[tuple[np.ndarray, ...]]:
    device = detector.positive.device
    for voxels in batches:
        volumes = torch.from_numpy(np.ascontiguousarray(voxels))[:, None].to(device)
        yield tuple(tensor.float().cpu().numpy() for tensor in detector.detect(volumes))


def _table(
    loaded: ModelFolder,
    detector: Detector,
    rows: pd.DataFrame,
    scores: list[tuple[np.ndarray, ...]],
    refused: dict[str, str],
) -> Detections:
    probabilities, margins, embeddings = (np.concatenate(part) for part in zip(*scores, strict=True))
    warnings = rows["warnings"].tolist() if "warnings" in rows.columns else None
    names = list(detector.abnormalities)
    table = prediction_table(rows, names, probabilities, margins, loaded.hash, loaded.spec.hash, warnings)
    return Detections(table, embeddings, refused)


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """Folders of volume files become their files; a folder of DICOM slices is one scan."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(FILES)) if path.is_dir() else []
        found += inside or [path]
    return found


def _name(path: Path) -> str:
    name = path.name
    for suffix in FILES:
        name = name.removesuffix(suffix)
    return name


@torch.inference_mode()
def report_embeddings(loaded: ModelFolder, rows: pd.DataFrame, batch: int = 64) -> np.ndarray:
    """Unit embeddings (n, dim) of findings and impression together; empty reports become NaN."""
    texts = [f"{f} {i}".strip() for f, i in zip(rows["findings"], rows["impression"], strict=True)]
    distinct = sorted({text for text in texts if text})
    vectors: dict[str, np.ndarray] = {}
    for start in range(0, len(distinct), batch):
        part = distinct[start : start + batch]
        vectors |= dict(zip(part, loaded.model.encode_text(part).float().cpu().numpy(), strict=True))
    nothing = np.full(loaded.model.config.dim, np.nan, dtype=np.float32)
    return np.stack([vectors.get(text, nothing) for text in texts])
