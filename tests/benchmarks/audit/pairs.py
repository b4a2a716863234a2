"""Pairs that were swapped, and reports whose sides were exchanged: how many lie in the worst tenth."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tests.benchmarks.common import table

SHARE, DRAWS, SEED = 0.05, 20, 33


def show(demo: Path, model: Path, most: int = 1500, splits: Sequence[str] = ("valid", "train")) -> str:
    from ctclip.adaptation.examples import cached_embeddings
    from ctclip.audit.filter_pairs import MirroredScans
    from ctclip.audit.sides import exchange_sides, signed_sentences
    from ctclip.inference.run import report_embeddings, report_texts
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded, store = load_model(model), VolumeStore(demo / "store")
    cache = Path("runs/embeddings")
    rows = []
    # The model has seen the training pairs, as they were before any was spoilt; valid is the harder case.
    for split in splits:
        scans = StoredScans(store, split, loaded.spec, loaded.path)
        scans.table = scans.table.drop_duplicates("scan").head(most).reset_index(drop=True)
        vectors = cached_embeddings(loaded, scans, cache, 8)
        images = MirroredScans(store, split, loaded.spec, loaded.path)
        images.table = scans.table
        mirror = cached_embeddings(loaded, images, cache, 8)
        names = scans.table["volume"].tolist()
        volumes, turned = (np.stack([side[name] for name in names]) for side in (vectors, mirror))
        texts = report_texts(scans.table, loaded.trained_on.sections)
        reports = report_embeddings(loaded.model, texts)
        said = signed_sentences(loaded.model, texts)
        patients, asymmetry = scans.table["patient"].to_numpy(dtype=str), volumes - turned
        exchanged = report_embeddings(loaded.model, [exchange_sides(text) for text in texts])
        count = max(2, round(SHARE * len(names)))
        shares: dict[str, list[float]] = {}
        worst = partial(_worst, shares, float(loaded.model.similarity.scale().detach()), volumes, asymmetry, patients)
        began = time.process_time()
        for draw in range(DRAWS):
            random = np.random.default_rng([SEED, draw])
            wrong = random.choice(len(names), count, replace=False)
            given, sides = reports.copy(), said.copy()
            given[wrong], sides[wrong] = reports[np.roll(wrong, 1)], said[np.roll(wrong, 1)]
            worst(wrong, "reports swapped at random", given, sides)
            wrong = random.choice(np.flatnonzero(said.any(axis=1)), count, replace=False)
            given, sides = reports.copy(), said.copy()
            given[wrong], sides[wrong] = exchanged[wrong], -said[wrong]
            worst(wrong, "left and right exchanged", given, sides)
        seconds = (time.process_time() - began) / (2 * DRAWS)
        size = f"{len(names)} ({int(said.any(axis=1).sum())} name a side)"
        rows += [[f"{split}: {what}", size, _range(found), f"{seconds:.1f}"] for what, found in shares.items()]
        print(rows[-6:], file=sys.stderr, flush=True)
    title = f"Pairs: of {SHARE:.0%} spoilt, the share in the worst tenth ({DRAWS} draws)"
    return table(title, ["pairs", "n", "found, mean (least to most)", "processor seconds a scoring"], rows)


def _worst(
    shares: dict[str, list[float]],
    scale: float,
    volumes: np.ndarray,
    asymmetry: np.ndarray,
    patients: np.ndarray,
    wrong: np.ndarray,
    what: str,
    reports: np.ndarray,
    sides: np.ndarray,
) -> None:
    """Add to ``shares`` how many of the wrong pairs lie in the worst tenth, by each score."""
    from ctclip.audit.pairs import exchanged_alone, match_scores, pair_scores, side_scores, worse_share

    (match, swapped), side = match_scores(volumes, reports, patients, scale=scale), np.full(len(volumes), np.nan)
    sided = sides.any(axis=1)
    side[sided], exchanged = side_scores(asymmetry[sided], sides[sided], patients[sided])
    by = {
        "match": match,
        "side": np.where(sided, side, np.inf),
        "score": pair_scores(match, side, swapped, exchanged_alone(exchanged, swapped, int(sided.sum()))),
    }
    for name, scores in by.items():
        shares.setdefault(f"{what}, by {name}", []).append(float((worse_share(scores)[wrong] < 0.1).mean()))


def _range(values: list[float]) -> str:
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
