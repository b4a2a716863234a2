"""Find volumes and reports that occur twice in a cohort, without comparing images."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.store import VolumeStore

# Shorter reports ("Normal.") recur without being copies.
FEWEST_WORDS = 15


def same_voxels(store: VolumeStore, volumes: Iterable[str]) -> list[list[str]]:
    """Groups of stored volumes whose voxels have the same checksums; a volume that cannot be opened is skipped."""

    def checksums(volume: str) -> tuple[int, ...] | None:
        try:
            return store.checksums(volume)
        except PreprocessingError:
            return None

    names = list(volumes)
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, key in zip(names, pool.map(checksums, names), strict=True):
            if key is not None:
                groups[key].append(name)
    return [group for group in groups.values() if len(group) > 1]


def recurring_reports(table: pd.DataFrame) -> list[list[str]]:
    """Groups of scans of different patients whose findings and impression are identical, the largest groups first.

    ``table``: a cohort table. Reports of fewer than ``FEWEST_WORDS`` words are left out.
    """
    scans = table.drop_duplicates("scan")
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in scans[["scan", "patient", "findings", "impression"]].itertuples(index=False):
        words = re.findall(r"\w+", f"{row.findings} {row.impression}".casefold())
        if len(words) >= FEWEST_WORDS:
            groups[" ".join(words)].append((str(row.scan), str(row.patient)))
    recurring = [group for group in groups.values() if len({patient for _, patient in group}) > 1]
    return [[scan for scan, _ in group] for group in sorted(recurring, key=len, reverse=True)]


def double_notes(store: VolumeStore, table: pd.DataFrame) -> list[str]:
    """One line on volumes of different scans with identical voxels, and one on identical reports of different
    patients, if there are any."""
    scans = dict(zip(table["volume"], table["scan"], strict=True))
    stored = set(store.volumes)
    copies = [
        group
        for group in same_voxels(store, [name for name in table["volume"] if name in stored])
        if len({scans[name] for name in group}) > 1
    ]
    reports = recurring_reports(table)
    notes = []
    if copies:
        notes.append(
            f"{sum(map(len, copies))} volumes of different scans have the same voxels (the first: {copies[0][0]} and "
            f"{copies[0][1]}); `ctclip audit doubles` lists these and altered copies"
        )
    if reports:
        notes.append(
            f"{sum(map(len, reports))} scans share their report, word for word, with another patient's (the first: "
            f"{reports[0][0]} and {reports[0][1]}); `ctclip audit doubles` lists them"
        )
    return notes
