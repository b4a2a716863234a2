"""Find duplicate volumes, patients and reports in a cohort, including volumes that were altered after copying."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.audit.fingerprints import candidates, compare, compare_whole, fingerprint, slice_vectors
from ctclip.audit.measures import keep_array, kept_array
from ctclip.data.dataset import stored_volumes
from ctclip.inference.run import run_key
from ctclip.preprocessing.doubles import recurring_reports
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore

# Minimum correlation at 4 mm of two copies, and minimum correlation at 9 mm for a comparison at 4 mm. The measured
# distributions are in tests/benchmarks/RESULTS.md.
COPY, ALIKE = 0.8, 0.5
# Number of fingerprints per cached file, so that an interrupted command resumes.
TOGETHER = 256
NEAREST = 2
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

    Reconstructions of the same scan are not compared. ``cache``: a folder for fingerprints; ``embeddings``: unit
    vectors (dim,) by volume, whose nearest neighbours are compared too; ``least``: the minimum correlation of a copy.
    """
    table = stored_volumes(store, split)
    names = table["volume"].tolist()
    prints = fingerprints(store, names, cache)
    scans = pd.factorize(table["scan"])[0]
    near = set(candidates(slice_vectors(prints), scans, NEAREST))
    if embeddings is not None:
        near |= set(_nearest_embeddings(table["volume"].tolist(), embeddings, scans))
    ordered = sorted(near)
    likeness = compare(prints, ordered)
    near_enough = np.flatnonzero(likeness[:, 0] >= ALIKE)
    ordered = [ordered[index] for index in near_enough]
    orders = likeness[near_enough, 1].astype(bool).tolist()
    correlations = compare_closely(store, [(names[one], names[other]) for one, other in ordered], orders)
    return Doubles(_pairs(table, ordered, orders, correlations, least), _reports(table), len(table), len(near))


def compare_closely(store: VolumeStore, pairs: Sequence[tuple[str, str]], orders: Sequence[bool]) -> np.ndarray:
    """Correlation (pairs,) of two stored volumes at 4 mm; ``orders``: whether the slices of the second volume of each
    pair are reversed."""

    def closely(pair: tuple[str, str], is_reversed: bool) -> float:
        return compare_whole(store.read(pair[0]), store.read(pair[1]), store.spec, is_reversed)

    with ThreadPoolExecutor(2) as pool:
        return np.array(list(track(pool.map(closely, pairs, orders), len(pairs), "comparing", "pairs")))


def fingerprints(store: VolumeStore, volumes: Sequence[str], cache: Path) -> np.ndarray:
    """Fingerprints (n, d, h, w) float16 of the volumes, computed once and cached in ``cache``; returned as a memory
    map."""
    cache.mkdir(parents=True, exist_ok=True)
    checksums = [store.checksums(volume) for volume in volumes]
    whole = cache / f"{run_key(list(volumes), checksums, store.spec.hash)}.npy"
    kept = kept_array(whole, mapped=True)
    if kept is not None:
        return kept
    parts, arrays = [], []
    with ThreadPoolExecutor(2) as pool:
        for first in track(range(0, len(volumes), TOGETHER), -(-len(volumes) // TOGETHER), "fingerprints", "parts"):
            names, sums = volumes[first : first + TOGETHER], checksums[first : first + TOGETHER]
            parts.append(cache / f"part-{run_key(list(names), sums, store.spec.hash)}.npy")
            array = kept_array(parts[-1], mapped=True)
            if array is None:
                array = np.stack(list(pool.map(lambda name: fingerprint(store.read(name), store.spec), names)))
                keep_array(parts[-1], array)
            arrays.append(array)
    keep_array(whole, np.concatenate(arrays))
    for part in parts:
        part.unlink(missing_ok=True)
    loaded: np.ndarray = np.load(whole, mmap_mode="r")
    return loaded


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
