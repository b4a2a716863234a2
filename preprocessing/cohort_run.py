"""Preprocess a cohort into a store, in parallel, and resume after an interruption."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ctclip.preprocessing.cohorts import Cohort, hold_out, read_cohort
from ctclip.preprocessing.doubles import double_notes
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.facts import TableFacts, table_facts
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.linkage import check_linkage, write_linkage
from ctclip.preprocessing.outcomes import (
    OUTCOME_COLUMNS,
    Outcome,
    outcome_table,
    read_outcomes,
    write_outcomes,
)
from ctclip.preprocessing.parquet import write_parquet
from ctclip.preprocessing.pipeline import Reading, check_reading, prepare
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.sources import source_digest
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore, check_store_folder
from ctclip.preprocessing.workers import worker_pool

Task = tuple[str, Path, TableFacts, str | None]
# Note of a stored volume that identifies its source and options.
SOURCE = "source"


@dataclass(frozen=True)
class Report:
    """The outcome of each volume of a run, and notes on the cohort."""

    outcomes: list[Outcome]
    notes: list[str]
    unused: dict[str, int]


def preprocess_cohort(
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    spec: PreprocessingSpec,
    *,
    layout: str = "auto",
    reading: Reading | None = None,
    workers: int | None = None,
    shard: tuple[int, int] = (1, 1),
    calibration: float = 0.0,
    partial: bool = False,
    keep_no_chest: bool = False,
    labels: Sequence[str] | None = None,
    linkage: str | os.PathLike[str] | None = None,
) -> Report:
    """Preprocess every volume of a cohort into a store.

    Volumes that are already stored are kept, so that an interrupted run resumes. ``shard`` (i, n) processes every n-th
    volume, starting with the i-th; shards may run at the same time on one store. The fraction ``calibration`` of the
    training patients becomes a split of that name, which is never used in training. Volumes without a report and
    reports without a volume are refused unless ``partial``: then the former are kept without text, the latter left out.
    ``keep_no_chest`` and ``labels``: see ``read_cohort``. ``linkage``: path of the table that links ids to paths and
    studies; see ``ctclip.preprocessing.linkage``.
    """
    reading = reading or Reading()
    check_reading(**reading)
    check_store_folder(output)
    if linkage is not None:
        check_linkage(linkage, output)
    cohort = read_cohort(root, layout, labels=labels, keep_no_chest=keep_no_chest)
    table = hold_out(cohort.table, calibration)
    if cohort.unmatched and not partial:
        raise PreprocessingError(
            f"{root}: {', and '.join(cohort.unmatched)}; complete the cohort, or use --partial to accept it as it is"
        )
    for warning in [*cohort.warnings, *cohort.unmatched]:
        print(f"warning: {root}: {warning}")
    store = VolumeStore.create(output, spec)
    store.sweep()
    if linkage is not None:
        write_linkage(linkage, cohort.files, cohort.series)
    write_table(store, table)
    mine = table.iloc[shard[0] - 1 :: shard[1]]
    tasks = [
        (
            row["volume"],
            cohort.files[row["volume"]],
            table_facts({str(key): value for key, value in row.items()}),
            cohort.series.get(row["volume"]),
        )
        for row in mine.to_dict("records")
        if row["volume"] not in cohort.refused
    ]
    kept, changed = _kept(store, tasks, reading)
    if changed:
        print(
            f"warning: {output}: {len(changed)} stored volumes (first: {changed[0]}) come from other files, table "
            f"entries or options than those of this run: they are processed again"
        )
    outcomes = [*kept, *_not_read(cohort, set(mine["volume"]))]
    names = {outcome.volume for outcome in kept}
    due = [task for task in tasks if task[0] not in names]
    fresh = _all(due, store.path, reading, workers or len(os.sched_getaffinity(0)))
    outcomes += track(fresh, len(due), "preprocessing")
    write_outcomes(store, outcomes, shard)
    # For shards, only after merging, because each would check the whole store.
    doubles = double_notes(store, table) if shard == (1, 1) else []
    return Report(outcomes, [*cohort.notes, *doubles], dict(cohort.unused))


def _kept(store: VolumeStore, tasks: Sequence[Task], reading: Reading) -> tuple[list[Outcome], list[str]]:
    """Outcomes of stored volumes from their notes, and the names of volumes with another source. Stores of earlier
    versions have no such notes, only ``outcomes.csv``."""
    before, stored = read_outcomes(store), set(store.volumes)
    tasks = [task for task in tasks if task[0] in stored]

    def look(task: Task) -> tuple[dict[str, str], str]:
        name, path, facts, series = task
        own = store.notes(name)
        return own, source_digest(path, facts, _asked(reading, series)) if own.get(SOURCE) else ""

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        looked = list(pool.map(look, tasks))
    kept, changed = [], []
    for (name, *_), (own, source) in zip(tasks, looked, strict=True):
        if source and source != own[SOURCE]:
            changed.append(name)
        elif own:
            kept.append(Outcome.of_row(dict.fromkeys(OUTCOME_COLUMNS, "") | own | {"volume": name, "outcome": "done"}))
        else:
            kept.append(before.get(name, Outcome(name, None)))
    return kept, changed


def _asked(reading: Reading, series: str | None) -> Reading:
    """The requested series, else the one in the table."""
    return {**reading, "series": reading.get("series") or series}


def _not_read(cohort: Cohort, mine: set[str]) -> list[Outcome]:
    """Outcomes known without reading: volumes that the cohort lists as left out or refused."""
    refused = [Outcome(name, reason) for name, reason in cohort.refused.items() if name in mine]
    return refused + [Outcome(name, None, left_out=reason) for name, reason in cohort.left_out.items()]


def quarantine_damaged(path: str | os.PathLike[str]) -> list[str]:
    """Check every stored volume and move damaged ones to ``quarantine/``; return their ids."""
    store = VolumeStore(path)
    names = store.volumes
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        whole = list(track(pool.map(store.intact, names), len(names), "verifying"))
    damaged = [name for name, intact in zip(names, whole, strict=True) if not intact]
    for name in damaged:
        aside = store.path / "quarantine"
        aside.mkdir(exist_ok=True)
        # Another shard may have moved it in the meantime.
        with contextlib.suppress(FileNotFoundError):
            os.replace(store.file(name), aside / store.file(name).name)
    return damaged


def write_table(store: VolumeStore, table: pd.DataFrame) -> None:
    """Write the cohort table of a store atomically."""
    with written_beside(store.path / "cohort.parquet") as partial:
        write_parquet(partial, table)


def merge_shards(path: str | os.PathLike[str]) -> list[Outcome]:
    """Merge the outcome tables of shards into ``outcomes.csv``, without reading volumes. Raises PreprocessingError if a
    shard has not finished."""
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
        raise PreprocessingError(f"{store.path}: shard {missing[0]}/{total} has not finished; run it, then merge")
    table = pd.concat([outcome_table(path) for path in parts]).drop_duplicates("volume")
    absent = set(store.cohort["volume"]) - set(table["volume"])
    if absent:
        raise PreprocessingError(
            f"{store.path}: no shard lists an outcome for {sorted(absent)[0]!r}; run the shards again"
        )
    outcomes = [Outcome.of_row(row) for row in table.to_dict("records")]
    write_outcomes(store, outcomes, (1, 1))
    return outcomes


def _all(due: list[Task], store: Path, reading: Reading, workers: int) -> Iterator[Outcome]:
    """Outcomes in order of completion. A scan that kills its process is refused; the others continue."""
    if workers == 1 or len(due) < 2:
        for task in due:
            yield _one(task, store, reading)
        return
    while due:
        left = dict.fromkeys(due)
        try:
            for task, outcome in _in_parallel(due, store, reading, workers):
                del left[task]
                yield outcome
        except BrokenProcessPool:
            # It is one of the first remaining tasks: workers take tasks in order and prefetch few.
            suspects = list(left)[: 2 * workers + 1]
            for task in suspects:
                try:
                    yield next(_in_parallel([task], store, reading, 1))[1]
                except BrokenProcessPool:
                    yield Outcome(
                        task[0], f"{task[0]}: reading it killed the process (damaged, or too large for memory)"
                    )
                del left[task]
        due = list(left)


def _in_parallel(due: list[Task], store: Path, reading: Reading, workers: int) -> Iterator[tuple[Task, Outcome]]:
    with worker_pool(workers) as pool:
        futures = {pool.submit(_one, task, store, reading): task for task in due}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _one(task: Task, store: Path, reading: Reading) -> Outcome:
    name, path, table, series = task
    target = VolumeStore(store)
    try:
        chosen = _asked(reading, series)
        ready = prepare(path, target.spec, table=table, **chosen)
    except PreprocessingError as error:
        return Outcome(name, str(error))
    except Exception as error:
        # A bug of ours in one scan must not end a run of fifty thousand. Messages of libraries may quote the header.
        return Outcome(name, f"{name}: could not be prepared ({type(error).__name__}); please report this as a fault")
    spacing = " x ".join(f"{step:.2f}" for step in ready.source_spacing)
    done = Outcome(name, None, tuple(ready.warnings), spacing, " x ".join(map(str, ready.source_shape)))
    try:
        # A killed run writes no outcomes.csv, so the outcome of a volume is saved with it.
        target.write(name, ready.stored, {**done.row(), SOURCE: source_digest(path, table, chosen)})
    except PreprocessingError as error:
        return Outcome(name, str(error))
    return done
