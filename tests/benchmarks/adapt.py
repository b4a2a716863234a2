"""The value of labels, by method: ``python -m tests.benchmarks.adapt --demo runs/demo --output runs/adapt``.

All methods start from the demo's model and are tested on its held-out patients (split valid), with three draws of
patients each. If started again, it resumes: figures in OUTPUT/figures.json are not measured again. ``--methods``
chooses methods (probe and coop take minutes, the others train); ``--draws`` and ``--settings`` shorten it. Retrieval is
measured on the same embeddings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctclip.adaptation.coop import CoopConfig
from ctclip.adaptation.examples import Examples, Labelled, Splits, embedded, read_labelled
from ctclip.adaptation.fitting import CACHE, learned_prompts, score_vectors, towards_prompts
from ctclip.adaptation.probe import fit_probe
from ctclip.adaptation.protocol import Setting, aurocs, t_interval
from ctclip.adaptation.shrinkage import fit_towards
from ctclip.adaptation.zero_shot import zero_shot_scores
from ctclip.config_files import find_config, load_section
from ctclip.evaluation.metrics import mean_defined
from ctclip.evaluation.retrieval import composed_retrieval, precision_by_labels
from ctclip.evaluation.tables import read_embeddings, read_predictions
from ctclip.heads.folder import PROMPTS
from ctclip.heads.prompts import PromptHead
from ctclip.inference.model import usable_head
from ctclip.inference.run import VOLUME
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import ModelFolder, load_model
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.store import VolumeStore
from tests.benchmarks.common import machine, table

SETTINGS = {
    "1": Setting("shots", 1.0), "4": Setting("shots", 4.0), "16": Setting("shots", 16.0),
    "1%": Setting("fraction", 1.0), "10%": Setting("fraction", 10.0), "100%": Setting("fraction", 100.0),
}  # fmt: skip
FITTED = ("probe", "probe-toward-prompts", "coop")
TRAINED = ("vocabfine", "lora", "last-layers", "classfine", "full")
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--demo", type=Path, required=True, help="a finished `ctclip demo`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default=",".join((*FITTED, *TRAINED)))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--train-split", default="train", help="calibration: the split that the demo has already embedded"
    )
    chosen = parser.parse_args()
    model = chosen.output / "model"
    if not model.is_dir():
        shutil.copytree(chosen.demo / "train" / "model", model)
    loaded, book = load_model(model), Book(chosen.output / "figures.json")
    train, test = load(loaded, chosen.demo, chosen.train_split, chosen.output / CACHE)
    scores = zero_shot_scores(loaded, test)
    assert scores is not None
    book.once("zero-shot", lambda: figures_of(aurocs(test, scores), test.names, 0.0))
    book.once("retrieval", lambda: retrieval(loaded, test))
    for method in chosen.methods.split(","):
        for name in chosen.settings.split(","):
            for draw in range(chosen.draws if name != "100%" else 1):
                run = (loaded, (train, test), chosen.demo, chosen.output, method, SETTINGS[name], draw)
                if method != "full" or name == "100%":
                    book.once(f"{method} | {name} | {draw}", lambda run=run: measure(*run))  # type: ignore[misc]
    print(
        f"{machine()}\n\n{by_method(book.figures, chosen)}\n\n{by_label(book.figures, chosen)}\n\n{of_retrieval(book.figures['retrieval'])}"
    )


def load(
    loaded: ModelFolder, demo: Path, split: str, cache: Path, *, held_out_only: bool = False
) -> tuple[Examples, Examples]:
    """Training and held-out volumes with embeddings (the held-out ones twice, if only these are needed)."""
    opened = VolumeStore(demo / "store")
    parts = read_labelled(opened, Splits(split, "valid"), None, loaded.labels.names)
    chosen = parts[1:] * 2 if held_out_only else parts
    train, test = (of_demo(loaded, demo, part) or embedded(loaded, opened, part, cache)[0] for part in chosen)
    return train, test


def of_demo(loaded: ModelFolder, demo: Path, volumes: Labelled) -> Examples | None:
    """The embeddings saved by the demo, if they are of this model and these volumes."""
    for folder in (demo / "predictions", demo / "calibration"):
        if not (folder / "embeddings.parquet").is_file():
            continue
        arrays = read_embeddings(folder / "embeddings.parquet")
        row = {name: index for index, name in enumerate(arrays["volume"].tolist())}
        model = read_predictions(folder / "predictions.csv")[0]["model"].iloc[0]
        if model == loaded.hash and set(volumes.table["volume"]) <= set(row):
            vectors = arrays[VOLUME][[row[name] for name in volumes.table["volume"]]]
            return Examples(volumes.table, volumes.labels, volumes.names, vectors)
    return None


class Book:
    """Figures, saved as they are measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: Figures = json.loads(path.read_text()) if path.is_file() else {}

    def once(self, name: str, measured: Any) -> None:
        if name not in self.figures:
            self.figures[name] = measured()
            write_text(self.path, json.dumps(self.figures, indent=1))
            print(name, {k: v for k, v in self.figures[name].items() if k != "labels"}, flush=True)


def figures_of(values: list[float], names: tuple[str, ...], seconds: float) -> Figures:
    return {
        "auroc": mean_defined(values),
        "seconds": round(seconds, 1),
        "labels": dict(zip(names, values, strict=True)),
    }


