"""Find duplicate volumes, patients and reports in a cohort, including volumes that were altered after copying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.audit.fingerprints import (
    Detail,
    candidates,
    compare,
    compare_whole,
    correlation,
    fine_detail,
    fingerprint,
    middles_differ,
    slice_vectors,
)
from ctclip.audit.pictures import pictures
from ctclip.data.dataset import stored_volumes
from ctclip.preprocessing.doubles import recurring_reports
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore

# Minimum correlation at 4 mm of two copies, and minimum correlation at 9 mm for a comparison at 4 mm. The measured
# distributions are in tests/benchmarks/RESULTS.md.
COPY, ALIKE = 0.78, 0.5
NEAREST = 3
COLUMNS = (
    "first", "second", "correlation", "reversed", "first_patient", "second_patient", "first_split", "second_split", "is",
)  # fmt: skip


@dataclass(frozen=True)
class Doubles:
    """``pairs``: one row per pair of volumes (``COLUMNS``), the most similar first; ``reports``: one row per report
    that also occurs under another patient (scans, patients, splits); ``volumes``: number of volumes; ``compared``:
    number of pairs compared at 4 mm."""

    pairs: pd.DataFrame
    reports: pd.DataFrame
    volumes: int
    compared: int


def find_doubles(
    store: VolumeStore,
    cache: Path,
    *,
    split: str | None = None,
    embeddings: dict[str, np.ndarray] | None = None,
    least: float = COPY,
) -> Doubles:
    """Find pairs of volumes from different scans that are copies of each other, and reports that occur under several
    patients.

    Reconstructions of the same scan are not compared. ``cache``: a folder for ``pictures``; ``embeddings``: unit
    vectors (dim,) by volume, whose nearest neighbours are compared too; ``least``: the minimum correlation of a copy.
    """
    table = stored_volumes(store, split)
    names = table["volume"].tolist()
    taken = pictures(store, names, cache)
    scans = pd.factorize(table["scan"])[0]
    near = set(candidates(slice_vectors(taken.prints), scans, NEAREST))
    if embeddings is not None:
        near |= set(_nearest_embeddings(table["volume"].tolist(), embeddings, scans))
    ordered = sorted(near)
    likeness = compare(taken.prints, ordered)
    near_enough = np.flatnonzero(likeness[:, 0] >= ALIKE)
    ordered = [ordered[index] for index in near_enough]
    orders = likeness[near_enough, 1].astype(bool).tolist()

    # Pairs are sorted by their first volume.
    @lru_cache(maxsize=16)
    def whole(row: int) -> Detail:
        return fine_detail(store.read(names[row]), store.spec)

    correlations = compare_closely(whole, taken.middles, ordered, orders)
    return Doubles(_pairs(table, ordered, orders, correlations, least), _reports(table), len(table), len(near))


def compare_closely(
    whole: Callable[[int], Detail],
    middles: Sequence[np.ndarray],
    pairs: Sequence[tuple[int, int]],
    orders: Sequence[bool],
) -> np.ndarray:
    """Correlation (pairs,) of two volumes at 4 mm, 0 if their ``middles`` differ. ``whole``: returns the ``fine_detail`` of
    a volume; ``orders``: whether the slices of the second volume of each pair are reversed."""

    def closely(pair: tuple[int, int], is_reversed: bool) -> float:
        one, other = pair
        if middles_differ(middles[one], middles[other], is_reversed):
            return 0.0
        return compare_whole(whole(one), whole(other), is_reversed)

    with ThreadPoolExecutor(2) as pool:
        return np.array(list(track(pool.map(closely, pairs, orders), len(pairs), "comparing", "pairs")))


def copied_pairs(store: VolumeStore, table: pd.DataFrame, vectors: np.ndarray) -> dict[str, str]:
    """Find scans with the same report as another patient's scan, word for word, and a copy of its volume. Returns the first
    such scan for each.

    ``table``: rows of a cohort table; ``vectors`` (n, dim): unit vectors of the volumes. Each volume is compared with its
    nearest neighbours among those with the same report.
    """
    rows = {scan: row for row, scan in reversed(list(enumerate(table["scan"])))}
    copies: dict[str, str] = {}
    for group in recurring_reports(table):
        of_group = np.array(sorted(rows[scan] for scan in group))
        names = dict(enumerate(table["volume"].iloc[of_group]))
        near = _nearest_embeddings(list(names.values()), dict(zip(names.values(), vectors[of_group], strict=True)), np.arange(len(of_group)))  # fmt: skip
        for one, other in sorted(set(near)):
            first, second = (store.read(names[place]) for place in (one, other))
            _, is_reversed = correlation(fingerprint(first, store.spec), fingerprint(second, store.spec))
            fine = [fine_detail(hu, store.spec) for hu in (first, second)]
            if compare_whole(fine[0], fine[1], is_reversed) >= COPY:
                scans = [str(table["scan"].iloc[of_group[place]]) for place in (one, other)]
                copies.setdefault(scans[1], copies.get(scans[0], scans[0]))
    return copies


def _nearest_embeddings(
    volumes: Sequence[str], embeddings: dict[str, np.ndarray], scans: np.ndarray
) -> list[tuple[int, int]]:
    """For each volume with an embedding, pairs with its nearest neighbours from other scans."""
    rows = np.array([row for row, name in enumerate(volumes) if name in embeddings])
    vectors = np.stack([embeddings[volumes[row]] for row in rows])
    pairs = []
    for place, row in enumerate(rows):
        similarity = vectors @ vectors[place]
        similarity[scans[rows] == scans[row]] = -np.inf
        nearest = rows[np.argsort(-similarity)[:NEAREST]]
        pairs += [(min(int(row), int(other)), max(int(row), int(other))) for other in nearest if other != row]
    return pairs


def _pairs(
    table: pd.DataFrame,
    ordered: Sequence[tuple[int, int]],
    orders: Sequence[bool],
    correlations: np.ndarray,
    least: float,
) -> pd.DataFrame:
    rows = []
    for (one, other), is_reversed, value in zip(ordered, orders, correlations, strict=True):
        if value < least:
            continue
        first, second = table.iloc[one], table.iloc[other]
        rows.append(
            (first["volume"], second["volume"], round(float(value), 4), int(is_reversed), first["patient"],
             second["patient"], first["split"], second["split"], _fault(first, second))
        )  # fmt: skip
    pairs = pd.DataFrame(rows, columns=list(COLUMNS))
    return pairs.sort_values(["correlation", "first", "second"], ascending=[False, True, True], ignore_index=True)


def _fault(first: pd.Series, second: pd.Series) -> str:
    """Describe the error that a pair of copies causes, the most serious first."""
    faults = []
    if first["split"] != second["split"]:
        faults.append("two splits")
    if first["patient"] != second["patient"]:
        faults.append("two patients")
    return f"one scan under {' and '.join(faults)}" if faults else "two scans of one patient"


def _reports(table: pd.DataFrame) -> pd.DataFrame:
    by_scan = table.drop_duplicates("scan").set_index("scan")
    rows = [
        (
            "; ".join(map(str, group)),
            by_scan.loc[group, "patient"].nunique(),
            "; ".join(sorted(set(by_scan.loc[group, "split"]))),
            len(group),
        )
        for group in recurring_reports(table)
    ]
    return pd.DataFrame(rows, columns=["scans", "patients", "splits", "count"])
