"""What each switch of the training is worth: ``python -m tests.benchmarks.recipes --store runs/demo/store --output runs/recipes``.

Every line is a run of the demo's recipe with one thing changed: the commands `ctclip train`, `zero-shot` and `evaluate`
on held-out patients. Started again, it goes on where it was. ``--curve`` adds learning curves over the number of volumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.findings import FINDINGS
from tests.benchmarks.common import machine, table

# As in phantom_published.
CTVIT = "{kind: ctvit, shape: [64, 80, 112], patch: [8, 16, 16], width: 192, spatial_depth: 2, temporal_depth: 2, heads: 6, codebook_size: 1024}"  # fmt: skip
# Name -> configuration and what is changed in it.
VARIANTS: dict[str, tuple[str, ...]] = {
    "phantom_tiny": ("phantom_tiny",),
    "phantom_published": ("phantom_published",),
    "negatives of 8 alone": ("phantom_tiny", "objectives.memory=0", "objectives.negatives=8"),
    "texts of the batch alone": ("phantom_tiny", "objectives.memory=0"),
    "positives by position": ("phantom_tiny", "objectives.by_identity=false"),
    "stem not pooled": ("phantom_tiny", "model.volume.pool_stem=false"),
    "no extremes": ("phantom_tiny", "model.volume.extremes=false"),
    "sections drawn": ("phantom_tiny", "data.views={report: 1, findings: 1, impression: 1}"),
    "sentences drawn": ("phantom_tiny", "data.views={report: 1, sentences: 1}"),
    # The recipe's report is the mean of its sentences, which no order changes.
    "reports read whole": ("phantom_tiny", "model.text.chunks=full"),
    "reports read whole shuffled": ("phantom_tiny", "model.text.chunks=full", "data.shuffle_sentences=true"),
    "siglip": ("phantom_tiny", "objectives={clip: 0, siglip: 1}"),
    "convirt": ("phantom_tiny", "objectives={clip: 0, convirt: 1}", "model.projection=mlp"),
    "captioning beside": ("phantom_tiny", "objectives.captioning=0.3"),
    "masked words beside": ("phantom_tiny", "objectives.mlm=0.3"),
    "labels beside": ("phantom_tiny", "objectives.labels=1"),
    "labels of the prompts beside": ("phantom_tiny", "objectives.prompts=2"),
    "labels of the prompts first": ("phantom_tiny", "objectives.prompts=2", "objectives.labels_first=0.4"),
    "labels alone": ("phantom_tiny", "objectives.labels=1", "objectives.labels_first=0.999"),
    "text goes on learning": ("phantom_tiny", "training.text_warmup.lock=false", "training.text_learning_rate=1e-4"),
    "no text warm-up": ("phantom_tiny", "training.text_warmup.steps=0", "training.text_learning_rate=1e-3"),
    "not standardised": ("phantom_tiny", "model.standardise=false"),
    "no augmentation": ("phantom_tiny", "data.augment={}"),
    "turned and sized": ("phantom_tiny", "data.augment={shift_voxels: 2, scale: 0.03, rotate_degrees: 8, zoom: 0.08}"),
    "ctvit": ("phantom_tiny", f"model.volume={CTVIT}"),
    "resnet3d": ("phantom_tiny", "model.volume={kind: resnet3d, width_factor: 0.5, norm: batch}"),
    "rare ones oftener": ("phantom_tiny", "data.rarity=0.5"),
}
# And all of the demo's, some 4,100.
CURVE = (250, 500, 1000, 2000)


def run(name: str, changes: tuple[str, ...], seed: int, chosen: argparse.Namespace) -> dict[str, object]:
    """Train, detect and evaluate one variant; what it already did is not done again. Returns its figures."""
    folder = chosen.output / name.replace(" ", "_") / f"seed_{seed}"
    store, (config, *overrides) = str(chosen.store), changes
    if chosen.epochs is not None:
        overrides.append(f"training.epochs={chosen.epochs}")
    if not (folder / "evaluation" / "metrics.json").is_file():
        _ctclip("train", "--config", config, "--store", store, "--output", str(folder), "--processes",
                str(chosen.processes), f"seed={seed}", *overrides)  # fmt: skip
        found = str(folder / "predictions")
        _ctclip("zero-shot", "--model", str(folder / "model"), "--store", store, "--split", "valid", "--reports", "--output", found)  # fmt: skip
        _ctclip("evaluate", f"{found}/predictions.csv", "--store", store, "--protocol", "phantom", "--run", str(folder),
                "--output", str(folder / "evaluation"), "--bootstrap", "100")  # fmt: skip
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    retrieval, labels = metrics["retrieval"]["report_to_volume"], metrics["zero_shot"]["auroc"]
    return {
        "mean": metrics["zero_shot"]["mean_auroc"],
        "labels": {label: labels[label]["value"] for label in FINDINGS},
        "recall@10": retrieval.get("recall@10", float("nan")),
        "histogram": metrics["controls"].get("histogram_mean_auroc", float("nan")),
        "shuffled": metrics["controls"]["shuffled_mean_auroc"],
        "sees labels": "label-supervised" in (folder / "model" / "model_card.md").read_text(),
    }


def ceiling(folder: Path, store: Path) -> dict[str, float]:
    """AUROC a label of logistic regression on the embeddings of a label-supervised model: what its encoder can tell."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    tables = {}
    for split in ("train", "valid"):
        path = folder / f"{split}.parquet"
        if not path.is_file():
            _ctclip("embed", "--model", str(folder / "model"), "--store", str(store), "--split", split, "--output", str(path))  # fmt: skip
        tables[split] = pd.read_parquet(path).merge(pd.read_parquet(store / "cohort.parquet"), on="volume")
    vectors = {split: np.stack(found["volume_embedding"].to_list()) for split, found in tables.items()}
    scores = {}
    for label in FINDINGS:
        fit = LogisticRegression(C=1.0, max_iter=2000).fit(vectors["train"], tables["train"][label].astype(int))
        scores[label] = float(roc_auc_score(tables["valid"][label].astype(int), fit.decision_function(vectors["valid"])))  # fmt: skip
    return scores


