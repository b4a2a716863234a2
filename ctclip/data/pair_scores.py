"""Scores of pairs of volume and report, saved in a store by `ctclip filter-pairs` and read in training."""

from __future__ import annotations

import pandas as pd

from ctclip.errors import DataError
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.parquet import write_parquet
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import read_own_parquet

FILE = "pair_scores.parquet"


def write_pair_scores(store: VolumeStore, scores: pd.DataFrame) -> None:
    """Save a table with columns volume, score, worse_share; rows of other volumes stay unchanged."""
    path = store.path / FILE
    if path.is_file():
        earlier = read_pair_scores(store)
        scores = pd.concat([earlier[~earlier["volume"].isin(scores["volume"])], scores], ignore_index=True)
    with written_beside(path) as partial:
        write_parquet(partial, scores)


def read_pair_scores(store: VolumeStore) -> pd.DataFrame:
    """The table that ``write_pair_scores`` saved. Raises DataError if there is none, and
    PreprocessingError if it is damaged."""
    path = store.path / FILE
    if not path.is_file():
        raise DataError(f"{store.path}: its pairs have no scores yet; `ctclip filter-pairs --keep` writes them")
    remedy = "delete it, and run `ctclip filter-pairs --keep` again"
    return read_own_parquet(path, remedy, texts=("volume",), numbers=("score", "worse_share"))


def good_pairs(table: pd.DataFrame, store: VolumeStore, least: float | None, best_share: float | None) -> pd.DataFrame:
    """The volumes whose pair has a score of at least ``least`` and belongs to the best fraction ``best_share`` of the
    pairs scored with it; all volumes if both are None. Raises DataError if a volume has no score, or none is left."""
    if least is None and best_share is None:
        return table
    scores = read_pair_scores(store).set_index("volume").reindex(table["volume"])
    unknown = table["volume"][scores["score"].isna().to_numpy()]
    if len(unknown):
        raise DataError(
            f"{store.path}: {len(unknown)} volumes, the first {unknown.iloc[0]!r}, have no pair score; run `ctclip "
            f"filter-pairs --keep` on their split"
        )
    kept = (scores["score"] >= (least if least is not None else -float("inf"))).to_numpy()
    if best_share is not None:
        kept = kept & (scores["worse_share"] >= 1 - best_share).to_numpy()
    if not kept.any():
        raise DataError(f"{store.path}: no pair meets data.min_pair_score and data.best_pairs; lower them")
    return table[kept].reset_index(drop=True)
