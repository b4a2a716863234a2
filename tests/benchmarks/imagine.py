"""From texts to volumes: ``python -m tests.benchmarks.imagine --only prior --model MODEL --store STORE --work FOLDER``.

``prior``: report-to-volume recall with and without each kind of prior, and the modality gap before and after, on held-out
patients. ``--work`` gets a copy of the model with the priors, and the embeddings; a prior that is there is used again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctclip.adaptation.examples import cached_embeddings
from ctclip.adaptation.prior import PriorConfig, run_prior
from ctclip.audit.geometry import modality_gap
from ctclip.config_files import find_config, load_section
from ctclip.data.dataset import with_report
from ctclip.evaluation.retrieval import retrieval
from ctclip.heads.prior import PriorHead
from ctclip.inference.model import usable_head
from ctclip.inference.run import report_embeddings, report_texts
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import load_model
from ctclip.preprocessing.store import VolumeStore
from tests.benchmarks.common import machine, table

KINDS = ("ridge", "mlp", "diffusion")
DEPTHS = ("recall@1", "recall@5", "recall@10", "median_rank")


def priors(model: Path, store: Path, work: Path, split: str) -> dict[str, Any]:
    """Figures of the text's own embedding and of every kind of prior."""
    copy = work / "model"
    if not copy.is_dir():
        shutil.copytree(model, copy)
    loaded = load_model(copy)
    for kind in KINDS:
        if not (copy / "heads" / f"prior-{kind}").is_dir():
            config = load_section(PriorConfig, find_config("prior", "adapt"), [f"kind={kind}"])
            # One folder, so that the embeddings are computed once.
            run_prior(loaded, store, work / "priors", config, head=f"prior-{kind}", force=True)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, copy)
    scans.table = with_report(scans.table, loaded.trained_on.sections, f"{store}: split {split!r}")
    vectors = cached_embeddings(loaded, scans, work / "embeddings", 8)
    rows = scans.table[scans.table["volume"].isin(vectors)]
    volumes = np.stack([vectors[name] for name in rows["volume"]])
    with torch.inference_mode():
        reports = report_embeddings(loaded.model, report_texts(rows, loaded.trained_on.sections))
    identity = rows["scan"].astype(str).to_numpy()
    first = np.sort(np.unique(identity, return_index=True)[1])
    queries = {
        "none: the text itself": reports[first],
        "its mean moved to the volumes'": centred(reports[first], work, loaded),
    }
    for kind in KINDS:
        head = usable_head(loaded, f"prior-{kind}")
        assert isinstance(head, PriorHead)
        texts = torch.from_numpy(reports[first])
        queries[kind] = head.prior.expected(texts).numpy()
        if kind == "diffusion":
            queries["diffusion, one sample"] = head.prior.sample(texts)[:, 0].numpy()
            queries["diffusion, best of two"] = head.prior.best(texts).numpy()
    return {
        name: {
            **retrieval(vector, volumes, identity[first], identity),
            "modality_gap": modality_gap(volumes, vector),
            "cosine": float(np.mean(np.sum(vector * volumes[first], axis=1))),
        }
        for name, vector in queries.items()
    }


def centred(reports: np.ndarray, work: Path, loaded: Any) -> np.ndarray:
    """The control of Liang et al. 2022: every report moved by the gap of the training pairs, as the prior saw them."""
    head = usable_head(loaded, "prior-ridge")
    assert isinstance(head, PriorHead)
    moved = reports - reports.mean(axis=0) + head.prior.mean.numpy()
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True))


def show_priors(result: dict[str, Any]) -> str:
    """The figures as one table."""
    rows = [
        [name, *(f"{one[depth]:.3f}" if "recall" in depth else f"{one[depth]:.0f}" for depth in DEPTHS), f"{one['cosine']:.3f}", f"{one['modality_gap']:.3f}"]
        for name, one in result.items()
    ]  # fmt: skip
    one = next(iter(result.values()))
    title = f"{one['queries']} reports of held-out patients, {one['pool']} volumes; chance of recall@10 {one['chance_recall@10']:.3f}"
    return table(title, ["prior", *DEPTHS, "cosine with own volume", "modality gap"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "store", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", choices=("prior",), default="prior")
    parser.add_argument("--split", default="valid")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    print(machine())
    result = priors(given.model, given.store, given.work, given.split)
    print(show_priors(result))
    (given.work / "priors.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
