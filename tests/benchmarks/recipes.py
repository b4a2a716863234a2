"""The effect of each training option: ``python -m tests.benchmarks.recipes --store runs/demo/store --output
runs/recipes``.

Each line is a run of the demo's recipe with one change: `ctclip train`, `zero-shot` and `evaluate` on held-out
patients. If started again, it resumes. ``--curve`` trains on 250 to 4,000 volumes instead of changing options (the
store must hold 5,500 volumes: `ctclip phantom --volumes 5500 --rare-floor 0.15`). ``--jobs 8`` runs eight at a time, to
fill a GPU or a node. OUTPUT/figures.csv saves every figure as it is measured, with those of ``--recorded
tests/benchmarks/recipes.csv``; these runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.config_files import load_config
from ctclip.demo import default_processes
from ctclip.phantom.prevalence import FINDINGS
from ctclip.preprocessing.files import written_beside
from tests.benchmarks.common import machine, table

# As in phantom_published.
CTVIT = "{kind: ctvit, patch: [8, 16, 16], width: 192, spatial_depth: 2, temporal_depth: 2, heads: 6, codebook_size: 1024}"  # fmt: skip
CALCIUM = "model.volume.windows=[[-1000, 1000], [-1000, -500], [-160, 240], [130, 600]]"
# The recipe of version 1.0, which contrasted whole reports alone and had a window for bone; the changes of one option refer to it.
FIRST = (
    "phantom_tiny",
    "objectives={clip: {queue: 2048}}",
    "model.volume.windows=[[-1000, 1000], [-1000, -500], [-160, 240], [300, 1000]]",
)
# Name -> configuration and its changes.
VARIANTS: dict[str, tuple[str, ...]] = {
    "phantom_tiny": ("phantom_tiny",),
    "phantom_tiny 1.0": FIRST,
    "phantom_labels": ("phantom_labels",),
    "phantom_published": ("phantom_published",),
    "negatives of 8 alone": (*FIRST, "objectives.clip={negatives: 8}"),
    "texts of the batch alone": (*FIRST, "objectives.clip.queue=0"),
    "positives by position": (*FIRST, "objectives.clip.by_identity=false"),
    "stem not pooled": (*FIRST, "model.volume.pool_stem=false"),
    "no extremes": (*FIRST, "model.volume.extremes=false"),
    "calcium window": (*FIRST, CALCIUM),
    "calcium window and labels": (*FIRST, CALCIUM, "objectives.prompts=2"),
    "calcium window and labels that weigh more": (*FIRST, CALCIUM, "objectives.prompts=4"),
    "sections drawn": (*FIRST, "data.views={report: 1, findings: 1, impression: 1}"),
    "sentences drawn": (*FIRST, "data.views={report: 1, sentences: 1}"),
    # The recipe averages the sentences of a report, so their order does not matter.
    "reports read whole": (*FIRST, "model.text.chunks=full"),
    "reports read whole shuffled": (*FIRST, "model.text.chunks=full", "data.shuffle_sentences=true"),
    "siglip": (*FIRST, "objectives={siglip: 1}"),
    "convirt": (*FIRST, "objectives={convirt: 1}", "model.projection=mlp"),
    "captioning beside": (*FIRST, "objectives.captioning=0.3"),
    "masked words beside": (*FIRST, "objectives.mlm=0.3"),
    "labels beside": (*FIRST, "objectives.labels=1"),
    "labels of the prompts beside": (*FIRST, "objectives.prompts=2"),
    "labels of the prompts first": (*FIRST, "objectives.prompts=2", "objectives.clip.begin=0.4"),
    "labels alone": (*FIRST, "objectives.labels=1", "objectives.clip.begin=0.999"),
    "text goes on learning": (*FIRST, "training.text_warmup.lock=false", "training.text_learning_rate=1e-4"),
    "no text warm-up": (*FIRST, "training.text_warmup.steps=0", "training.text_learning_rate=1e-3"),
    "not standardised": (*FIRST, "model.standardise=false"),
    "no augmentation": (*FIRST, "data.augment={}"),
    "turned and sized": (*FIRST, "data.augment={shift_voxels: 2, scale: 0.03, rotate_degrees: 8, zoom: 0.08}"),
    "window moved and cropped": (
        *FIRST,
        "data.augment={shift_voxels: 2, scale: 0.03, window_hu: 50, crop: 0.15}",
    ),
    "ctvit": (*FIRST, f"model.volume={CTVIT}"),
    "resnet3d": (*FIRST, "model.volume={kind: resnet3d, width_factor: 0.5, norm: batch}"),
    "rare ones oftener": (*FIRST, "data.rarity=0.5"),
}
CURVE = (250, 500, 1000, 2000, 4000)
HISTOGRAM = "histogram control"


Task = tuple[str, tuple[str, ...], int]  # a variant's name, what it changes, the seed
Figures = dict[str, object]


def run_all(tasks: Sequence[Task], chosen: argparse.Namespace) -> dict[tuple[str, int], Figures]:
    """Figures by variant and seed, ``chosen.jobs`` runs at a time. If a run fails, the others finish before this
    exits."""
    found: dict[tuple[str, int], Figures] = {}
    failed = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        waiting = {pool.submit(run, *task, chosen): (task[0], task[2]) for task in dict.fromkeys(tasks)}
        for done in as_completed(waiting):
            try:
                found[waiting[done]] = done.result()
            except subprocess.CalledProcessError as error:
                failed.append(f"{waiting[done]}: {error}")
                print("failed:", failed[-1], file=sys.stderr, flush=True)
            keep([*found.values()], chosen)
    if failed:
        sys.exit(f"{len(failed)} of {len(waiting)} runs failed; the same command runs them again")
    return found


def run(name: str, changes: tuple[str, ...], seed: int, chosen: argparse.Namespace) -> Figures:
    """Train, detect and evaluate one variant and return its figures; finished stages are not repeated."""
    config, *overrides = changes
    if chosen.epochs is not None:
        overrides.append(f"training.epochs={chosen.epochs:g}")
    epochs = load_config(config, overrides).training.epochs
    if known := _recorded(chosen.recorded, name, seed, epochs):
        return known
    folder, store = _folder(chosen.output, name, seed, epochs), str(chosen.store)
    log = folder / "log.txt" if chosen.jobs > 1 else None
    if not (folder / "evaluation" / "metrics.json").is_file():
        _ctclip("train", "--config", config, "--store", store, "--output", str(folder), "--processes",
                str(chosen.processes), f"seed={seed}", *overrides, log=log)  # fmt: skip
        found = str(folder / "predictions")
        _ctclip("zero-shot", "--model", str(folder / "model"), "--store", store, "--split", "valid", "--embed-reports", "--output", found, log=log)  # fmt: skip
        # Without the store: the histogram control is the same for all, and is fitted once.
        _ctclip("evaluate", f"{found}/predictions.csv", "--labels", f"{store}/cohort.parquet", "--protocol", "phantom", "--run", str(folder),
                "--output", str(folder / "evaluation"), "--bootstrap", "100", log=log)  # fmt: skip
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    labels = metrics["zero_shot"]["auroc"]
    return {
        "variant": name, "seed": seed, "epochs": epochs,
        "learned from": "labels" if "label-supervised" in (folder / "model" / "model_card.md").read_text() else "reports only",
        "AUROC": metrics["zero_shot"]["mean_auroc"],
        "recall@10": metrics["retrieval"]["report_to_volume"].get("recall@10", float("nan")),
        "shuffled": metrics["controls"]["shuffled_mean_auroc"],
        **{label: labels[label]["value"] for label in FINDINGS},
    }  # fmt: skip


def histogram(chosen: argparse.Namespace) -> Figures:
    """The histogram control: AUROC of each label by a supervised classifier of HU histograms."""
    from ctclip.data.dataset import stored_volumes
    from ctclip.evaluation.protocol import load_protocol
    from ctclip.evaluation.run_evaluation import histogram_control
    from ctclip.preprocessing.store import VolumeStore

    if known := _recorded(chosen.recorded, HISTOGRAM, 0, 0):
        return known
    store = VolumeStore(chosen.store)
    found = histogram_control(store, stored_volumes(store, "valid"), load_protocol("phantom"))
    return {
        "variant": HISTOGRAM, "seed": 0, "epochs": 0, "learned from": "labels",
        "AUROC": found["histogram_mean_auroc"], **found["histogram_auroc"],
    }  # fmt: skip


def ceiling(learned: list[Figures], chosen: argparse.Namespace) -> list[Figures]:
    """AUROC of each label by logistic regression on the embeddings of label-supervised runs: a ceiling for their
    encoders. Only for runs with a model at hand, or with a recorded ceiling."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    found: list[Figures] = []
    for row in learned:
        name, seed, epochs = f"ceiling of {row['variant']}", row["seed"], row["epochs"]
        folder = _folder(chosen.output, row["variant"], seed, epochs)
        if known := _recorded(chosen.recorded, name, seed, epochs):
            found.append(known)
            continue
        if not (folder / "model").is_dir():
            continue
        tables = {}
        for split in ("train", "valid"):
            path = folder / f"{split}.parquet"
            if not path.is_file():
                _ctclip("embed", "--model", str(folder / "model"), "--store", str(chosen.store), "--split", split, "--output", str(path))  # fmt: skip
            tables[split] = pd.read_parquet(path).merge(pd.read_parquet(chosen.store / "cohort.parquet"), on="volume")
        vectors = {split: np.stack(table["volume_embedding"].to_list()) for split, table in tables.items()}
        aurocs = {}
        for label in FINDINGS:
            fit = LogisticRegression(C=1.0, max_iter=2000).fit(vectors["train"], tables["train"][label].astype(int))
            aurocs[label] = float(roc_auc_score(tables["valid"][label].astype(int), fit.decision_function(vectors["valid"])))  # fmt: skip
        mean = float(np.mean(list(aurocs.values())))
        found.append({"variant": name, "seed": seed, "epochs": epochs, "learned from": "labels", "AUROC": mean, **aurocs})  # fmt: skip
    return found


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


