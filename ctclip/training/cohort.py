"""The data of a run, recorded in its folder, so that a run cannot resume with other data unnoticed.

Names and reports are stored as hashes, because the run folder may be shared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ctclip.data.dataset import StoredVolumes
from ctclip.errors import TrainingError
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text

FILE = "cohort.json"


@dataclass
class Cohort:
    """The training volumes of a run."""

    volumes: dict[str, str]
    """at the latest start: hash of each volume, and of its report and labels"""
    seen: list[str] = field(default_factory=list)
    """hashes of all volumes that the weights were trained on"""
    patients: list[str] = field(default_factory=list)
    """hashes of the patients of these volumes"""


def open_cohort(folder: Path, data: StoredVolumes, *, learned: bool, force: bool = False) -> Cohort:
    """Compare ``data`` with the earlier training data of the run in ``folder``, and record it there.

    ``learned``: the weights of an earlier start are used, so its volumes count as training data. Raises TrainingError
    if volumes, reports or labels differ, unless forced.
    """
    path = folder / FILE
    now = _cohort_of(data)
    before = _read(path)
    if before is not None:
        changes = _changes(before.volumes, now.volumes)
        if changes and not force:
            raise TrainingError(
                f"{path}: this run was trained on other data than {data.store.path} holds now ({', '.join(changes)}). Name the "
                f"store it was trained on, choose another --output, or resume with the new data with --force"
            )
        if learned:
            now.seen = sorted({*now.seen, *before.seen})
            now.patients = sorted({*now.patients, *before.patients})
    write_text(path, json.dumps(asdict(now)))
    return now


def _cohort_of(data: StoredVolumes) -> Cohort:
    volumes: dict[str, str] = {}
    for row, (name, report) in enumerate(zip(data.table["volume"], data.reports, strict=True)):
        labels = "" if data.labels is None else str(data.labels[row].tolist())
        volumes[_hash(str(name))] = _hash(f"{report.text()}\0{labels}")
    return Cohort(volumes, sorted(volumes), sorted({_hash(str(patient)) for patient in data.table["patient"]}))


def _changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    both = before.keys() & now.keys()
    counts = {
        "volumes are gone": len(before.keys() - now.keys()),
        "volumes are new": len(now.keys() - before.keys()),
        "have another report or other labels": sum(before[name] != now[name] for name in both),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def _read(path: Path) -> Cohort | None:
    """Read the record; None if there is none, as in runs of earlier versions."""
    if not path.is_file():
        return None
    try:
        cohort = Cohort(**plain_json.read(path))
        _ = (cohort.volumes.items(), sorted([*cohort.seen, *cohort.patients]))
    except UNFIT as error:
        raise TrainingError(f"{path}: cannot be read ({error}); delete it to resume with the store's data") from error
    return cohort


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
