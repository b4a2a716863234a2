"""What a run says of volumes it does not learn from: by hand, and where there are hardly any."""

from __future__ import annotations

import dataclasses
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

from ..robustness.processes import Command
from ..robustness.runs import command

BATCH = 8
VOLUME = {"kind": "vit3d", "patch": [8, 8, 8], "stages": [], "width": 12, "heads": 2, "depth": 1}


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=no_constant) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contrastive(volumes: np.ndarray, texts: np.ndarray, scale: float, same: np.ndarray) -> float:
    """Symmetric InfoNCE of pairs (B, d) in float64, ``same`` (B, B) left out but for the diagonal."""
    logits = scale * volumes.astype(float) @ texts.astype(float).T
    logits[same & ~np.eye(len(logits), dtype=bool)] = -np.inf
    return -float(np.mean([log_softmax(side, axis=1).diagonal().mean() for side in (logits, logits.T)]))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_loss_is_the_training_loss_of_held_out_volumes(store: Path, micro_batch: int | None) -> None:
    """A batch is filled up by repeated scans, and two scans have one wording: none is a negative of the other."""
    config = Config.model_validate({
        "data": {"store": str(store), "workers": 0},
        "model": {"dim": 8, "volume": VOLUME, "text": {"width": 16, "depth": 1, "heads": 2, "vocabulary": 300}},
        "objectives": {"clip": 1.0, "labels": 0.5},
        "training": {"batch": BATCH, "micro_batch": micro_batch, "validate_every": 1, "zero": 0},
    })  # fmt: skip
    kept, labels = VolumeStore(store), store_labels(VolumeStore(store))
    assert labels is not None
    torch.manual_seed(0)
    with distributed.process_group() as device:
        table = kept.cohort
        model = build_model(config.model, kept.spec, train_tokenizer(table["findings"].tolist(), 300))
        prompts = load_prompts("report_style")
        engine = Engine(TrainingStep(Context(model, labels, prompts), config.objectives), config, device)
        validation = Validation(config, engine, labels, prompts)
        scans = len(validation.rows)
        assert 2 < scans < BATCH
        # One wording for two scans.
        reports = validation.data.reports
        reports[validation.rows[1]] = dataclasses.replace(reports[validation.rows[0]])
        found = validation(1.0)
        classifier = engine.module.objectives["labels"].classifier
        rows = np.resize(validation.rows, BATCH)
        texts = [reports[row].text() for row in rows]
        names = validation.data.table["volume"].iloc[rows]
        hu = np.stack([kept.read(name) for name in names]).astype(np.float32)
        model.eval()
        with torch.no_grad():
            volumes = model.encode_volume(torch.from_numpy(hu.clip(-1000, 1000) / 1000)[:, None])
            words = model.encode_text(texts)
            scale = float(model.similarity.scale())
            scores = [classifier(side * scale).sigmoid().double().numpy() for side in (volumes, words)]
    identity = validation.data.table["scan"].iloc[rows].to_numpy()
    same = (identity[:, None] == identity) | (np.array(texts)[:, None] == np.array(texts))
    truth = table.set_index("volume").loc[names, list(labels.names)].to_numpy(dtype=float)
    classified = np.mean([log_loss(truth.ravel(), side.ravel()) for side in scores])
    expected = contrastive(volumes.numpy(), words.numpy(), scale, same) + 0.5 * classified
    assert found["valid_loss"] == pytest.approx(expected, rel=1e-5)
    blind = contrastive(volumes.numpy(), words.numpy(), scale, np.zeros_like(same)) + 0.5 * classified
    assert abs(blind - expected) > 0.05, "a loss that forgot the masks would show"


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
    """Lines of the metrics of a small run that validates at its end."""
    words = command(
        store, output, "training.epochs=0.5", "training.text_warmup.steps=0", "training.validate_every=1000", *more
    )
    done = Command(words).wait()
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
    assert one["valid_loss"] == pytest.approx(0, abs=1e-6), "nothing to take it for"
    assert one["valid_recall@1"] == 1
    assert "valid_auroc" not in one, "one scan is of one class"
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
