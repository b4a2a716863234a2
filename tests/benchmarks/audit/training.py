"""What a fifth of swapped reports costs, and what `ctclip filter-pairs` saves of it: three training runs a seed.

Every stage is an ordinary command and is kept, so that the measurement resumes: `--runs FOLDER`. The runs see equally
many volumes, as is the field's practice for comparing filters (Gadre et al. 2023, DataComp).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.common import ONE_THREAD, table

SHARE = 0.2
RUNS = Path("runs/audit/training")
REPORT = ["clinical_information", "technique", "findings", "impression"]


@dataclass(frozen=True)
class Recipe:
    """What is trained: ``pairs`` of train, one reconstruction each, seen ``epochs`` times."""

    pairs: int = 2700
    epochs: float = 7
    warmup: int = 80


def show(demo: Path, model: Path, seeds: int = 1, runs: Path = RUNS, recipe: Recipe = Recipe()) -> str:
    """``demo``: its store is trained on, its model is not used."""
    head = ["seed", "clean", "20% swapped", "the same, filtered", "lost", "lost with the filter", "ratio", "left out", "of them swapped"]  # fmt: skip
    results = [seed_result(demo / "store", runs / f"{recipe.pairs}x{recipe.epochs:g}" / str(seed), recipe, seed) for seed in range(seeds)]  # fmt: skip
    rows = [_row(str(seed), result) for seed, result in enumerate(results)]
    if seeds > 1:
        rows.append(_row("mean", {name: float(np.mean([result[name] for result in results])) for name in results[0]}))
    return table(f"Training on pairs of which {SHARE:.0%} are swapped: mean AUROC on valid ({recipe.pairs} pairs, {recipe.epochs:g} epochs)", head, rows)  # fmt: skip


def _row(name: str, result: dict[str, float]) -> list[str]:
    lost, filtered = result["clean"] - result["swapped"], result["clean"] - result["filtered"]
    figures = [f"{value:.4f}" for value in (result["clean"], result["swapped"], result["filtered"], lost, filtered)]
    return [name, *figures, f"{filtered / lost:.2f}", f"{result['dropped']:.1%}", f"{result['precision']:.0%}"]


def seed_result(store: Path, folder: Path, recipe: Recipe, seed: int) -> dict[str, float]:
    """Mean AUROC of the three runs, the share of pairs left out, and how many of these were swapped."""
    clean, swapped = folder / "clean", folder / "swapped"
    wrong = make_stores(store, clean / "store", swapped / "store", recipe.pairs, seed)
    result = {"swapped": trained(swapped / "store", swapped, recipe, seed)}
    pairs = swapped / "pairs"
    if not (pairs / "pairs.csv").is_file():
        ctclip("filter-pairs", "--model", swapped / "train" / "model", "--store", swapped / "store", "--keep", "--output", pairs)  # fmt: skip
    scored = pd.read_csv(pairs / "pairs.csv")
    kept = round(1 - json.loads((pairs / "pairs.json").read_text())["wrong"], 2)
    left_out = scored["worse_share"] < 1 - kept
    result["dropped"], result["precision"] = float(left_out.mean()), float(scored["volume"][left_out].isin(wrong).mean())  # fmt: skip
    result["filtered"] = trained(swapped / "store", folder / "filtered", recipe, seed, kept)
    result["clean"] = trained(clean / "store", clean, recipe, seed)
    print(folder, result, file=sys.stderr, flush=True)
    return result


def make_stores(source: Path, clean: Path, swapped: Path, pairs: int, seed: int) -> set[str]:
    """Two stores with the volumes of ``source``: ``pairs`` of train as they are, and with reports swapped among a share of
    them. Returns the volumes whose report is another's."""
    cohort = pd.read_parquet(source / "cohort.parquet")
    train = cohort[cohort["split"] == "train"].drop_duplicates("scan")
    train = train.sample(min(pairs, len(train)), random_state=seed).sort_values("volume")
    whole = pd.concat([train, cohort[cohort["split"] == "valid"]], ignore_index=True)
    wrong = np.random.default_rng(seed).choice(len(train), round(SHARE * len(train)), replace=False)
    spoilt = whole.copy()
    spoilt.loc[wrong, REPORT] = whole.loc[np.roll(wrong, 1), REPORT].to_numpy()
    for folder, made in ((clean, whole), (swapped, spoilt)):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("spec.yaml", "labels.yaml"):
            (folder / name).write_bytes((source / name).read_bytes())
        if not (folder / "volumes").exists():
            (folder / "volumes").symlink_to((source / "volumes").resolve())
        if not (folder / "cohort.parquet").exists():
            made.to_parquet(folder / "cohort.parquet", index=False)
    return set(whole["volume"].iloc[wrong])


def trained(store: Path, folder: Path, recipe: Recipe, seed: int, kept: float = 1.0) -> float:
    """Mean AUROC on valid of a model trained on the share ``kept`` of the pairs, on as many volumes in all."""
    model, predictions = folder / "train" / "model", folder / "predictions"
    if not model.exists():
        only = [f"data.best_pairs={kept}"] if kept < 1 else []
        ctclip(
            "train", "--config", "phantom_tiny", "--store", store, "--output", folder / "train", f"seed={seed}",
            f"preprocessing={read_spec_name(store)}", f"training.epochs={recipe.epochs / kept:.3f}", f"training.text_warmup.steps={recipe.warmup}",
            "training.summary_patients=0", *only,
        )  # fmt: skip
    if not (predictions / "predictions.csv").is_file():
        ctclip("zero-shot", "--model", model, "--store", store, "--split", "valid", "--output", predictions)
    return mean_auroc(predictions / "predictions.csv", store)


def read_spec_name(store: Path) -> str:
    from ctclip.preprocessing.store import VolumeStore

    return VolumeStore(store).spec.name


def mean_auroc(predictions: Path, store: Path) -> float:
    from sklearn.metrics import roc_auc_score

    scores = pd.read_csv(predictions).set_index("volume")
    truth = pd.read_parquet(store / "cohort.parquet").set_index("volume").loc[scores.index]
    names = [name for name in scores if f"margin:{name}" in scores and name in truth]
    return float(np.mean([roc_auc_score(truth[name].astype(int), scores[name]) for name in names]))


def ctclip(*arguments: object) -> None:
    command = [sys.executable, "-m", "ctclip", *map(str, arguments)]
    print("$", *command[2:], file=sys.stderr, flush=True)
    environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