def measure(
    loaded: ModelFolder,
    examples: tuple[Examples, Examples],
    demo: Path,
    output: Path,
    method: str,
    setting: Setting,
    draw: int,
) -> Figures:
    """Fit or train one method on one draw and test it; seconds are processor time for methods fitted in this process."""
    train, test = examples
    if method in FITTED:
        began, seen = time.process_time(), setting.draw(train, draw)
        scores = fitted(loaded, train, seen, test, method, draw)
        return figures_of(aurocs(test, scores), test.names, time.process_time() - began)
    folder, began = output / method / f"{setting.kind}_{setting.amount:g}_{draw}", time.monotonic()
    amount = ["--shots", f"{setting.amount:g}"] if setting.kind == "shots" else ["--percent", f"{setting.amount:g}"]
    amount = [] if setting == SETTINGS["100%"] else amount
    ctclip(
        "adapt",
        "--method",
        method,
        "--model",
        output / "model",
        "--store",
        demo / "store",
        "--output",
        folder,
        "--seed",
        draw,
        *amount,
    )
    seconds = time.monotonic() - began
    adapted = load_model(folder / "model")
    if method == "classfine":
        # Its linear layer is not saved; a probe of the same draw reads the adapted embeddings.
        train, test = load(adapted, demo, "train", output / CACHE)
        probe = fit_probe(train.vectors, setting.draw(train, draw), train.patients, seed=draw)
        return figures_of(aurocs(test, probe.scores(test.vectors)), test.names, seconds)
    _, test = load(adapted, demo, "train", output / CACHE, held_out_only=True)
    scores = zero_shot_scores(adapted, test)
    assert scores is not None
    return figures_of(aurocs(test, scores), test.names, seconds) | parameters(folder / "model", loaded.model)


def fitted(
    loaded: ModelFolder, train: Examples, seen: np.ndarray, test: Examples, method: str, draw: int
) -> np.ndarray:
    """Scores (n, L) of a method that is fitted to frozen embeddings, as `ctclip probe` and `ctclip adapt` fit it."""
    if method == "coop":
        config = load_section(CoopConfig, find_config("coop", "adapt"))
        return score_vectors(learned_prompts(loaded, train, seen, config, draw), test.vectors)
    if method == "probe":
        return fit_probe(train.vectors, seen, train.patients, seed=draw).scores(test.vectors)
    towards = towards_prompts(loaded, train.names)
    return fit_towards(train.vectors, seen, train.patients, towards, seed=draw).scores(test.vectors)


def parameters(folder: Path, before: DualEncoder) -> Figures:
    """The share of a model's parameters that were trained: low-rank adapters, and whatever differs from the model before."""
    model, old = load_model(folder).model, dict(before.named_parameters())
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    trained = {
        name for name, value in model.named_parameters()
        if "lora_" in name or not torch.equal(value, old[name.replace(".base_layer", "")])
    }  # fmt: skip
    return {"trained": sum(sizes[name] for name in trained) / sum(sizes.values())}


def ctclip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "ctclip", *map(str, arguments)], check=True)


def retrieval(loaded: ModelFolder, test: Any) -> Figures:
    """Image retrieval by shared labels, and retrieval with one finding added, on held-out scans."""
    scans = test.table["scan"].to_numpy(dtype=str)
    alike = precision_by_labels(test.vectors, test.vectors, test.labels, test.labels, scans, scans)
    head = usable_head(loaded, PROMPTS)
    assert isinstance(head, PromptHead)
    order = [head.names.index(name) for name in test.names]
    directions = torch.nn.functional.normalize(head.positive - head.negative, dim=-1)[order].float().cpu().numpy()
    weights = {
        f"{w:g}": composed_retrieval(test.vectors, scans, test.labels, directions, weight=w) for w in (0.25, 0.5, 1.0)
    }
    return {"alike": {k: v for k, v in alike.items() if k != "relevant"}, "composed": weights}


def by_method(figures: Figures, chosen: argparse.Namespace) -> str:
    """Mean AUROC of each method and setting with its interval over draws."""
    rows = [["prompts, no label", *[f"{figures['zero-shot']['auroc']:.3f}"] * len(chosen.settings.split(","))]]
    for method in chosen.methods.split(","):
        cells = []
        for name in chosen.settings.split(","):
            values = np.array([v["auroc"] for k, v in figures.items() if k.startswith(f"{method} | {name} |")])
            low, high = t_interval(values)
            cells.append(
                ""
                if not len(values)
                else f"{values.mean():.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")
            )
        rows.append([method, *cells])
    return table("labels seen", ["", *chosen.settings.split(",")], rows)


def by_label(figures: Figures, chosen: argparse.Namespace) -> str:
    """AUROC of each label with all training labels, and of the probe with 1 %."""
    columns = [
        name
        for name in ("probe | 1% |", *(f"{m} | 100% |" for m in chosen.methods.split(",")))
        if any(k.startswith(name) for k in figures)
    ]
    rows = []
    for label, value in figures["zero-shot"]["labels"].items():
        means = [np.mean([v["labels"][label] for k, v in figures.items() if k.startswith(name)]) for name in columns]
        rows.append([label, f"{value:.3f}", *(f"{mean:.3f}" for mean in means)])
    return table("AUROC by label", ["", "zero-shot", *(name.rstrip(" |") for name in columns)], rows)


def of_retrieval(figures: Figures) -> str:
    alike, rows = figures["alike"], []
    for k in (5, 10, 50):
        rows.append(
            [
                f"precision@{k} by shared labels",
                f"{alike[f'precision@{k}']:.3f}",
                f"{alike['chance_precision']:.3f} (random)",
            ]
        )
    for weight, found in figures["composed"].items():
        for name in ("found@10", "precision@10"):
            rows.append(
                [
                    f"with one finding more, weight {weight}: {name}",
                    f"{found[name]:.3f}",
                    f"{found['by_itself'][name]:.3f} (scan by itself)",
                ]
            )
    return table("retrieval", ["", "value", "compared with"], rows)


if __name__ == "__main__":
    main()