def _recorded(table: pd.DataFrame, name: object, seed: object, epochs: object) -> Figures | None:
    rows = table[(table["variant"] == name) & (table["seed"] == seed) & (table["epochs"] == epochs)]
    return dict(rows.iloc[0]) if len(rows) else None


def keep(rows: Sequence[Figures], chosen: argparse.Namespace) -> None:
    """Write ``rows`` and earlier figures to OUTPUT/figures.csv."""
    figures = pd.concat([chosen.recorded, pd.DataFrame(list(rows))]).drop_duplicates(["variant", "seed", "epochs"])
    with written_beside(chosen.output / "figures.csv") as partial:
        figures.to_csv(partial, index=False, float_format="%.6g")


def _folder(output: Path, name: object, seed: object, epochs: object) -> Path:
    return output / str(name).replace(" ", "_") / f"epochs_{epochs:g}_seed_{seed}"


def _ctclip(*arguments: str, log: Path | None = None) -> None:
    """Run a ctclip command, with its output in ``log`` if given. Raises CalledProcessError."""
    print("$ ctclip", *arguments, flush=True)
    command = [sys.executable, "-m", "ctclip", *arguments]
    if log is None:
        subprocess.run(command, check=True)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        subprocess.run(command, check=True, stdout=stream, stderr=stream)


