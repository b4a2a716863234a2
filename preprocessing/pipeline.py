"""One scan, or many: read, check, orient, resample, store. A scan that cannot be trusted is refused aloud."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from preprocessing.cohorts import hold_out, read_cohort
from preprocessing.errors import PreprocessingError
from preprocessing.files import written_beside
from preprocessing.geometry import orient, resample
from preprocessing.hounsfield import Rescale, Trust, check_chest, to_hu
from preprocessing.progress import track
from preprocessing.readers import read
from preprocessing.spec import PreprocessingSpec
from preprocessing.store import VolumeStore

Expect = Literal["chest", "any"]


@dataclass
class Prepared:
    """One scan, ready for a model of ``spec``.

    ``voxels`` float32 [slice, row, column] in [-1, 1]; ``hu`` the same grid in HU; ``affine`` (4, 4) from voxel
    index (slice, row, column, 1) to LPS+ mm of the scan's own space.
    """

    voxels: np.ndarray
    hu: np.ndarray
    spec: PreprocessingSpec
    affine: np.ndarray
    warnings: list[str] = field(default_factory=list)


def prepare(
    path: str | os.PathLike[str],
    spec: PreprocessingSpec | str = "ct_clip",
    *,
    trust: Trust = "auto",
    expect: Expect = "any",
    table: Rescale | None = None,
    series: str | None = None,
) -> Prepared:
    """Read one scan and bring it to ``spec``: exactly what made the training set.

    Raises PreprocessingError with one line that names the file, what is wrong and what to do.
    """
    spec = spec if isinstance(spec, PreprocessingSpec) else PreprocessingSpec.load(spec)
    volume = orient(to_hu(read(path, series), table, trust))
    if expect == "chest" and (reason := check_chest(volume)):
        raise PreprocessingError(f"{volume.source}: {reason}; --expect any takes it all the same")
    hu, affine = resample(volume, spec)
    return Prepared(spec.normalise(hu), hu, spec, affine, volume.warnings)


@dataclass(frozen=True)
class Outcome:
    """What became of one volume: refused with a reason, or done."""

    volume: str
    refused: str | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How scans are read."""

    trust: Trust = "auto"
    expect: Expect = "any"
    series: str | None = None


def preprocess_cohort(
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    spec: PreprocessingSpec,
    *,
    layout: str = "auto",
    options: Options | None = None,
    workers: int | None = None,
    shard: tuple[int, int] = (1, 1),
    calibration: float = 0.0,
) -> list[Outcome]:
    """Bring every volume of a cohort into a store and return what became of each.

    Volumes that are stored already are kept, so a run that was interrupted continues. ``shard`` (i, n) takes
    every n-th volume from the i-th on: shards may run at once on one store. ``calibration`` of the training patients
    become a split of that name, which training never sees.
    """
    options = options or Options()
    table, warnings = read_cohort(root, layout)
    table = hold_out(table, calibration)
    for warning in warnings:
        print(f"warning: {root}: {warning}")
    store = VolumeStore.create(output, spec)
    write_table(store, table)
    mine = table.iloc[shard[0] - 1 :: shard[1]]
    there = set(store.volumes)
    base = Path(root) if Path(root).is_dir() else Path(root).parent
    due = [
        (str(row["volume"]), base / str(row["path"]), Rescale(row["rescale_slope"], row["rescale_intercept"]))
        for row in mine.to_dict("records")
        if row["volume"] not in there
    ]
    outcomes = [Outcome(name, None) for name in mine["volume"] if name in there]
    made = _all(due, store.path, options, workers or len(os.sched_getaffinity(0)))
    outcomes += track(made, len(due), "preprocessing")
    write_outcomes(store, outcomes, shard)
    return outcomes


def quarantine_damaged(path: str | os.PathLike[str]) -> list[str]:
    """Check every stored volume; damaged ones are moved to ``quarantine/``. Returns their ids."""
    store = VolumeStore(path)
    names = store.volumes
    damaged = [name for name in track(names, len(names), "verifying") if not store.intact(name)]
    for name in damaged:
        aside = store.path / "quarantine"
        aside.mkdir(exist_ok=True)
        os.replace(store.file(name), aside / store.file(name).name)
    return damaged


def write_table(store: VolumeStore, table: pd.DataFrame) -> None:
    """The cohort table of a store, whole or not at all."""
    with written_beside(store.path / "cohort.parquet") as partial:
        table.to_parquet(partial, index=False)


def write_outcomes(store: VolumeStore, outcomes: Iterable[Outcome], shard: tuple[int, int]) -> None:
    """``outcomes[-i-of-n].csv``: each volume done, or refused and why."""
    name = "outcomes.csv" if shard[1] == 1 else f"outcomes-{shard[0]}-of-{shard[1]}.csv"
    rows = [
        {
            "volume": o.volume,
            "outcome": "refused" if o.refused else "done",
            "reason": o.refused or "; ".join(o.warnings),
        }
        for o in sorted(outcomes, key=lambda outcome: outcome.volume)
    ]
    with written_beside(store.path / name) as partial:
        pd.DataFrame(rows, columns=["volume", "outcome", "reason"]).to_csv(partial, index=False)


def _all(due: list[tuple[str, Path, Rescale]], store: Path, options: Options, workers: int) -> Iterator[Outcome]:
    if workers == 1 or len(due) < 2:
        for task in due:
            yield _one(task, store, options)
        return
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(_one, task, store, options) for task in due]
        for future in as_completed(futures):
            yield future.result()


def _one(task: tuple[str, Path, Rescale], store: Path, options: Options) -> Outcome:
    name, path, table = task
    target = VolumeStore(store)
    try:
        ready = prepare(
            path, target.spec, trust=options.trust, expect=options.expect, table=table, series=options.series
        )
        target.write(name, ready.hu)
    except PreprocessingError as error:
        return Outcome(name, str(error))
    return Outcome(name, None, tuple(ready.warnings))
