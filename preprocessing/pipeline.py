"""One scan, or many: read, check, orient, resample, store. A scan that cannot be trusted is refused aloud."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from ctclip.preprocessing.cohorts import hold_out, read_cohort
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.geometry import orient, resample, resampled_affine
from ctclip.preprocessing.geometry_check import Geometry, settle
from ctclip.preprocessing.hounsfield import Rescale, Trust, check_chest, to_hu
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import Volume
from ctclip.preprocessing.workers import worker_pool

Expect = Literal["chest", "any"]
OUTCOME_COLUMNS = ("volume", "outcome", "reason", "source_spacing", "source_shape")


@dataclass
class Prepared:
    """One scan, ready for a model of ``spec``.

    ``scan`` is what was read and checked, oriented and in HU, on its own grid. ``affine`` (4, 4) leads from voxel index
    (of ``voxels`` and ``hu``) to LPS+ mm of the scan's own space.
    """

    scan: Volume
    spec: PreprocessingSpec
    affine: np.ndarray

    @cached_property
    def voxels(self) -> np.ndarray:
        """What a model is given: float32 in [-1, 1], of the spec's shape."""
        return resample(self.scan, self.spec, "voxels")

    @cached_property
    def hu(self) -> np.ndarray:
        """The same grid in HU, float32."""
        return resample(self.scan, self.spec)

    def token_affine(self, affine: np.ndarray) -> np.ndarray:
        """``Encoded.affine`` (token index to mm of the prepared volume) -> (4, 4) from token index to LPS+ mm of the
        scan's own space."""
        depth, row, column = self.spec.spacing
        along = (depth, column, row) if self.spec.published_geometry else (depth, row, column)
        to_voxels: np.ndarray = np.diag([*(1 / step for step in along), 1.0])
        leads: np.ndarray = self.affine @ to_voxels @ affine
        return leads

    @property
    def warnings(self) -> list[str]:
        return self.scan.warnings

    @property
    def source_spacing(self) -> tuple[float, float, float]:
        """mm along [slice, row, column] of the scan itself."""
        return self.scan.spacing

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.scan.array.shape


def prepare(
    path: str | os.PathLike[str],
    spec: PreprocessingSpec | str = "ct_clip",
    *,
    trust: Trust = "auto",
    expect: Expect = "any",
    table: Rescale | None = None,
    series: str | None = None,
    geometry: Geometry = "auto",
) -> Prepared:
    """Read one scan and bring it to ``spec``: exactly what made the training set.

    Raises PreprocessingError with one line that names the file, what is wrong and what to do.
    """
    spec = spec if isinstance(spec, PreprocessingSpec) else PreprocessingSpec.load(spec)
    volume = settle(read(path, series, geometry), None, geometry)
    volume = orient(to_hu(volume, table, trust))
    if expect == "chest" and (reason := check_chest(volume)):
        raise PreprocessingError(f"{volume.source}: {reason}; --expect any takes it all the same")
    return Prepared(volume, spec, resampled_affine(volume, spec))


@dataclass(frozen=True)
class Outcome:
    """What became of one volume: refused with a reason, or done."""

    volume: str
    refused: str | None
    warnings: tuple[str, ...] = ()
    source_spacing: str = ""
    source_shape: str = ""


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
    partial: bool = False,
) -> list[Outcome]:
    """Bring every volume of a cohort into a store and return what became of each.

    Volumes that are stored already are kept, so a run that was interrupted continues. ``shard`` (i, n) takes
    every n-th volume from the i-th on: shards may run at once on one store. ``calibration`` of the training patients
    become a split of that name, which training never sees. Volumes without a report and reports without a volume are
    refused unless ``partial``: then the former are kept without text, the latter left out.
    """
    options = options or Options()
    cohort = read_cohort(root, layout)
    table = hold_out(cohort.table, calibration)
    if cohort.unmatched and not partial:
        raise PreprocessingError(
            f"{root}: {', and '.join(cohort.unmatched)}; complete the cohort, or say --partial to take what is there"
        )
    for warning in [*cohort.warnings, *cohort.unmatched]:
        print(f"warning: {root}: {warning}")
    store = VolumeStore.create(output, spec)
    store.sweep()
    write_table(store, table)
    mine = table.iloc[shard[0] - 1 :: shard[1]]
    there = set(store.volumes)
    due = [
        (row["volume"], cohort.files[row["volume"]], Rescale(row["rescale_slope"], row["rescale_intercept"]))
        for row in mine.to_dict("records")
        if row["volume"] not in there
    ]
    before = read_outcomes(store)
    outcomes = [before.get(name, Outcome(name, None)) for name in mine["volume"] if name in there]
    made = _all(due, store.path, options, workers or len(os.sched_getaffinity(0)))
    outcomes += track(made, len(due), "preprocessing")
    write_outcomes(store, outcomes, shard)
    return outcomes


def quarantine_damaged(path: str | os.PathLike[str]) -> list[str]:
    """Check every stored volume; damaged ones are moved to ``quarantine/``. Returns their ids."""
    store = VolumeStore(path)
    names = store.volumes
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        whole = list(track(pool.map(store.intact, names), len(names), "verifying"))
    damaged = [name for name, intact in zip(names, whole, strict=True) if not intact]
    for name in damaged:
        aside = store.path / "quarantine"
        aside.mkdir(exist_ok=True)
        # Another shard may have set it aside in the meantime.
        with contextlib.suppress(FileNotFoundError):
            os.replace(store.file(name), aside / store.file(name).name)
    return damaged


def write_table(store: VolumeStore, table: pd.DataFrame) -> None:
    """The cohort table of a store, whole or not at all."""
    with written_beside(store.path / "cohort.parquet") as partial:
        table.to_parquet(partial, index=False)


