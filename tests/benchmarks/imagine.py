"""From texts to volumes, and counterfactuals: ``python -m tests.benchmarks.imagine --demo runs/demo --work FOLDER``.

``prior``: report-to-volume recall with and without each kind of prior, and the modality gap before and after, on held-out
patients. ``--work`` gets a copy of the model with the priors, and the embeddings; a prior that is there is used again.

``counterfactual``: for each finding with a zero-shot AUROC above 0.9, scans in which it is drawn: how often the score turns,
how often the peak of the edit lies in the drawn finding and on its side of the body, beside other methods.

``decoder``: volumes drawn by the decoder in the model ``--decoder`` for every such finding, and for none: whether detectors tell
them apart, the side asked for, ranges of the cohort, and copies of training volumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from sklearn.metrics import roc_auc_score

import ctclip
from ctclip.adaptation.examples import store_label_array
from ctclip.adaptation.prior import PriorConfig, fit_prior, run_prior, text_pairs
from ctclip.adaptation.probe import fit_probe
from ctclip.audit.geometry import modality_gap
from ctclip.audit.measures import MEASURES, measure
from ctclip.config_files import find_config, load_section
from ctclip.evaluation.retrieval import retrieval
from ctclip.evaluation.tables import read_embeddings
from ctclip.explanation.explain import Explanation, explain
from ctclip.explanation.masks import Masks, load_layout
from ctclip.explanation.place import side_of
from ctclip.heads.prior import Prior, PriorHead
from ctclip.imagining.imagine import GUIDANCE, STEPS, decoder_of
from ctclip.imagining.synthetic import Synthetic, to_hu, write_volume
from ctclip.inference.model import usable_head
from ctclip.inference.run import REPORT, VOLUME
from ctclip.models.folder import load_model
from ctclip.preprocessing import prepare
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from ctclip.sentences import sentences
from tests.benchmarks.common import machine, table

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
    """Every kind of prior, fitted to the volumes of ``rows``."""
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


def counterfactuals(model: Path, cohort: Path, findings: list[str], each: int, methods: list[str]) -> str:
    """One row for each method: over ``each`` scans of every finding, drawn in the order of the cohort."""
    loaded, scans = ctclip.load(model), read_cohort(cohort)
    masks = Masks(cohort / "masks", load_layout("phantom"))
    held = scans.table[(scans.table["split"] == "valid") & scans.table["volume"].isin(masks.volumes)]
    tallies: dict[str, list[tuple[bool, bool | None, float, float, float]]] = {by: [] for by in methods}
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
    rows = []
    for by, tally in tallies.items():
        sided = [right for _, right, *_ in tally if right is not None]
        inside, distance, share, seconds = (np.array([one[place] for one in tally]) for place in (0, 2, 3, 4))
        rows.append([
            by, str(len(tally)), f"{inside.mean():.2f}", f"{np.mean(sided):.2f} of {len(sided)}" if sided else "",
            f"{np.median(distance):.0f}", f"{share.mean():.3f}", f"{seconds.mean():.0f}",
        ])  # fmt: skip
    head = ["method", "maps", "peak in the finding", "peak on its side", "mm to it, median", "share of the body in the finding (chance)", "s a map"]  # fmt: skip
    return table(f"Counterfactuals of {', '.join(findings)}", head, rows)


def judged(found: Explanation, finding: str, mask: np.ndarray) -> tuple[bool, bool | None, float, float, float]:
    """Whether the peak lies in the mask; whether on its side of the scan, if the mask has one; mm from peak to mask; the
    share of the body's voxels that the mask has; seconds."""
    place, grid = found.places[finding], found.prepared.file_grid
    lps = np.argwhere(mask) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    distance = float(np.linalg.norm(lps - np.array(place.peak_lps), axis=1).min())
    column, row, cut = place.peak_voxel
    sides = {side_of(one, found.prepared) for one in lps[:: max(1, len(lps) // 200)]} - {"midline", ""}
    right = None if len(sides) != 1 or not place.side else place.side in sides
    body = float((found.prepared.scan.array > -900).sum())
    return bool(mask[cut, row, column]), right, distance, float(mask.sum()) / body, found.seconds


@dataclass(frozen=True)
class Asked:
    """Volumes HU (n, D, H, W) that the decoder drew for one text; ``finding`` and ``side`` that it asks for, if any."""

    finding: str
    side: str
    text: str
    hu: np.ndarray


# A sentence of the phantom's reports for each finding, and the findings that lie on one side of the lungs.
SIDED = ("Pleural effusion", "Atelectasis", "Lung opacity")
SIDED_TEXT = {
    "Pleural effusion": "There is a large {side} pleural effusion.",
    "Atelectasis": "Atelectasis is noted in the {side} lower lobe.",
    "Lung opacity": "The {side} lower lobe shows ground-glass opacity.",
}


def decoder_figures(given: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the decoder in the model ``--decoder``, beside held-out volumes of the demo (``--held-out``, which the
    decoder has not seen)."""
    loaded = ctclip.load(given.decoder)
    store, findings = VolumeStore(given.demo / "store"), given.findings or good_findings(given.demo)
    asked = drawn(loaded, findings, given.each, given.guidance, given.work)
    rows = store.cohort[store.cohort["split"] == given.held_out].drop_duplicates("scan").head(given.held)
    real = [store.read(str(name)).astype(np.float32) for name in rows["volume"]]
    again = [reconstructed(loaded, hu, seed) for seed, hu in enumerate(real)]
    detectors = {"the model itself, by its prompts": own_detector(loaded)}
    if given.other is not None:
        detectors["probe of another encoder"] = other_detector(given.other, loaded.spec)
    return {
        "volumes": int(sum(len(one.hu) for one in asked)), "held_out": len(real),
        "detection": {name: detection(score, asked, real, again, rows) for name, score in detectors.items()},
        "sides": sides(asked, real, rows),
        "ranges": ranges(asked, real, loaded.spec),
        "copies": copies(loaded, asked, real, store, given.trained_on),
    }  # fmt: skip


def drawn(loaded: ctclip.Model, findings: list[str], each: int, guidance: float, work: Path) -> list[Asked]:
    """``each`` volumes of every text, and three times as many of none; kept in ``work``. Sided texts ask for both sides with
    the same seeds."""
    decoder, prompts = decoder_of(loaded.folder), load_prompts(loaded.folder.labels.prompts or "generic")
    wanted = [("", "", "")]
    for name in findings:
        if name in SIDED:
            wanted += [(name, side, SIDED_TEXT[name].format(side=side)) for side in ("left", "right")]
        else:
            wanted.append((name, "", prompts.groups(name, True)[0][0]))
    asked = []
    for finding, side, text in wanted:
        path = work / f"{finding or 'none'}{side}.npy".replace(" ", "_")
        if not path.is_file():
            with torch.inference_mode():
                condition = (
                    decoder.condition(texts=loaded.dual.encode_text([text]).float()) if text else decoder.condition()
                )
            count = each if text else 3 * each
            volumes = [
                decoder.sample(condition, [1000 + seed], steps=STEPS["decoder"], guidance=guidance)[0, 0]
                for seed in range(count)
            ]
            np.save(path, to_hu(torch.stack(volumes).cpu().numpy(), loaded.spec).round().astype(np.int16))
            print(f"{path.name}: {text}", flush=True)
        asked.append(Asked(finding, side, text, np.load(path).astype(np.float32)))
    return asked


# HU (D, H, W) on the demo's grid -> the score of each finding.
Detector = Callable[[np.ndarray], dict[str, float]]


def own_detector(loaded: ctclip.Model) -> Detector:
    head = loaded.head()

    def score(hu: np.ndarray) -> dict[str, float]:
        voxels = torch.from_numpy(loaded.spec.normalise(hu).astype(np.float32))[None, None]
        with torch.inference_mode():
            return dict(zip(head.names, head.score(loaded.dual.encode(voxels))[0].tolist(), strict=True))

    return score


def other_detector(demo: Path, spec: PreprocessingSpec) -> Detector:
    """A supervised linear probe on the encoder of another demo, which has another grid and has seen other phantoms; it is fitted
    to the labels of that demo's held-out volumes, whose embeddings are there."""
    loaded, store = load_model(demo / "train" / "model"), VolumeStore(demo / "store")
    arrays = read_embeddings(demo / "predictions" / "embeddings.parquet")
    rows = store.cohort.set_index("volume", drop=False).loc[arrays["volume"]].reset_index(drop=True)
    names, labels = store_label_array(rows, store)
    probe = fit_probe(arrays[VOLUME], labels, rows["patient"].to_numpy(str), seed=0)

    def score(hu: np.ndarray) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.nii"
            write_volume(path, Synthetic(hu, "", "", "", 0), spec)
            ready = prepare(path, loaded.spec, expect="any")
        with torch.inference_mode():
            vector = loaded.model.encode_volume(torch.from_numpy(np.array(ready.voxels))[None, None])[0].numpy()
        return dict(zip(names, (probe.weight @ vector + probe.bias).tolist(), strict=True))

    return score


def reconstructed(loaded: ctclip.Model, hu: np.ndarray, seed: int) -> np.ndarray:
    """A volume in HU, through the autoencoder and back: what a perfect flow could draw of it."""
    decoder = decoder_of(loaded.folder)
    voxels = torch.from_numpy(loaded.spec.normalise(hu).astype(np.float32))[None, None]
    with torch.inference_mode():
        latents = decoder.standard(decoder.encode(voxels)[0])
        return to_hu(decoder.volume(latents, torch.Generator().manual_seed(seed))[0, 0].numpy(), loaded.spec)


KINDS_OF_VOLUMES = ("asked or not", "held out", "held out, through the autoencoder")


def detection(
    score: Detector, asked: list[Asked], real: list[np.ndarray], again: list[np.ndarray], rows: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """By finding: the AUROC of volumes that were asked for it against those that were asked for nothing, and, as controls, that
    of real held-out volumes with the finding against those without, as they are and through the autoencoder."""
    none, known, passed = ([score(hu) for hu in volumes] for volumes in (asked[0].hu, real, again))
    result = {}
    for finding in dict.fromkeys(one.finding for one in asked[1:]):
        prompted = [score(hu)[finding] for one in asked[1:] if one.finding == finding for hu in one.hu]
        unprompted = [one[finding] for one in none]
        truth = rows[finding].to_numpy(int)
        controls = [float(roc_auc_score(truth, [one[finding] for one in scores])) for scores in (known, passed)]
        values = float(roc_auc_score([1] * len(prompted) + [0] * len(unprompted), prompted + unprompted))
        result[finding] = dict(zip(KINDS_OF_VOLUMES, (values, *controls), strict=True))
        print(finding, result[finding], flush=True)
    return result


def asymmetry(hu: np.ndarray) -> float:
    """How much denser the lower half of the left side of the chest is than that of the right, in HU from -1000 to 100. Columns
    run to the left."""
    d, _, w = hu.shape
    lower = hu[d // 5 : d // 2].clip(-1000, 100)
    return float(lower[..., w // 2 :].mean() - lower[..., : w // 2].mean())


def sides(asked: list[Asked], real: list[np.ndarray], rows: pd.DataFrame) -> dict[str, Any]:
    """Of each sided finding the share of volumes whose denser side, against the mean of those asked for nothing, is the one
    asked for; and, as a control, of real volumes whose report names one side."""
    middle = float(np.mean([asymmetry(hu) for hu in asked[0].hu]))
    result: dict[str, Any] = {}
    for one in asked:
        if one.side:
            right = [(asymmetry(hu) > middle) == (one.side == "left") for hu in one.hu]
            result.setdefault(one.finding, []).extend(right)
    usual, control = float(np.mean([asymmetry(hu) for hu in real])), list[bool]()
    for hu, text in zip(real, rows["findings"].astype(str), strict=True):
        named = {
            word
            for sentence in sentences(text)
            if "effusion" in sentence and "pericardial" not in sentence.lower()
            for word in ("left", "right", "bilateral", "both")
            if word in sentence.lower()
        }
        if named in ({"left"}, {"right"}):
            control.append((asymmetry(hu) > usual) == ("left" in named))
    return {"share": {name: float(np.mean(values)) for name, values in result.items()}, "volumes": {name: len(values) for name, values in result.items()}, "effusions of held-out volumes": [int(sum(control)), len(control)]}  # fmt: skip


RANGED = (
    "lung volume",
    "lung density",
    "noise in soft tissue",
    "noise across slices",
    "noise in the air",
    "body width",
    "body depth",
)


def ranges(asked: list[Asked], real: list[np.ndarray], spec: PreprocessingSpec) -> dict[str, dict[str, Any]]:
    """Of each measure the 2.5 and 97.5 percentiles over held-out volumes, the median of synthetic ones, and the share of these
    in between; and the same of the distance (Wasserstein, HU) of a volume's histogram from that of the held-out cohort."""
    every = [hu for one in asked for hu in one.hu]
    columns = [list(MEASURES).index(name) for name in RANGED]
    made, kept = (
        np.stack([measure(hu.astype(np.int16), spec, None)[columns] for hu in volumes]) for volumes in (every, real)
    )
    edges = np.linspace(-1000, 1000, 101)
    centres = (edges[1:] + edges[:-1]) / 2
    counts = [np.stack([np.histogram(hu, edges)[0] for hu in volumes]) for volumes in (every, real)]
    whole = counts[1].sum(axis=0)
    away = [np.array([wasserstein_distance(centres, centres, one, whole) for one in count]) for count in counts]
    table = {name: (made[:, place], kept[:, place]) for place, name in enumerate(RANGED)} | {
        "HU histogram, distance from the cohort's": (away[0], away[1])
    }
    result = {}
    for name, (synthetic, held) in table.items():
        low, high = np.nanpercentile(held, [2.5, 97.5])
        if "histogram" in name:
            low = 0.0
        result[name] = {"low": float(low), "high": float(high), "held_out": float(np.nanmedian(held)), "synthetic": float(np.nanmedian(synthetic)), "inside": float(np.mean((synthetic >= low) & (synthetic <= high)))}  # fmt: skip
    return result


def copies(
    loaded: ctclip.Model, asked: list[Asked], real: list[np.ndarray], store: VolumeStore, split: str
) -> dict[str, float]:
    """The median distance (root mean square, HU, of volumes averaged over 4 x 4 x 4 voxels) to the nearest training volume, of
    synthetic and of held-out volumes; and by that to the tenth nearest, which is 1 where no volume is copied."""

    def small(hu: np.ndarray) -> np.ndarray:
        return F.avg_pool3d(torch.from_numpy(hu.astype(np.float32).clip(-1000, 1000))[None], 4).numpy().ravel()

    names = store.cohort.loc[store.cohort["split"] == split, "volume"].astype(str)
    train = np.stack([small(store.read(name)) for name in names])
    result = {"training volumes": float(len(train))}
    for kind, volumes in (("synthetic", [hu for one in asked for hu in one.hu]), ("held_out", real)):
        near = []
        for hu in volumes:
            distances = np.sqrt(np.partition(((train - small(hu)) ** 2).mean(axis=1), 9)[:10])
            near.append((distances.min(), distances.min() / distances.max()))
        result[f"{kind}: nearest"], result[f"{kind}: nearest by tenth"] = (
            float(np.median(part)) for part in zip(*near, strict=True)
        )
    return result


def show_decoder(result: dict[str, Any]) -> str:
    """The figures as tables."""
    names = list(result["detection"])
    findings = list(result["detection"][names[0]])
    rows = [
        [
            finding,
            *(f"{result['detection'][name][finding][kind]:.2f}" for name in names for kind in KINDS_OF_VOLUMES),
        ]
        for finding in findings
    ]
    means = [
        np.mean([result["detection"][name][finding][kind] for finding in findings])
        for name in names
        for kind in KINDS_OF_VOLUMES
    ]
    rows.append(["mean", *(f"{mean:.3f}" for mean in means)])
    head = ["finding", *(f"{name}: {kind}" for name in names for kind in KINDS_OF_VOLUMES)]
    texts = [
        table(f"Detected: {result['volumes']} synthetic, {result['held_out']} held-out volumes (AUROC)", head, rows)
    ]
    share, count = result["sides"]["share"], result["sides"]["volumes"]
    texts.append(
        table(
            "The side asked for",
            ["finding", "volumes", "on the side"],
            [[name, str(count[name]), f"{share[name]:.2f}"] for name in share],
        )
    )
    texts.append(f"Held-out effusions on one side: {result['sides']['effusions of held-out volumes']}")
    rows = [
        [
            name,
            f"{one['low']:.0f} to {one['high']:.0f}",
            f"{one['held_out']:.0f}",
            f"{one['synthetic']:.0f}",
            f"{one['inside']:.2f}",
        ]
        for name, one in result["ranges"].items()
    ]
    texts.append(
        table(
            "Ranges",
            ["measure", "95 % of held-out volumes", "median, held out", "median, synthetic", "synthetic inside"],
            rows,
        )
    )
    texts.append(
        table("Copies", ["figure", "value"], [[name, f"{value:.2f}"] for name, value in result["copies"].items()])
    )
    return "\n\n".join(texts)


def good_findings(demo: Path) -> list[str]:
    """Findings with a zero-shot AUROC above 0.9 on the held-out volumes of a demo."""
    scored = json.loads((demo / "metrics.json").read_text())["zero_shot"]["auroc"]
    return [name for name, entry in scored.items() if (entry["value"] or 0) > GOOD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a folder of `ctclip demo`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=("prior", "counterfactual", "decoder"))
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
        result = decoder_figures(given)
        (given.work / "decoder.json").write_text(json.dumps(result, indent=2))
        print(show_decoder(result))


if __name__ == "__main__":
    main()
