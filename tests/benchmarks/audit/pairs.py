"""Pairs that were swapped, and reports whose sides were exchanged: how many lie in the worst tenth."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tests.benchmarks.common import table

SHARE, DRAWS, SEED = 0.05, 5, 3


def show(demo: Path, model: Path) -> str:
    from ctclip.adaptation.examples import cached_embeddings
    from ctclip.audit.filter_pairs import MirroredScans
    from ctclip.audit.pairs import match_scores, side_scores, worse_share
    from ctclip.audit.sides import exchange_sides
    from ctclip.inference.run import report_embeddings, report_texts
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded, store = load_model(model), VolumeStore(demo / "store")
    cache = Path("runs/audit_embeddings")
    rows = []
    for split in ("train", "valid"):
        scans = StoredScans(store, split, loaded.spec, loaded.path)
        scans.table = scans.table.drop_duplicates("scan").head(1500).reset_index(drop=True)
        vectors = cached_embeddings(loaded, scans, cache, 8)
        images = MirroredScans(store, split, loaded.spec, loaded.path)
        images.table = scans.table
        mirror = cached_embeddings(loaded, images, cache, 8)
        names = scans.table["volume"].tolist()
        volumes, turned = (np.stack([side[name] for name in names]) for side in (vectors, mirror))
        texts = report_texts(scans.table, loaded.trained_on.sections)
        exchanged = [exchange_sides(text) for text in texts]
        reports, others = (report_embeddings(loaded.model, these) for these in (texts, exchanged))
        patients = scans.table["patient"].to_numpy(dtype=str)
        sided = np.array([one != other for one, other in zip(texts, exchanged, strict=True)])
        swapped_found, sides_found = [], []
        began = time.process_time()
        for draw in range(DRAWS):
            random = np.random.default_rng([SEED, draw])
            wrong = random.choice(len(names), max(2, round(SHARE * len(names))), replace=False)
            given = reports.copy()
            given[wrong] = reports[np.roll(wrong, 1)]
            match = match_scores(volumes, given, patients)
            swapped_found.append(float((worse_share(match)[wrong] < 0.1).mean()))
            turned_over = random.choice(np.flatnonzero(sided), max(2, round(SHARE * len(names))), replace=False)
            given, counter = reports.copy(), others.copy()
            given[turned_over], counter[turned_over] = others[turned_over], reports[turned_over]
            score = match_scores(volumes, given, patients)
            score[sided] += side_scores((volumes - turned)[sided], (given - counter)[sided], patients[sided])
            sides_found.append(float((worse_share(score)[turned_over] < 0.1).mean()))
        seconds = (time.process_time() - began) / DRAWS
        rows += [
            [f"{split}: reports swapped at random", str(len(names)), _range(swapped_found), f"{seconds:.1f}"],
            [f"{split}: left and right exchanged", str(int(sided.sum())), _range(sides_found), ""],
        ]
    title = f"Pairs: of {SHARE:.0%} spoilt, the share in the worst tenth ({DRAWS} draws)"
    return table(title, ["pairs", "n", "found, mean (least to most)", "processor seconds a scoring"], rows)


def _range(values: list[float]) -> str:
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