def _training_volumes(store: Path) -> int:
    return int((pd.read_parquet(store / "cohort.parquet")["split"] == "train").sum())


def _spread(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def _furthest(changes: pd.Series) -> list[str]:
    """The two labels with the largest gain and the two with the largest loss, if the mean changed by 0.01 or more."""
    ordered = changes.dropna().sort_values()
    ends = [ordered[ordered >= 0.01].iloc[::-1][:2], ordered[ordered <= -0.01][:2]]
    return [", ".join(f"{label} {change:+.2f}" for label, change in end.items()) for end in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--store", type=Path, required=True, help="of the demo")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default=None, help="names of variants, separated by commas, with `name:1` for one seed; default: all")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=None, help="default: that of the configuration")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--processes", type=int, default=None, help="of each run; all GPUs (without any, two) if it runs alone")  # fmt: skip
    parser.add_argument("--curve", action="store_true", help="measure a learning curve, and only the variants of --only")  # fmt: skip
    parser.add_argument("--recorded", type=Path, default=None, help="a figures.csv of earlier runs, which are not repeated")  # fmt: skip
    chosen = parser.parse_args()
    if chosen.only is None:
        chosen.only = "" if chosen.curve else ",".join(VARIANTS)
    asked = [part.strip().partition(":") for part in chosen.only.split(",") if part.strip()]
    unknown = [name for name, _, _ in asked if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}")
    chosen.recorded = pd.read_csv(chosen.recorded) if chosen.recorded else pd.DataFrame(columns=["variant", "seed", "epochs"])  # fmt: skip
    chosen.processes = chosen.processes or (default_processes() if chosen.jobs == 1 else 1)
    if chosen.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // chosen.jobs)))
    tasks: list[Task] = [(name, VARIANTS[name], seed) for name, _, seeds in asked for seed in range(int(seeds or chosen.seeds))]  # fmt: skip
    sizes = curve_sizes(_training_volumes(chosen.store)) if chosen.curve else []
    points: list[Task] = [(f"volumes {n}", (*FIRST, f"data.volumes={n}"), 0) for n in sizes]
    every = run_all([*tasks, *points], chosen)
    runs = [every[name, seed] for name, _, seed in tasks]
    # One is enough: of the first variant that learned from labels.
    learned = [row for row in runs if row["learned from"] == "labels"]
    beside = [histogram(chosen), *ceiling(learned[:1], chosen)] if runs else []
    keep([*every.values(), *beside], chosen)
    print(f"\n{machine()}; epochs {chosen.epochs or 'of the configuration'}, held-out patients; mean ± sd over seeds\n")
    if runs:
        found = dict(list(pd.DataFrame(runs).groupby("variant", sort=False)))
        show_variants(found)
        show_labels(found, beside)
    if sizes:
        show_curve(sizes, [every[name, seed] for name, _, seed in points], chosen.output)


def curve_sizes(training: int) -> list[int]:
    """The values of CURVE that the number of training volumes allows; if not all, the last is that number."""
    return sorted({min(size, training) for size in CURVE})


def show_variants(found: dict[str, pd.DataFrame]) -> None:
    """One line per variant, with the labels that gained and lost compared with the first variant."""
    first = next(iter(found.values()))[list(FINDINGS)].mean()
    rows = [
        [name, runs["learned from"].iloc[0], str(len(runs)), *(_spread(runs[column]) for column in ("AUROC", "recall@10", "shuffled")),
         *_furthest(runs[list(FINDINGS)].mean() - first)]
        for name, runs in found.items()
    ]  # fmt: skip
    print(table("One switch a line", ["", "learned from", "seeds", "zero-shot mean AUROC", "report to volume, recall@10",
                "shuffled labels", "labels that gained most", "that lost most"], rows))  # fmt: skip


def show_labels(found: dict[str, pd.DataFrame], beside: list[Figures]) -> None:
    """One line per label, with the histogram control and, if known, the ceiling."""
    columns = {**found, **{str(row["variant"]): pd.DataFrame([row]) for row in beside}}
    lines = {**{label: label for label in FINDINGS}, "mean": "AUROC", "report to volume, recall@10": "recall@10"}
    rows = [[name, *(_spread(runs[key]) if key in runs else "" for runs in columns.values())] for name, key in lines.items()]  # fmt: skip
    print(table("Label by label", ["", *columns], rows))


def show_curve(volumes: list[int], runs: list[Figures], output: Path) -> None:
    """The learning curve, a power law fitted to it, and a plot."""
    aurocs = [float(str(row["AUROC"])) for row in runs]
    a, b = power_law(volumes, aurocs)
    draw(volumes, aurocs, (a, b), output / "curve.png")
    rows = [
        [f"{n:,}", f"{auroc:.3f}", f"{1 - a * n**-b:.3f}", f"{row['recall@10']:.3f}"]
        for n, auroc, row in zip(volumes, aurocs, runs, strict=True)
    ]
    print(table(f"Learning curve, seed 0, as many passes: 1 - AUROC = {a:.2f} x volumes^-{b:.3f}", ["volumes", "AUROC", "fit", "recall@10"], rows))  # fmt: skip


if __name__ == "__main__":
    main()
