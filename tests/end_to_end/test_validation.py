"""Validation of a run on held-out volumes, compared with an independent computation, also with very few volumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from ctclip import distributed
from ctclip.config import Config
from ctclip.labels import store_labels
from ctclip.models.dual_encoder import build_model
from ctclip.models.text import train_tokenizer
from ctclip.objectives.objective import Context
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from ctclip.training.engine import Engine
from ctclip.training.step import TrainingStep
from ctclip.training.validation import Validation

from ..robustness.processes import FORKED, Command
from ..robustness.runs import command

pytestmark = pytest.mark.integration

BATCH = 8
VOLUME = {"kind": "vit3d", "patch": [8, 8, 8], "stages": [], "width": 12, "heads": 2, "depth": 1}


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=no_constant) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contrastive(volumes: np.ndarray, texts: np.ndarray, scale: float, same: np.ndarray) -> float:
    """Symmetric InfoNCE of pairs (B, d) in float64; pairs in ``same`` (B, B) are excluded, except for the diagonal."""
    logits = scale * volumes.astype(float) @ texts.astype(float).T
    logits[same & ~np.eye(len(logits), dtype=bool)] = -np.inf
    return -float(np.mean([log_softmax(side, axis=1).diagonal().mean() for side in (logits, logits.T)]))


def validate(store: str, micro_batch: int | None, path: str) -> None:
    """In a separate process: write ``valid_loss`` of a model with random weights, and its inputs, to ``path``."""
    config = Config.model_validate({
        "data": {"store": store, "workers": 0},
        "model": {"dim": 8, "volume": VOLUME, "text": {"width": 16, "depth": 1, "heads": 2, "vocabulary": 300}},
        "objectives": {"clip": 1.0, "labels": 0.5},
        "training": {"batch": BATCH, "micro_batch": micro_batch, "validate_every": 1, "zero": 0},
    })  # fmt: skip
    kept = VolumeStore(Path(store))
    labels, prompts, cohort = store_labels(kept), load_prompts("report_style"), kept.cohort.set_index("volume")
    torch.manual_seed(0)
    with distributed.process_group() as device:
        model = build_model(config.model, kept.spec, train_tokenizer(cohort["findings"].tolist(), 300))
        engine = Engine(TrainingStep(Context(model, labels, prompts), config.objectives), config, device)
        validation = Validation(config, engine, labels, prompts)
        # Two scans with the same report text.
        reports, first, second = validation.data.reports, *validation.rows[:2]
        reports[second] = reports[first]
        found = validation(1.0)["valid_loss"]
        rows = np.resize(validation.rows, BATCH)
        names, texts = validation.data.table["volume"].iloc[rows].tolist(), [reports[row].text() for row in rows]
        hu = np.stack([kept.read(name) for name in names]).astype(np.float32)
        classifier = engine.module.objectives["labels"].classifier
        model.eval()
        with torch.no_grad():
            volumes = model.encode_volume(torch.from_numpy(hu.clip(-1000, 1000) / 1000)[:, None])
            words, scale = model.encode_text(texts), model.similarity.scale()
            scores = [classifier(side * scale).sigmoid().double().numpy() for side in (volumes, words)]
    assert labels is not None
    torch.save({
        "found": found, "scans": cohort.loc[names, "scan"].to_numpy(), "texts": np.array(texts), "scores": scores,
        "truth": cohort.loc[names, list(labels.names)].to_numpy(dtype=float),
        "volumes": volumes.numpy(), "words": words.numpy(), "scale": float(scale),
    }, path)  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_loss_is_the_training_loss_of_held_out_volumes(
    store: Path, tmp_path: Path, micro_batch: int | None
) -> None:
    """A batch is filled up with repeated scans, and two scans have the same report: neither is a negative of the
    other."""
    process = FORKED.Process(target=validate, args=(str(store), micro_batch, str(tmp_path / "figures.pt")))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    made = torch.load(tmp_path / "figures.pt", weights_only=False)
    scans, texts = made["scans"], made["texts"]
    assert 2 < len(set(scans)) < BATCH
    same = (scans[:, None] == scans) | (texts[:, None] == texts)
    classified = np.mean([log_loss(made["truth"].ravel(), side.ravel()) for side in made["scores"]])
    sides = made["volumes"], made["words"], made["scale"]
    assert made["found"] == pytest.approx(contrastive(*sides, same) + 0.5 * classified, rel=1e-5)
    blind = contrastive(*sides, np.zeros_like(same)) + 0.5 * classified
    assert abs(blind - made["found"]) > 0.05, "a loss that forgot the masks would show"


def changed(store: Path, folder: Path, change: Any) -> Path:
    """The store with another cohort table."""
    shutil.copytree(store, folder)
    table = pd.read_parquet(folder / "cohort.parquet")
    change(table)
    table.to_parquet(folder / "cohort.parquet")
    return folder


def without_reports(table: pd.DataFrame) -> None:
    table.loc[table["split"] == "valid", ["findings", "impression"]] = ""


def one_scan(table: pd.DataFrame) -> None:
    held = table["split"] == "valid"
    table.loc[held & (table["scan"] != table.loc[held, "scan"].iloc[0]), "split"] = "unused"


def validated(store: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Metrics lines of a small run that validates at its end."""
    words = command(
        store,
        output,
        "training.epochs=0.5",
        "training.text_warmup.steps=0",
        "training.validate_every=1000",
        "objectives={clip: 1}",
        *more,
    )
    done = Command(words).wait(600)
    assert done.returncode == 0, done.stderr[-3000:]
    return lines_of(output)


def test_a_split_without_reports_is_left_out(store: Path, tmp_path: Path) -> None:
    lines = validated(changed(store, tmp_path / "store", without_reports), tmp_path / "run")
    assert lines
    assert not [line for line in lines if any(key.startswith("valid") for key in line)]


def test_one_scan_for_two_ranks_is_what_it_is_for_one(store: Path, tmp_path: Path) -> None:
    alone = changed(store, tmp_path / "store", one_scan)
    figures = [validated(alone, tmp_path / str(count), "--processes", str(count))[-1] for count in (1, 2)]
    one, two = ({key: value for key, value in line.items() if key.startswith("valid")} for line in figures)
    assert one["valid_loss"] == pytest.approx(0, abs=1e-6), "no other scan, and no queue, to take it for"
    assert one["valid_recall@1"] == 1
    assert "valid_auroc" not in one, "one scan is of one class"
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
