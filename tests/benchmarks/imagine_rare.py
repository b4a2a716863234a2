"""Whether synthetic positives help where a finding is rare.

``python -m tests.benchmarks.imagine --only rare`` prints it: a linear probe on the frozen encoder is fitted to volumes among
which ``POSITIVES`` show a finding, without and with synthetic volumes of it, and tested on held-out volumes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import ctclip
from ctclip.adaptation.probe import fit_probe
from ctclip.evaluation.metrics import auroc
from ctclip.evaluation.tables import read_embeddings
from ctclip.imagining.imagine import decoder_of
from ctclip.inference.run import VOLUME
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from tests.benchmarks.common import table

# Shares of the training volumes that are synthetic; number of real ones, and of positives among them; repetitions.
SHARES, REAL, POSITIVES, SEEDS = (0.0, 0.1, 0.3), 300, 5, 3


def rare_figures(given: argparse.Namespace, findings: list[str]) -> dict[str, dict[str, list[float]]]:
    """By finding and share, the AUROC of each seed; and as ``real instead``, that with as many real positives as there
    are synthetic ones with the largest share."""
    loaded, store = ctclip.load(given.decoder), VolumeStore(given.demo / "store")
    rows = store.cohort[store.cohort["split"] == given.trained_on].drop_duplicates("scan").reset_index(drop=True)
    arrays = read_embeddings(given.demo / "predictions" / "embeddings.parquet")
    held = store.cohort.set_index("volume", drop=False).loc[arrays["volume"]]
    known: dict[str, np.ndarray] = {}

    def vectors(names: list[str]) -> np.ndarray:
        for name in names:
            if name not in known:
                known[name] = embedded(loaded, loaded.spec.normalise(store.read(name).astype(np.float32)))
        return np.stack([known[name] for name in names])

    largest = round(REAL * SHARES[-1] / (1 - SHARES[-1]))
    result: dict[str, dict[str, list[float]]] = {}
    for finding in findings:
        made = synthetic(given, loaded, finding, largest)
        truth = rows[finding].to_numpy(float)
        areas: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            random = np.random.default_rng([seed, 71])
            positive, negative = (random.permutation(np.flatnonzero(truth == value)) for value in (1, 0))
            chosen = [*positive[:POSITIVES], *negative[: REAL - POSITIVES]]
            real, patients = vectors(rows["volume"].iloc[chosen].astype(str).tolist()), rows["patient"].iloc[chosen]
            more = vectors(rows["volume"].iloc[positive[POSITIVES : POSITIVES + largest]].astype(str).tolist())
            arms = {f"{share:.0%}": made[random.permutation(largest)][: round(REAL * share / (1 - share))] for share in SHARES}  # fmt: skip
            for arm, added in (arms | {"real instead": more}).items():
                labels = np.concatenate([truth[chosen], np.ones(len(added))])[:, None]
                owners = np.array([*patients.astype(str), *(f"synthetic {place}" for place in range(len(added)))])
                probe = fit_probe(np.concatenate([real, added]), labels, owners, seed=seed)
                scores = arrays[VOLUME] @ probe.weight[0] + probe.bias[0]
                areas.setdefault(arm, []).append(auroc(held[finding].to_numpy(), scores))
        result[finding] = areas
        print(finding, areas, flush=True)
    return result


@torch.inference_mode()
def embedded(loaded: ctclip.Model, voxels: np.ndarray) -> np.ndarray:
    """The unit vector of a volume (D, H, W) in [-1, 1]."""
    vector: np.ndarray = loaded.dual.encode_volume(torch.from_numpy(np.array(voxels, np.float32))[None, None])[
        0
    ].numpy()
    return vector


@torch.inference_mode()
def synthetic(given: argparse.Namespace, loaded: ctclip.Model, finding: str, count: int) -> np.ndarray:
    """Embeddings (count, dim) of volumes generated for the positive prompts of a finding in turn."""
    path = given.work / f"rare {finding}.npy".replace(" ", "_")
    if not path.is_file():
        head, texts = (
            decoder_of(loaded.folder),
            load_prompts(loaded.folder.labels.prompts or "generic").side(finding, True),
        )
        made = [
            embedded(loaded, head.generate(texts[number % len(texts)], 5000 + number, guidance=given.guidance).numpy())
            for number in range(count)
        ]
        np.save(path, np.stack(made))
    saved: np.ndarray = np.load(path)
    return saved


def show_rare(result: dict[str, Any]) -> str:
    """The figures as a table: mean and range over seeds."""
    arms = list(next(iter(result.values())))
    rows = [
        [finding, *(f"{np.mean(areas[arm]):.3f} ({min(areas[arm]):.3f} to {max(areas[arm]):.3f})" for arm in arms)]
        for finding, areas in result.items()
    ]
    rows.append(["**mean**", *(f"{np.mean([np.mean(areas[arm]) for areas in result.values()]):.3f}" for arm in arms)])
    title = f"AUROC of a probe on {REAL} real volumes, {POSITIVES} of them positive, and synthetic positives"
    return table(title, ["finding", *(arm if arm == "real instead" else f"{arm} synthetic" for arm in arms)], rows)
