"""What the decoder of a model draws: detection of the findings asked for, sides, ranges of the cohort, and copies.

``python -m tests.benchmarks.imagine --only decoder`` prints it.
"""

from __future__ import annotations

import argparse
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
from ctclip.adaptation.probe import fit_probe
from ctclip.audit.measures import MEASURES, measure
from ctclip.evaluation.tables import read_embeddings
from ctclip.imagining.imagine import decoder_of
from ctclip.imagining.synthetic import Synthetic, to_hu, write_volume
from ctclip.inference.run import VOLUME
from ctclip.models.folder import load_model
from ctclip.preprocessing import prepare
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from ctclip.sentences import sentences
from tests.benchmarks.common import table


@dataclass(frozen=True)
class Asked:
    """Volumes HU (n, D, H, W) that the decoder generated for one text; ``finding`` and ``side``: the requested ones, if
    any."""

    finding: str
    side: str
    text: str
    hu: np.ndarray


# A sentence of the phantom's reports for each finding, and the findings that are on one side of the lungs.
SIDED = ("Pleural effusion", "Atelectasis", "Lung opacity")
SIDED_TEXT = {
    "Pleural effusion": "There is a large {side} pleural effusion.",
    "Atelectasis": "Atelectasis is noted in the {side} lower lobe.",
    "Lung opacity": "The {side} lower lobe shows ground-glass opacity.",
}


def decoder_figures(given: argparse.Namespace, findings: list[str]) -> dict[str, Any]:
    """Every figure of the decoder in the model ``--decoder``, beside held-out volumes of the demo (``--held-out``, which the
    decoder has not seen)."""
    loaded = ctclip.load(given.decoder)
    store = VolumeStore(given.demo / "store")
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
    """``each`` volumes for every text, and three times as many without a condition; saved in ``work``. Texts with a
    side are used with both sides and the same seeds."""
    head, prompts = decoder_of(loaded.folder), load_prompts(loaded.folder.labels.prompts or "generic")
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
            count = each if text else 3 * each
            volumes = [head.generate(text or None, 1000 + seed, guidance=guidance) for seed in range(count)]
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
    """A volume in HU, encoded and decoded by the autoencoder: the upper limit for a perfect flow."""
    decoder = decoder_of(loaded.folder).decoder
    voxels = torch.from_numpy(loaded.spec.normalise(hu).astype(np.float32))[None, None]
    with torch.inference_mode():
        latents = decoder.standard(decoder.encode(voxels)[0])
        return to_hu(decoder.volume(latents, torch.Generator().manual_seed(seed))[0, 0].numpy(), loaded.spec)


KINDS_OF_VOLUMES = ("asked or not", "held out", "held out, through the autoencoder")


def detection(
    score: Detector, asked: list[Asked], real: list[np.ndarray], again: list[np.ndarray], rows: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """By finding: the AUROC of volumes generated for it against those without a condition and, as controls, that of
    real held-out volumes with the finding against those without, unchanged and through the autoencoder."""
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
    """How much denser the lower half of the left side of the chest is than that of the right, in HU from -1000 to 100.
    Columns run to the left."""
    d, _, w = hu.shape
    lower = hu[d // 5 : d // 2].clip(-1000, 100)
    return float(lower[..., w // 2 :].mean() - lower[..., : w // 2].mean())


def sides(asked: list[Asked], real: list[np.ndarray], rows: pd.DataFrame) -> dict[str, Any]:
    """For each sided finding, the share of volumes whose denser side, relative to the mean of those without a
    condition, is the requested side; and, as a control, of real volumes whose report names one side."""
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
    """For each measure the 2.5 and 97.5 percentiles over held-out volumes, the median of synthetic ones, and the share
    of these within; and the same for the distance (Wasserstein, HU) of a volume's histogram from that of the held-out
    cohort."""
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
    """The median distance (root mean square, HU, of volumes averaged over 4 x 4 x 4 voxels) to the nearest training
    volume, for synthetic and held-out volumes; and its ratio to the distance to the tenth nearest, which is 1 if no
    volume is copied."""

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
