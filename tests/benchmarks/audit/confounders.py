"""Confounders planted in phantoms' pictures: how often they stand in the first three lines, and what is called without one."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from tests.benchmarks.common import table

EMBEDDINGS, CACHE = Path("runs/embeddings"), Path("runs/audit_cache")
SEEDS, VOLUMES, LABEL = 20, 700, "Cardiomegaly"
# HU and mm of what is planted: a box of metal under the skin with a wire, a step in the table, a smoother kernel.
METAL, STEP_HU, SMOOTH = 3000, 250, 0.5


def show(demo: Path, model: Path) -> str:
    from ctclip.audit.audit_page import concept_sheet
    from ctclip.audit.concepts import load_concepts
    from ctclip.audit.data_audit import SHORTCUT, Sheet, audit_data
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded, store, concepts = load_model(model), VolumeStore(demo / "store"), load_concepts()
    # Scans that the model was not trained on; which of them are called train is drawn below.
    whole, *_ = concept_sheet(loaded, store, "valid", EMBEDDINGS, concepts, 8)
    first = whole.table.groupby("scan", sort=False).head(1).index
    chosen = np.sort(np.random.default_rng(0).permutation(first.to_numpy())[:VOLUMES])
    base = Sheet(whole.table.iloc[chosen].reset_index(drop=True), whole.values[chosen], whole.names, whole.kinds)
    positive = base.table[LABEL].to_numpy(dtype=float, na_value=0) == 1
    needed = {"device": positive, "kernel": np.ones(len(positive), bool), "table": positive}
    spoilt = {name: _spoilt(name, needed[name], base, loaded, store, concepts) for name in SPOIL}
    rows = []
    for name in (*PLANS, "nothing"):
        found, called, significant, seconds, places = 0, 0, 0, 0.0, []
        for seed in range(SEEDS):
            sheet, is_planted = _planted(base, spoilt, name, seed)
            began = time.process_time()
            lines = audit_data(sheet)
            seconds += time.process_time() - began
            lines = lines[lines["family"] == SHORTCUT]
            called += bool(lines["significant"].any())
            significant += int(lines["significant"].sum())
            mine = [place for place, line in enumerate(lines.itertuples(), 1) if is_planted(line)]
            places.append(mine[0] if mine else len(lines) + 1)
        found = sum(place <= 3 for place in places)
        what = [f"{found} of {SEEDS}", f"{max(places)}"] if name != "nothing" else ["", ""]
        rows.append(
            [
                name,
                *what,
                f"{called} of {SEEDS}",
                f"{significant / SEEDS:.1f}",
                f"{len(lines):,}",
                f"{seconds / SEEDS:.1f}",
            ]
        )
        print(
            rows[-1],
            lines.head(3)[["concept", "group", "where", "p", "adjusted_p"]].to_string(),
            file=sys.stderr,
            flush=True,
        )
    title = f"Confounders planted in {len(base.table)} phantoms, {SEEDS} seeds"
    head = ["planted", "in the first three lines", "its first line, at worst", "seeds with a significant line",
            "significant lines, mean", "lines", "processor seconds"]  # fmt: skip
    return table(title, head, rows)


def _spoilt(name: str, needed: np.ndarray, base, loaded, store, concepts) -> np.ndarray:  # type: ignore[no-untyped-def]
    """(n, names) values of the volumes that are needed, spoilt; NaN elsewhere. Kept between runs."""
    import torch

    from ctclip.audit.concepts import concept_scores
    from ctclip.audit.measures import measure
    from ctclip.audit.pictures import VERSION
    from ctclip.drift.facts import Source
    from ctclip.inference.run import run_key

    CACHE.mkdir(parents=True, exist_ok=True)
    volumes = [str(volume) for volume in base.table["volume"][needed]]
    cache = CACHE / f"{name}-{run_key(loaded.hash, volumes, str(store.path), VERSION)}.npy"
    if not cache.is_file():
        vectors, measured = [], []
        for volume in volumes:
            hu = SPOIL[name](store.read(volume).astype(np.float32), store.spec.spacing)
            voxels = torch.from_numpy(store.spec.normalise(np.rint(hu).astype(np.int16)))
            with torch.inference_mode():
                vectors.append(loaded.model.encode_volume(voxels[None, None]).numpy()[0])
            measured.append(measure(hu, store.spec, Source.of_notes(store.notes(volume))))
        told = concept_scores(loaded.model, concepts, np.stack(vectors))
        np.save(cache, np.concatenate([told, np.stack(measured)], axis=1))
    values = np.full(base.values.shape, np.nan)
    values[needed] = np.load(cache)
    return values


def _planted(base, spoilt, name: str, seed: int):  # type: ignore[no-untyped-def]
    """A cohort with splits drawn anew and one confounder, and what tells a line of it."""
    random = np.random.default_rng(seed)
    patients = base.table["patient"].to_numpy(dtype=str)
    names, member = np.unique(patients, return_inverse=True)
    split = np.where(random.random(len(names)) < 0.7, "train", "valid")[member]
    # Bootstrap-like variety: each seed sees four fifths of the patients.
    kept = (random.random(len(names)) < 0.8)[member]
    values, drawn = base.values.copy(), base.table.assign(split=split)
    positive = base.table[LABEL].to_numpy(dtype=float) == 1
    sure = random.random(len(patients)) < 0.6
    if name == "a device that goes with a label in train":
        rows = positive & sure & (split == "train")
        values[rows] = spoilt["device"][rows]
        planted = lambda line: line.group == LABEL and line.where.startswith("train") and line.concept in DEVICES  # noqa: E731
    elif name == "a kernel by split":
        rows = sure & (split == "train")
        values[rows] = spoilt["kernel"][rows]
        planted = lambda line: line.group.startswith("split") and line.kind in PICTURE  # noqa: E731
    elif name == "a table's shape by label":
        rows = positive & sure
        values[rows] = spoilt["table"][rows]
        planted = lambda line: line.group == LABEL and line.concept.startswith("table")  # noqa: E731
    else:
        planted = lambda line: False  # noqa: E731
    table_ = drawn[kept].reset_index(drop=True)
    return dataclasses.replace(base, table=table_, values=values[kept]), planted


DEVICES = {
    "metal", "pacemaker", "central venous catheter", "port catheter", "endotracheal tube", "chest tube", "nasogastric tube",
    "sternotomy wires", "coronary stent", "artificial heart valve", "spinal hardware", "surgical clips", "electrodes on the skin",
    "breast implant", "streak artefacts", "contrast or calcium",
}  # fmt: skip
PICTURE = ("technique", "picture", "noise", "kernel")
PLANS = ("a device that goes with a label in train", "a kernel by split", "a table's shape by label")


def _device(hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """A generator of 40 x 12 x 40 mm in front of the left upper chest."""
    out = hu.copy()
    body = (hu > -300) & (hu < 300)
    z = int(0.72 * len(hu))
    row = np.flatnonzero(body[z].any(axis=1))
    column = int(0.68 * hu.shape[2])
    front = np.flatnonzero(body[z][:, column])
    y = int(front[0]) + 1 if len(front) else int(row[0])
    dz, dy, dx = (max(1, round(mm / step)) for mm, step in zip((40, 12, 40), spacing, strict=True))
    out[z - dz // 2 : z + dz // 2 + 1, y : y + dy, column - dx // 2 : column + dx // 2 + 1] = METAL
    return out


def _kernel(hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """A softer kernel: in-plane smoothing."""
    return ndimage.gaussian_filter(hu, (0, SMOOTH, SMOOTH))


def _table(hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """A denser step in the middle of what lies below the body."""
    from ctclip.audit.measures import _body

    out = hu.copy()
    body = np.flatnonzero(_body(hu).any(axis=(0, 2)))
    first = min(int(body[-1]) + 2, hu.shape[1] - 2)
    third = hu.shape[2] // 3
    part = out[:, first : first + max(2, round(15 / spacing[1])), third : 2 * third]
    part += STEP_HU * (part > -1000)
    return out


SPOIL = {"device": _device, "kernel": _kernel, "table": _table}
