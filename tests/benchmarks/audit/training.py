"""What a fifth of swapped reports costs, and what `ctclip filter-pairs` saves of it: three training runs a seed.

Every stage is an ordinary command and is kept, so that the measurement resumes: `--runs FOLDER`. The runs see equally
many volumes, as is the field's practice for comparing filters (Gadre et al. 2023, DataComp). They are compared by what they were
trained for, finding the report of a held-out scan among all others, and by zero-shot AUROC, on which few swapped pairs leave
hardly a trace.
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
from scipy.special import logsumexp

from ctclip.evaluation.tables import read_embeddings
from ctclip.inference.run import REPORT as REPORT_EMBEDDING
from ctclip.inference.run import VOLUME
from tests.benchmarks.common import ONE_THREAD, table

SHARE = 0.2
RUNS_COMPARED = ("clean", "swapped", "filtered")
# Figures in words, and whether more (1) or less (-1) is better.
FIGURES = {"loss": ("contrastive loss", -1), "recall": ("report recall@10", 1), "auroc": ("mean zero-shot AUROC", 1)}
SCALES = np.geomspace(1, 100, 60)
Result = dict[str, dict[str, float]]
RUNS = Path("runs/audit/training")
REPORT = ["clinical_information", "technique", "findings", "impression"]


@dataclass(frozen=True)
class Recipe:
    """What is trained: ``pairs`` of train, one reconstruction each, seen ``epochs`` times."""

    pairs: int = 2700
    epochs: float = 3
    warmup: int = 80


def show(demo: Path, model: Path, seeds: int = 1, runs: Path = RUNS, recipe: Recipe = Recipe()) -> str:
    """``demo``: its store is trained on, its model is not used."""
    results = [seed_result(demo / "store", runs / f"{recipe.pairs}x{recipe.epochs:g}" / str(seed), recipe, seed) for seed in range(seeds)]  # fmt: skip
    rows = [row for seed, result in enumerate(results) for row in _rows(str(seed), result)]
    if seeds > 1:
        rows += _rows("mean", {run: {name: float(np.mean([result[run][name] for result in results])) for name in results[0][run]} for run in results[0]})  # fmt: skip
    head = ["seed", "on the held-out patients", *RUNS_COMPARED, "lost", "lost with the filter", "share of the loss that remains"]  # fmt: skip
    filters = [[str(seed), f"{result['filter']['left out']:.1%}", f"{result['filter']['swapped']:.0%}"] for seed, result in enumerate(results)]  # fmt: skip
    title = f"Training on pairs of which {SHARE:.0%} are swapped ({recipe.pairs} pairs, {recipe.epochs:g} epochs)"
    return table(title, head, rows) + "\n" + table("The filter", ["seed", "left out", "of these swapped"], filters)


def _rows(name: str, result: Result) -> list[list[str]]:
    rows = []
    for figure, (words, sign) in FIGURES.items():
        clean, swapped, filtered = (result[run][figure] for run in RUNS_COMPARED)
        lost, remains = sign * (clean - swapped), sign * (clean - filtered)
        ratio = f"{remains / lost:.2f}" if lost > 0 else "nothing was lost"
        rows.append([name, words, *(f"{value:.4f}" for value in (clean, swapped, filtered, lost, remains)), ratio])
    return rows


def seed_result(store: Path, folder: Path, recipe: Recipe, seed: int) -> Result:
    """``FIGURES`` of the three runs, the share of pairs that the filter left out, and how many of these were swapped."""
    clean, swapped = folder / "clean", folder / "swapped"
    wrong = make_stores(store, clean / "store", swapped / "store", recipe.pairs, seed)
    result = {"swapped": trained(swapped / "store", swapped, recipe, seed)}
    pairs = swapped / "pairs"
    if not (pairs / "pairs.csv").is_file():
        ctclip("filter-pairs", "--model", swapped / "train" / "model", "--store", swapped / "store", "--keep", "--output", pairs)  # fmt: skip
    scored = pd.read_csv(pairs / "pairs.csv")
    kept = round(1 - json.loads((pairs / "pairs.json").read_text())["wrong"], 2)
    left_out = scored["worse_share"] < 1 - kept
    result["filter"] = {"left out": float(left_out.mean()), "swapped": float(scored["volume"][left_out].isin(wrong).mean())}  # fmt: skip
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


def trained(store: Path, folder: Path, recipe: Recipe, seed: int, kept: float = 1.0) -> dict[str, float]:
    """``FIGURES`` on valid of a model trained on the share ``kept`` of the pairs, on as many volumes in all. The reports of
    valid are never swapped."""
    model, predictions = folder / "train" / "model", folder / "predictions"
    if not model.exists():
        only = [f"data.best_pairs={kept}"] if kept < 1 else []
        ctclip(
            "train", "--config", "phantom_tiny", "--store", store, "--output", folder / "train", f"seed={seed}",
            f"preprocessing={read_spec_name(store)}", f"training.epochs={recipe.epochs / kept:.3f}", f"training.text_warmup.steps={recipe.warmup}",
            "training.summary_patients=0", *only,
        )  # fmt: skip
    if not (predictions / "predictions.csv").is_file():
        ctclip("zero-shot", "--model", model, "--store", store, "--split", "valid", "--embed-reports", "--output", predictions)  # fmt: skip
    auroc = mean_auroc(predictions / "predictions.csv", store)
    return {"auroc": auroc, **retrieval(predictions / "embeddings.parquet", store)}


def retrieval(embeddings: Path, store: Path) -> dict[str, float]:
    """Report retrieval among the held-out scans, one volume per scan: the share of scans whose report is among the first ten of
    all, and the contrastive loss (softmax cross-entropy over all reports) at its best temperature."""
    arrays = read_embeddings(embeddings)
    scans = pd.read_parquet(store / "cohort.parquet").set_index("volume").loc[arrays["volume"].tolist(), "scan"]
    first = ~scans.duplicated().to_numpy()
    volumes, reports = (arrays[name][first].astype(float) for name in (VOLUME, REPORT_EMBEDDING))
    cosines = (volumes / np.linalg.norm(volumes, axis=1, keepdims=True)) @ (reports / np.linalg.norm(reports, axis=1, keepdims=True)).T  # fmt: skip
    own = np.diag(cosines)
    losses = [float((logsumexp(scale * cosines, axis=1) - scale * own).mean()) for scale in SCALES]
    return {"recall": float(((cosines > own[:, None]).sum(axis=1) < 10).mean()), "loss": min(losses)}


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
