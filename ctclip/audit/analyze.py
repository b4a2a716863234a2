"""Describe the embeddings that a model computes for a split: their geometry, and how it relates to the model's
accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ctclip.adaptation.examples import cached_embeddings
from ctclip.audit import geometry
from ctclip.audit.groups import group_columns, label_columns
from ctclip.data.dataset import stored_volumes
from ctclip.errors import CheckpointError, DataError
from ctclip.evaluation.metrics import auroc, mean_defined
from ctclip.heads.folder import PROMPTS as PROMPT_HEAD
from ctclip.heads.prompts import PromptHead
from ctclip.inference.model import usable_head
from ctclip.inference.run import report_embeddings, report_texts
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import ModelFolder, file_hash, load_model, read_architecture
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from ctclip.training.checkpoints import Checkpoints
from ctclip.training.export import export_checkpoint
from ctclip.training.run_model import ARCHITECTURE, PROMPTS

# Fractions of the modality gap by which volumes and reports are moved towards each other.
SHIFTS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
FEWEST = 20


@dataclass(frozen=True)
class Embedded:
    """One volume per scan and its report: ``table`` (n rows of the cohort table), ``volumes`` and ``reports`` (n, dim)
    unit vectors."""

    table: pd.DataFrame
    volumes: np.ndarray
    reports: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """``facts``: the contents of the JSON file; ``embedded``: the embeddings they were computed from, for the
    figures."""

    name: str
    facts: dict[str, Any]
    embedded: Embedded


def embed_pairs(loaded: ModelFolder, store: VolumeStore, split: str | None, cache: Path, batch: int = 8) -> Embedded:
    """Embed the first volume and the report of each scan that has a report, and cache the embeddings in ``cache``.
    Raises DataError for fewer than ``FEWEST`` scans."""
    scans = StoredScans(store, split, loaded.spec, loaded.path)
    table = stored_volumes(store, split).drop_duplicates("scan").reset_index(drop=True)
    texts = report_texts(table, loaded.trained_on.sections)
    scans.table = table[[bool(text) for text in texts]].reset_index(drop=True)
    vectors = cached_embeddings(loaded, scans, cache, batch) if len(scans.table) else {}
    table = scans.table[scans.table["volume"].isin(list(vectors))].reset_index(drop=True)
    if len(table) < FEWEST:
        raise DataError(
            f"{store.path}: {len(table)} scans of split {split!r} have a report and can be read; {FEWEST} are needed"
        )
    reports = report_embeddings(loaded.model, report_texts(table, loaded.trained_on.sections))
    return Embedded(table, np.stack([vectors[name] for name in table["volume"]]), reports)


def analyse(name: str, loaded: ModelFolder, head: PromptHead | None, embedded: Embedded) -> Analysis:
    """Compute all numbers for one model. ``head``: the head whose AUROC is compared with the gap; None if the model has
    no prompts."""
    table, volumes, reports = embedded.table, embedded.volumes, embedded.reports
    patients = table["patient"].to_numpy(dtype=str)
    facts: dict[str, Any] = {
        "name": name, "model": loaded.hash, "scans": len(table), "dim": volumes.shape[1],
        "modality_gap": geometry.modality_gap(volumes, reports),
        "alignment": geometry.alignment(volumes, reports),
        "cosine_of_pairs": float(np.mean(np.sum(volumes * reports, axis=1))),
        "cosine_of_strangers": _strangers(volumes, reports),
        "inverse_temperature": float(loaded.model.similarity.scale().detach()),
        "volumes": _side(volumes), "reports": _side(reports),
    }  # fmt: skip
    groups = {**label_columns(table), **group_columns(table)}
    facts["neighbours"] = {
        group: dict(zip(("share", "chance"), _purity(volumes, values, patients), strict=True))
        for group, values in groups.items()
    }
    if head is not None:
        facts["shift"] = shifted_auroc(head, embedded)
    return Analysis(name, facts, embedded)


def shifted_auroc(head: PromptHead, embedded: Embedded) -> list[dict[str, float]]:
    """Mean zero-shot AUROC over labels after closing each fraction in ``SHIFTS`` of the gap; empty if no label of the
    head has both classes."""
    labels = label_columns(embedded.table)
    names = [name for name in head.names if name in labels]
    if not names:
        return []
    places = [head.names.index(name) for name in names]
    positive, negative = (side[places].float().cpu().numpy() for side in (head.positive, head.negative))
    gap = embedded.volumes.mean(axis=0) - embedded.reports.mean(axis=0)
    points = []
    for share in SHIFTS:
        volumes, reports = geometry.shift_gap(embedded.volumes, embedded.reports, share)
        sides = [geometry.shift_prompts(side, gap, share) for side in (positive, negative)]
        scores = volumes @ (sides[0] - sides[1]).T
        areas = [_known_auroc(labels[name], scores[:, place]) for place, name in enumerate(names)]
        points.append(
            {"share": share, "gap": geometry.modality_gap(volumes, reports), "mean_auroc": mean_defined(areas)}
        )
    return points


def models_of(model: str, device: torch.device) -> Iterator[tuple[str, ModelFolder, PromptHead | None]]:
    """The models to analyse: a model folder itself, or, for a run folder of `ctclip train`, the untrained model, each
    kept checkpoint and the final model."""
    run = Path(model)
    if not (run / ARCHITECTURE).is_dir():
        loaded = load_model(model, device)
        yield loaded.path.name, loaded, _prompt_head(loaded)
        return
    torch.manual_seed(0)
    built = read_architecture(run / ARCHITECTURE)
    untrained = ModelFolder(
        built.model.to(device).eval(),
        built.spec,
        built.labels,
        run,
        f"untrained {file_hash(run / ARCHITECTURE / 'config.yaml')}",
    )
    names = built.labels.names or load_prompts(str(run / PROMPTS)).names()
    yield "untrained", untrained, PromptHead(untrained.model, load_prompts(str(run / PROMPTS)), names)
    for step, _ in sorted(Checkpoints(run / "checkpoints", 1, built.spec.hash).found()):
        with scratch_folder("ctclip-audit-") as scratch:
            export_checkpoint(run, scratch / "model", str(step))
            loaded = load_model(scratch / "model", device)
            yield f"step {step}", loaded, _prompt_head(loaded)
    if (run / "model").is_dir():
        loaded = load_model(run / "model", device)
        yield "trained", loaded, _prompt_head(loaded)


def _prompt_head(loaded: ModelFolder) -> PromptHead | None:
    try:
        head = usable_head(loaded, PROMPT_HEAD)
    except CheckpointError:
        return None
    return head if isinstance(head, PromptHead) else None


def _side(vectors: np.ndarray) -> dict[str, Any]:
    return {
        "mean_cosine": geometry.mean_cosine(vectors),
        "uniformity": geometry.uniformity(vectors),
        "effective_rank": geometry.effective_rank(vectors),
        "dimensions_of_90_percent": geometry.dimensions_of(vectors),
        "spectrum": [round(float(share), 6) for share in geometry.spectrum(vectors)[:50]],
    }


def _strangers(volumes: np.ndarray, reports: np.ndarray) -> float:
    """Mean cosine between a volume and the report of another scan."""
    count = len(volumes)
    total = float(volumes.sum(axis=0, dtype=float) @ reports.sum(axis=0, dtype=float))
    return (total - float(np.sum(volumes * reports))) / (count * (count - 1))


def _purity(vectors: np.ndarray, values: np.ndarray, patients: np.ndarray) -> tuple[float, float]:
    known = ~np.isnan(values) if values.dtype.kind == "f" else values != ""
    return geometry.neighbour_purity(vectors[known], values[known], patients[known])


def _known_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    known = ~np.isnan(labels)
    return auroc(labels[known], scores[known])
