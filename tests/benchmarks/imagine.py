"""From texts to volumes, and counterfactuals: ``python -m tests.benchmarks.imagine --demo runs/demo --work FOLDER``.

``prior``: report-to-volume recall with and without each kind of prior, and the modality gap before and after, on held-out
patients. ``--work`` gets a copy of the model with the priors, and the embeddings; a prior that is there is used again.

``counterfactual``: for each finding with a zero-shot AUROC above 0.9, scans in which it is drawn: how often the score turns,
how often the peak of the edit lies in the drawn finding and on its side of the body, beside other methods.

``decoder``: volumes drawn by the decoder in the model ``--decoder`` for every such finding, and for none: whether detectors tell
them apart, the side asked for, ranges of the cohort, and copies of training volumes.

``rare``: a probe on few volumes with a finding, without and with synthetic ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import ctclip
from ctclip.adaptation.prior import PriorConfig, fit_prior, run_prior, text_pairs
from ctclip.audit.geometry import modality_gap
from ctclip.config_files import find_config, load_section
from ctclip.evaluation.retrieval import retrieval
from ctclip.evaluation.tables import read_embeddings
from ctclip.explanation.explain import Explanation, explain
from ctclip.explanation.masks import Masks, load_layout
from ctclip.explanation.place import side_of
from ctclip.heads.decode import GUIDANCE
from ctclip.heads.prior import Prior, PriorHead
from ctclip.inference.model import usable_head
from ctclip.inference.run import REPORT, VOLUME
from ctclip.models.folder import load_model
from ctclip.preprocessing import prepare
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.store import VolumeStore
from tests.benchmarks.common import machine, table
from tests.benchmarks.imagine_decoder import decoder_figures, show_decoder
from tests.benchmarks.imagine_rare import rare_figures, show_rare

GOOD = 0.9
KINDS = ("ridge", "mlp", "diffusion")
DEPTHS = ("recall@1", "recall@5", "recall@10", "median_rank")


def priors(model: Path, store: Path, predictions: Path, work: Path, halves: bool) -> dict[str, Any]:
    """Figures of the text's own embedding and of every kind of prior; predictions: the output of `ctclip zero-shot
    --embed-reports` on held-out volumes. halves: priors learn from one half of these volumes' patients, and are tested on
    the other."""
    arrays = read_embeddings(predictions / "embeddings.parquet")
    kept = np.isfinite(arrays[REPORT]).all(axis=1)
    names, volumes, reports = (arrays[name][kept] for name in ("volume", VOLUME, REPORT))
    rows = VolumeStore(store).cohort.set_index("volume", drop=False).loc[names]
    tested = np.ones(len(rows), bool)
    if halves:
        patients = np.random.default_rng(0).permutation(rows["patient"].unique())
        tested = rows["patient"].isin(patients[: len(patients) // 2]).to_numpy()
        fitted = fitted_on_half(model, rows[~tested], dict(zip(names, volumes, strict=True)))
    else:
        fitted = fitted_on_training(model, store, work)
    volumes, reports, identity = volumes[tested], reports[tested], rows.loc[tested, "scan"].astype(str).to_numpy()
    first = np.sort(np.unique(identity, return_index=True)[1])
    texts = torch.from_numpy(reports[first])
    queries = {
        "none: the text itself": reports[first],
        "none, gap closed by the means": centred(reports[first], fitted["ridge"]),
    }
    for kind, prior in fitted.items():
        queries[kind] = prior.expected(texts).numpy()
    queries["diffusion, one sample"] = fitted["diffusion"].sample(texts)[:, 0].numpy()
    queries["diffusion, best of two"] = fitted["diffusion"].best(texts).numpy()
    return {
        name: {
            **retrieval(vector, volumes, identity[first], identity),
            "modality_gap": modality_gap(volumes, vector),
            "cosine": float(np.mean(np.sum(vector * volumes[first], axis=1))),
        }
        for name, vector in queries.items()
    }


def fitted_on_half(model: Path, rows: pd.DataFrame, vectors: dict[str, np.ndarray]) -> dict[str, Prior]:
    """Fit every kind of prior to the volumes of ``rows``."""
    loaded, fitted = load_model(model), {}
    for kind in KINDS:
        config = load_section(PriorConfig, find_config("prior", "adapt"), [f"kind={kind}"])
        pairs = text_pairs(loaded, rows, vectors, config, 0)
        fitted[kind] = fit_prior(pairs, config, loaded.model.device, 0)[0].eval()
    return fitted


def fitted_on_training(model: Path, store: Path, work: Path) -> dict[str, Prior]:
    """Every kind of prior as `ctclip adapt --method prior` fits it, in a copy of the model."""
    copy, fitted = work / "model", {}
    if not copy.is_dir():
        shutil.copytree(model, copy)
    loaded = load_model(copy)
    for kind in KINDS:
        if not (copy / "heads" / f"prior-{kind}").is_dir():
            config = load_section(PriorConfig, find_config("prior", "adapt"), [f"kind={kind}"])
            # One folder, so that the embeddings are computed once.
            run_prior(loaded, store, work / "priors", config, head=f"prior-{kind}", force=True)
        head = usable_head(loaded, f"prior-{kind}")
        assert isinstance(head, PriorHead)
        fitted[kind] = head.prior
    return fitted


def centred(reports: np.ndarray, prior: Prior) -> np.ndarray:
    """The control: the gap closed by moving the reports' mean to that of the training volumes (Liang et al. 2022)."""
    moved = reports - reports.mean(axis=0) + prior.mean.numpy()
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


@dataclass(frozen=True)
class Judged:
    """How one map fits the mask of its finding: whether the peak is inside; whether it is on the mask's side, None if it
    has both; whether it is in a quarter of the lungs (a side, upper or lower half) that holds at least a fifth of the
    mask, and the share of the lungs in these quarters (chance); mm from the peak to the mask; the share of the body's
    voxels in the mask; seconds."""

    inside: bool
    side: bool | None
    quarter: bool
    lungs: float
    distance: float
    share: float
    seconds: float


def counterfactuals(model: Path, cohort: Path, findings: list[str], each: int, methods: list[str]) -> str:
    """One row for each method: over ``each`` scans of every finding, drawn in the order of the cohort."""
    loaded, scans = ctclip.load(model), read_cohort(cohort)
    masks = Masks(cohort / "masks", load_layout("phantom"))
    held = scans.table[(scans.table["split"] == "valid") & scans.table["volume"].isin(masks.volumes)]
    tallies: dict[str, list[Judged]] = {by: [] for by in methods}
    for finding in findings:
        used = 0
        for volume in held.loc[held[finding] == 1, "volume"]:
            if used == each:
                break
            ready = prepare(scans.files[volume], loaded.spec)
            mask = dict(masks.of(volume, ready.file_grid)).get(finding)
            if mask is None:
                continue
            used += 1
            for by in methods:
                found = explain(loaded.dual, loaded.head(), ready, [finding], scan=volume, model_hash="", by=by)
                tallies[by].append(judged(found, finding, mask))
                print(
                    f"{volume} {by}: {found.places[finding]} {tallies[by][-1]} {'; '.join(found.warnings)}", flush=True
                )
    rows = [
        [
            by, str(len(tally)), f"{np.mean([one.inside for one in tally]):.2f}", _share(one.side for one in tally),
            f"{np.mean([one.quarter for one in tally]):.2f} ({np.mean([one.lungs for one in tally]):.2f})", f"{np.median([one.distance for one in tally]):.0f}",
            f"{np.mean([one.share for one in tally]):.3f}", f"{np.mean([one.seconds for one in tally]):.0f}",
        ]
        for by, tally in tallies.items()
    ]  # fmt: skip
    head = ["method", "maps", "peak in the finding", "peak on its side", "peak in its quarter of the lungs (chance)", "mm to it, median", "share of the body in the finding (chance)", "s per map"]  # fmt: skip
    return table(f"Counterfactuals of {', '.join(findings)}", head, rows)


def _share(values: Iterable[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f} of {len(known)}" if known else ""


def judged(found: Explanation, finding: str, mask: np.ndarray) -> Judged:
    place, grid = found.places[finding], found.prepared.file_grid
    lps = np.argwhere(mask) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    distance = float(np.linalg.norm(lps - np.array(place.peak_lps), axis=1).min())
    column, row, cut = place.peak_voxel
    scan = found.prepared.scan
    # Lungs are denser than the air around the patient.
    lungs = np.argwhere((scan.array > -950) & (scan.array < -500))[::50]
    low, high = np.percentile(lungs @ scan.affine[2, :3] + scan.affine[2, 3], [2, 98])
    peak = np.array(place.peak_lps)

    def quarters(points: np.ndarray) -> pd.Series:
        named = [f"{side_of(one, found.prepared)} {one[2] > (low + high) / 2}" for one in points]
        return pd.Series(named).value_counts(normalize=True)

    inside = quarters(lps[:: max(1, len(lps) // 500)])
    ours = inside.index[inside >= 0.2]
    sides = {name.split()[0] for name in inside.index} - {"midline"}
    side = None if len(sides) != 1 or not place.side else place.side in sides
    right = quarters(peak[None]).index[0] in ours
    reached = quarters((lungs @ scan.affine[:3, :3].T + scan.affine[:3, 3])[:: max(1, len(lungs) // 500)])
    chance = float(reached[reached.index.isin(ours)].sum())
    body = float((scan.array > -900).sum())
    return Judged(bool(mask[cut, row, column]), side, right, chance, distance, float(mask.sum()) / body, found.seconds)


def good_findings(demo: Path) -> list[str]:
    """Findings with a zero-shot AUROC above 0.9 on the held-out volumes of a demo."""
    scored = json.loads((demo / "metrics.json").read_text())["zero_shot"]["auroc"]
    return [name for name, entry in scored.items() if (entry["value"] or 0) > GOOD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a folder of `ctclip demo`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=("prior", "counterfactual", "decoder", "rare"))
    parser.add_argument(
        "--halves", action="store_true", help="prior: learn from half of the held-out patients; encodes nothing"
    )
    parser.add_argument("--findings", nargs="*", help="instead of those with an AUROC above 0.9")
    parser.add_argument("--each", type=int, default=5, help="scans, or volumes, of each finding")
    parser.add_argument("--methods", nargs="*", default=["similarity", "contribution", "counterfactual"])
    parser.add_argument("--decoder", type=Path, help="decoder: the model folder with it; default: that of the demo")
    parser.add_argument("--other", type=Path, help="decoder: another demo, whose encoder and labels make a detector")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="decoder: how strongly it heeds a text")
    parser.add_argument("--trained-on", default="train", help="decoder: the split that it was trained on")
    parser.add_argument("--held-out", default="valid", help="decoder: a split that it has not seen")
    parser.add_argument("--held", type=int, default=200, help="decoder: volumes of --held-out")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = given.demo / "train" / "model"
    given.decoder = given.decoder or model
    print(machine())
    if given.only in (None, "prior"):
        result = priors(model, given.demo / "store", given.demo / "predictions", given.work, given.halves)
        print(show_priors(result))
        (given.work / "priors.json").write_text(json.dumps(result, indent=2))
    if given.only in (None, "counterfactual"):
        findings = given.findings or good_findings(given.demo)
        print(counterfactuals(model, given.demo / "cohort", findings, given.each, given.methods))
    if given.only in (None, "decoder"):
        result = decoder_figures(given, given.findings or good_findings(given.demo))
        (given.work / "decoder.json").write_text(json.dumps(result, indent=2))
        print(show_decoder(result))
    if given.only in (None, "rare"):
        result = rare_figures(given, given.findings or good_findings(given.demo))
        (given.work / "rare.json").write_text(json.dumps(result, indent=2))
        print(show_rare(result))


if __name__ == "__main__":
    main()