def power_law(volumes: list[int], aurocs: list[float]) -> tuple[float, float]:
    """a and b of 1 - AUROC = a * volumes ** -b, by least squares of the logarithms (as Cherti et al. 2023 fit theirs)."""
    slope, start = np.polyfit(np.log(volumes), np.log(1 - np.array(aurocs)), 1)
    return float(np.exp(start)), float(-slope)


def draw(volumes: list[int], aurocs: list[float], law: tuple[float, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    a, b = law
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(volumes, 1 - np.array(aurocs), "o", label="measured")
    axes.loglog(volumes, a * np.array(volumes) ** -b, "-", color="grey", label=f"{a:.2f} x volumes$^{{-{b:.3f}}}$")
    axes.set(xlabel="training volumes", ylabel="1 - mean zero-shot AUROC", title="Reports alone, held-out patients")
    axes.set_xticks(volumes, [f"{n:,}" for n in volumes])
    errors = [round(1 - auroc, 2) for auroc in aurocs]
    axes.set_yticks(errors, [f"{error:.2f}" for error in errors])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"plotted: {path}\n", flush=True)


def _ctclip(*arguments: str) -> None:
    print("$ ctclip", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "ctclip", *arguments], check=True)


def _training_volumes(store: Path) -> int:
    return int((pd.read_parquet(store / "cohort.parquet")["split"] == "train").sum())


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--store", type=Path, required=True, help="of the demo")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of variants, separated by commas, `name:1` for one seed; all if not given")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=None, help="the configuration's own if not given")
    parser.add_argument("--processes", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--curve", action="store_true", help="learning curves over the number of volumes")
    chosen = parser.parse_args()
    asked = [part.strip().partition(":") for part in (chosen.only or ",".join(VARIANTS)).split(",") if part.strip()]
    unknown = [name for name, _, _ in asked if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}")
    found = {
        name: [run(name, VARIANTS[name], seed, chosen) for seed in range(int(seeds or chosen.seeds))]
        for name, _, seeds in asked
    }
    print(f"\n{machine()}; epochs {chosen.epochs or 'of the configuration'}, held-out patients; mean ± sd over seeds\n")
    rows = [
        [name, "labels" if runs[0]["sees labels"] else "reports only", str(len(runs)), _spread([r["mean"] for r in runs]),
         _spread([r["recall@10"] for r in runs]), _spread([r["histogram"] for r in runs]), _spread([r["shuffled"] for r in runs])]
        for name, runs in found.items()
    ]  # fmt: skip
    print(table("One switch a line", ["", "learned from", "seeds", "zero-shot mean AUROC", "report to volume, recall@10", "histogram control", "shuffled labels"], rows))  # fmt: skip
    tops = {}
    if "labels alone" in found:
        tops = ceiling(chosen.output / "labels_alone" / "seed_0", chosen.store)
    rows = [
        [label, *(_spread([r["labels"][label] for r in runs]) for runs in found.values()), *([f"{tops[label]:.3f}"] if tops else [])]
        for label in FINDINGS
    ]  # fmt: skip
    rows.append(["mean", *(_spread([r["mean"] for r in runs]) for runs in found.values()), *([f"{np.mean(list(tops.values())):.3f}"] if tops else [])])  # fmt: skip
    print(table("Label by label", ["", *found, *(["ceiling: the same encoder learned from labels"] if tops else [])], rows))  # fmt: skip
    if chosen.curve:
        curve = {n: run(f"volumes {n}", ("phantom_tiny", f"data.volumes={n}"), 0, chosen) for n in CURVE}
        curve[_training_volumes(chosen.store)] = run("phantom_tiny", VARIANTS["phantom_tiny"], 0, chosen)
        a, b = power_law(list(curve), [found["mean"] for found in curve.values()])
        rows = [
            [f"{n:,}", f"{found['mean']:.3f}", f"{1 - a * n**-b:.3f}", f"{found['recall@10']:.3f}"] for n, found in curve.items()
        ]  # fmt: skip
        draw(list(curve), [found["mean"] for found in curve.values()], (a, b), chosen.output / "curve.png")
        print(table(f"Learning curve, seed 0, as many passes: 1 - AUROC = {a:.2f} x volumes^-{b:.3f}", ["volumes", "AUROC", "fit", "recall@10"], rows))  # fmt: skip


if __name__ == "__main__":
    main()