def outcomes_name(shard: tuple[int, int] = (1, 1)) -> str:
    """The file of a store that says what became of the volumes of a run, or of one shard of it."""
    return "outcomes.csv" if shard[1] == 1 else f"outcomes-{shard[0]}-of-{shard[1]}.csv"


def write_outcomes(store: VolumeStore, outcomes: Iterable[Outcome], shard: tuple[int, int]) -> None:
    """``outcomes[-i-of-n].csv``: each volume done, or refused and why."""
    rows = [
        {
            "volume": o.volume,
            "outcome": "refused" if o.refused else "done",
            "reason": o.refused or "; ".join(o.warnings),
            "source_spacing": o.source_spacing,
            "source_shape": o.source_shape,
        }
        for o in sorted(outcomes, key=lambda outcome: outcome.volume)
    ]
    with written_beside(store.path / outcomes_name(shard)) as partial:
        pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS)).to_csv(partial, index=False)
    if shard[1] == 1:
        # Said of every volume now: what shards said is history, and must not be merged with shards to come.
        for part in store.path.glob("outcomes-*-of-*.csv"):
            part.unlink(missing_ok=True)


def read_outcomes(store: VolumeStore) -> dict[str, Outcome]:
    """What earlier runs and shards wrote of the volumes that were done."""
    found: dict[str, Outcome] = {}
    for path in sorted(store.path.glob("outcomes*.csv")):
        table = pd.read_csv(path, dtype=str, keep_default_na=False).reindex(
            columns=list(OUTCOME_COLUMNS), fill_value=""
        )
        for row in table[table["outcome"] == "done"].itertuples():
            warnings = tuple(str(row.reason).split("; ")) if row.reason else ()
            found[str(row.volume)] = Outcome(
                str(row.volume), None, warnings, str(row.source_spacing), str(row.source_shape)
            )
    return found


def merge_shards(path: str | os.PathLike[str]) -> list[Outcome]:
    """One ``outcomes.csv`` of the shards' own; no volume is read. Refuses while a shard has not ended."""
    store = VolumeStore(path)
    parts = sorted(store.path.glob("outcomes-*-of-*.csv"))
    totals = {path.stem.rpartition("-")[2] for path in parts}
    if len(totals) != 1:
        raise PreprocessingError(
            f"{store.path}: {'no shards' if not parts else 'shards of different counts'} to merge; run every "
            f"`--shard i/n` of one n first"
        )
    total = int(totals.pop())
    missing = [i for i in range(1, total + 1) if not (store.path / f"outcomes-{i}-of-{total}.csv").is_file()]
    if missing:
        raise PreprocessingError(f"{store.path}: shard {missing[0]}/{total} has not ended; run it, then merge")
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in parts]
    table = pd.concat(tables).reindex(columns=list(OUTCOME_COLUMNS), fill_value="").drop_duplicates("volume")
    absent = set(store.cohort["volume"]) - set(table["volume"])
    if absent:
        raise PreprocessingError(f"{store.path}: no shard says what became of {sorted(absent)[0]!r}; run them again")
    outcomes = []
    for row in table.itertuples():
        refused = str(row.reason) if row.outcome == "refused" else None
        warnings = tuple(str(row.reason).split("; ")) if refused is None and row.reason else ()
        outcomes.append(Outcome(str(row.volume), refused, warnings, str(row.source_spacing), str(row.source_shape)))
    write_outcomes(store, outcomes, (1, 1))
    return outcomes


Task = tuple[str, Path, Rescale]


def _all(due: list[Task], store: Path, options: Options, workers: int) -> Iterator[Outcome]:
    """Outcomes in the order in which they end. A scan that kills its process is refused; the others go on."""
    if workers == 1 or len(due) < 2:
        for task in due:
            yield _one(task, store, options)
        return
    while due:
        left = dict.fromkeys(due)
        try:
            for task, outcome in _in_parallel(due, store, options, workers):
                del left[task]
                yield outcome
        except BrokenProcessPool:
            # One of the first that are left: workers take tasks in order, and hold few ahead.
            suspects = list(left)[: 2 * workers + 1]
            for task in suspects:
                try:
                    yield next(_in_parallel([task], store, options, 1))[1]
                except BrokenProcessPool:
                    yield Outcome(
                        task[0], f"{task[0]}: reading it killed the process (damaged, or too large for memory)"
                    )
                del left[task]
        due = list(left)


def _in_parallel(due: list[Task], store: Path, options: Options, workers: int) -> Iterator[tuple[Task, Outcome]]:
    pool = worker_pool(workers)
    try:
        futures = {pool.submit(_one, task, store, options): task for task in due}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # A full disk or Ctrl-C must not wait for tens of thousands of tasks that are queued.
        pool.shutdown(cancel_futures=True)


def _one(task: Task, store: Path, options: Options) -> Outcome:
    name, path, table = task
    target = VolumeStore(store)
    try:
        ready = prepare(
            path, target.spec, trust=options.trust, expect=options.expect, table=table, series=options.series
        )
    except PreprocessingError as error:
        return Outcome(name, str(error))
    except Exception as error:
        # A fault of ours in one scan must not end a run of fifty thousand; what libraries say may quote its header.
        return Outcome(name, f"{name}: could not be prepared ({type(error).__name__}); please report this as a fault")
    try:
        target.write(name, resample(ready.scan, target.spec, "stored"))
    except PreprocessingError as error:
        return Outcome(name, str(error))
    spacing = " x ".join(f"{step:.2f}" for step in ready.source_spacing)
    return Outcome(name, None, tuple(ready.warnings), spacing, " x ".join(map(str, ready.source_shape)))
