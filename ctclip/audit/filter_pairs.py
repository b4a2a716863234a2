"""Score every pair of volume and report in a split; write tables and a page, the worst pairs first."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip.adaptation.examples import cached_embeddings
from ctclip.audit.doubles import copied_pairs
from ctclip.audit.pairs import FEWEST_PAIRS, exchanged_alone, match_scores, pair_scores, side_scores, worse_share
from ctclip.audit.sides import mirrored, signed_sentences
from ctclip.data.pair_scores import write_pair_scores
from ctclip.errors import DataError
from ctclip.evaluation.pages import write_page
from ctclip.inference.run import report_embeddings, report_texts, run_key
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.outputs import claimed_folder, made_by_us
from ctclip.preprocessing.store import VolumeStore

TABLES = ("pairs.csv", "pairs.json", "pairs.html")
COMMAND = "filter-pairs"
COLUMNS = ("volume", "patient", "scan", "score", "worse_share", "match", "side", "note")
SHOWN = 60
# If the best tenth of the pairs has lower log odds than this, the model does not distinguish the reports.
SURE = 1.0


@dataclass(frozen=True)
class WrongPairs:
    """Estimated fractions of the pairs whose report belongs to another volume (``swapped``) or exchanges left and right
    (``exchanged``; 0 if sides were not scored). ``informative``: whether the model distinguishes reports at all; if not, the
    fractions are meaningless."""

    swapped: float
    exchanged: float
    informative: bool

    @property
    def wrong(self) -> float:
        return min(1.0, self.swapped + self.exchanged)


class MirroredScans(StoredScans):
    """The volumes of a store with left and right exchanged."""

    def origin(self) -> str:
        return f"mirrored {super().origin()}"

    def voxels(self, index: int) -> tuple[np.ndarray, str]:
        voxels, warnings = super().voxels(index)
        return mirrored(voxels, self.spec), warnings


def filter_pairs(
    loaded: ModelFolder,
    store: VolumeStore,
    output: Path,
    *,
    split: str = "train",
    sides: bool = True,
    keep: bool = False,
    embeddings: Path | None = None,
    batch: int = 8,
    seed: int = 0,
    force: bool = False,
) -> tuple[pd.DataFrame, WrongPairs]:
    """Score the pairs of ``split``, write ``TABLES`` to ``output`` and return the table (``COLUMNS``), the worst pairs
    first, and the estimated fractions of wrong pairs.

    ``sides``: also encode mirror images, to detect reports with left and right exchanged; ``keep``: save the scores in
    the store, where ``data.min_pair_score`` and ``data.best_pairs`` read them.
    """
    if keep and not os.access(store.path, os.W_OK | os.X_OK):
        raise DataError(f"{store.path}: cannot be written into, and --keep saves the scores there; leave out --keep")
    key = run_key(loaded.hash, str(store.path.resolve()), split, sides, seed)
    with claimed_folder(output, COMMAND, key, TABLES, lambda folder: made_by_us(folder), force=force):
        pairs, wrong = score_pairs(
            loaded, store, split, embeddings or output / "embeddings", sides=sides, batch=batch, seed=seed
        )
        with written_beside(output / "pairs.csv") as partial:
            write_csv(partial, pairs.drop(columns="text"), float_format="%.5g")
        write_text(
            output / "pairs.json", json.dumps({"pairs": len(pairs), **asdict(wrong), "wrong": wrong.wrong}, indent=2)
        )
        _write_page(output / "pairs.html", store, split, pairs, wrong)
    pairs = pairs.drop(columns="text")
    if keep:
        write_pair_scores(store, pairs[["volume", "score", "worse_share"]].assign(model=loaded.hash))
    return pairs, wrong


def score_pairs(
    loaded: ModelFolder,
    store: VolumeStore,
    split: str,
    cache: Path,
    *,
    sides: bool = True,
    batch: int = 8,
    seed: int = 0,
) -> tuple[pd.DataFrame, WrongPairs]:
    """A table with ``COLUMNS`` and the report's text for every stored volume of ``split``, the worst pairs first, and the
    estimated fractions of wrong pairs.

    ``score``, ``match`` and ``side`` are log odds that a pair is right; -inf without a report. ``match`` and ``side``
    assume that right and wrong pairs are equally frequent; ``score`` uses their estimated frequency, and is -inf for a copy
    of another pair. ``side`` is NaN if the report names no side. Raises DataError for fewer than ``FEWEST_PAIRS`` pairs.
    """
    scans = StoredScans(store, split, loaded.spec, loaded.path)
    vectors = cached_embeddings(loaded, scans, cache, batch)
    table = scans.table[scans.table["volume"].isin(list(vectors))].reset_index(drop=True)
    texts = report_texts(table, loaded.trained_on.sections)
    known = np.array([bool(text) for text in texts])
    if known.sum() < FEWEST_PAIRS:
        raise DataError(
            f"{store.path}: {known.sum()} volumes of split {split!r} have a report; {FEWEST_PAIRS} are needed"
        )
    volumes = np.stack([vectors[name] for name in table["volume"]])
    reports = report_embeddings(loaded.model, texts)
    patients = table["patient"].to_numpy(dtype=str)
    match, side = np.full(len(table), -np.inf), np.full(len(table), np.nan)
    scale = float(loaded.model.similarity.scale().detach())
    match[known], swapped = match_scores(volumes[known], reports[known], patients[known], scale=scale, seed=seed)
    exchanged, sided = 0.5, np.zeros(len(table), dtype=bool)
    if sides:
        said = signed_sentences(loaded.model, texts)
        sided = np.asarray(said.any(axis=1))
        if sided.sum() >= FEWEST_PAIRS:
            images = MirroredScans(store, split, loaded.spec, loaded.path)
            images.table = table.iloc[np.flatnonzero(sided)].reset_index(drop=True)
            mirror = cached_embeddings(loaded, images, cache, batch)
            sided &= table["volume"].isin(list(mirror)).to_numpy()
            there = np.flatnonzero(sided)
            turned = np.stack([mirror[table["volume"].iloc[row]] for row in there])
            side[there], exchanged = side_scores(volumes[there] - turned, said[there], patients[there], seed=seed)
            exchanged = exchanged_alone(exchanged, swapped, len(there))
    copies = copied_pairs(store, table, volumes)
    first = [copies.get(scan) for scan in table["scan"]]
    scored = table[["volume", "patient", "scan"]].assign(
        score=np.where(pd.isna(first), pair_scores(match, side, swapped, exchanged), -np.inf),
        match=match,
        side=side,
        note=[
            f"copy of {scan}" if scan else "" if has_report else "no report"
            for scan, has_report in zip(first, known, strict=True)
        ],
        text=texts,
    )
    scored["worse_share"] = worse_share(scored["score"].to_numpy())
    informative = bool(np.quantile(match[known], 0.9) >= SURE)
    wrong = WrongPairs(swapped, exchanged * float(np.isfinite(side).sum() / known.sum()), informative)
    return scored.sort_values(["score", "volume"], ignore_index=True)[[*COLUMNS, "text"]], wrong


def _write_page(path: Path, store: VolumeStore, split: str, pairs: pd.DataFrame, wrong: WrongPairs) -> None:
    scored = pairs[pairs["note"] == ""]
    head = ["volume", "score", "match", "sides", "report"]
    columns = (scored[name].head(SHOWN) for name in ("volume", "score", "match", "side", "text"))
    rows = [
        [str(volume), f"{score:.1f}", f"{match:.1f}", "" if np.isnan(side) else f"{side:.1f}", str(text)[:400]]
        for volume, score, match, side, text in zip(*columns, strict=True)
    ]
    sections: list[dict[str, Any]] = [{
        "title": "Least plausible pairs", "table": [head, *rows],
        "words": "Match: log odds that a report belongs to its volume rather than to another. Sides: log odds that "
                 "left and right are correct rather than exchanged, where the report names a side. Both are estimated "
                 "from embeddings and the pairs of other patients. Below 0, compare the report with the volume.",
    }]  # fmt: skip
    headline = [
        *(
            [
                (f"{wrong.swapped:.1%}", "of the reports seem to belong to another volume"),
                (f"{wrong.exchanged:.1%}", f"seem to exchange left and right ({int(scored['side'].notna().sum()):,} name a side)"),
            ]
            if wrong.informative
            else [("unknown", "how many are wrong: the model does not distinguish these reports")]
        ),
        (f"{len(scored):,}", "pairs"),
        (f"{len(pairs) - len(scored):,}", "without a report, or copies of another"),
    ]  # fmt: skip
    write_page(path, title="Pairs of volume and report", subtitle=f"{store.path.name}, split {split}", headline=headline, sections=sections)  # fmt: skip
