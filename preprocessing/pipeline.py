"""Preprocessing of one scan or many: read, check, orient, resample, store. Scans that cannot be trusted are
refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd

from ctclip.preprocessing.anatomy import Lungs, find_lungs, no_chest, orientation_doubt
from ctclip.preprocessing.cohorts import Cohort, hold_out, read_cohort
from ctclip.preprocessing.doubles import double_notes
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.facts import TableFacts, placed, table_facts
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.geometry import Centre, bounds, orient, resample, resampled_affine
from ctclip.preprocessing.geometry_check import Geometry
from ctclip.preprocessing.hounsfield import Trust, to_hu
from ctclip.preprocessing.linkage import check_linkage, write_linkage
from ctclip.preprocessing.outcomes import (
    OUTCOME_COLUMNS,
    Outcome,
    outcome_table,
    read_outcomes,
    write_outcomes,
)
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.readers import LARGEST_GB, read
from ctclip.preprocessing.sources import source_digest
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore, check_store_folder
from ctclip.preprocessing.volume import FileGrid, Volume
from ctclip.preprocessing.workers import worker_pool

# ``chest`` refuses what shows none, ``auto`` warns of it, ``any`` does not look.
Expect = Literal["auto", "chest", "any"]
# Slices so many times further apart than the spec's leave out what a model has learned to see.
COARSER = 2.5
# Less than this of the lungs outside of the grid is the thickness of its edge.
LUNG_CUT = 0.01
# Under ``--expect chest``.
LEAST_LUNG = 0.9


@dataclass
class Prepared:
    """One scan, ready for a model of ``spec``.

    ``scan`` is what was read and checked, oriented and in HU, on its own grid. ``affine`` (4, 4) leads from voxel index
    (of ``voxels`` and ``hu``) to LPS+ mm of the scan's own space. ``centre``: the voxel index of the scan that the grid is
    laid about, where that is not its middle. ``file_grid``: the grid of the file itself, before it was oriented.
    ``headers``: those of the images of a DICOM series, in the order of slices of ``file_grid``, if ``prepare`` was asked for
    them.
    """

    scan: Volume
    spec: PreprocessingSpec
    affine: np.ndarray
    file_grid: FileGrid
    centre: Centre | None = None
    headers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @cached_property
    def voxels(self) -> np.ndarray:
        """What a model is given: float32 in [-1, 1], of the spec's shape."""
        return resample(self.scan, self.spec, "voxels", self.centre)

    @cached_property
    def hu(self) -> np.ndarray:
        """The same grid in HU, float32."""
        return resample(self.scan, self.spec, "hu", self.centre)

    @cached_property
    def lungs(self) -> Lungs:
        """The lungs of the oriented scan, or what comes nearest to them."""
        return find_lungs(self.scan)

    @property
    def stored(self) -> np.ndarray:
        """The same grid in HU, int16, as a store keeps it."""
        return resample(self.scan, self.spec, "stored", self.centre)

    @property
    def affine_lps(self) -> np.ndarray:
        """``affine`` by its convention's name: voxel index to LPS+ mm, as DICOM and SimpleITK count."""
        return self.affine

    @property
    def affine_ras(self) -> np.ndarray:
        """(4, 4) from voxel index to RAS+ mm, as NIfTI and nibabel count."""
        ras: np.ndarray = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        return ras

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``hu`` as NIfTI (int16) that lies where the scan lies: it opens over the scan in any viewer.

        Raises PreprocessingError unless the name ends in .nii or .nii.gz.
        """
        import nibabel as nib

        name = str(path)
        if not name.endswith((".nii", ".nii.gz")):
            raise PreprocessingError(f"{path}: end the name in .nii.gz (or .nii)")
        # Files count columns first.
        image = nib.Nifti1Image(self.stored.transpose(2, 1, 0), self.affine_ras[:, [2, 1, 0, 3]])
        image.header.set_xyzt_units("mm")
        image.set_qform(image.affine, 1)
        image.set_sform(image.affine, 1)
        with written_beside(path, suffix=".nii.gz" if name.endswith(".gz") else ".nii") as partial:
            nib.save(image, partial)

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


Task = tuple[str, Path, TableFacts, str | None]
# The note of a stored volume that says what it was made from.
SOURCE = "source"


class Reading(TypedDict, total=False):
    """How scans are read, as the options of the command line: ``hu``, where Hounsfield units come from; what to ``expect`` of
    scans; which ``series`` (UID) of a DICOM folder; which ``geometry`` if statements contradict each other; ``largest_gb`` of
    voxels, or of the contents of an archive.
    ``headers``: keep the headers of a DICOM series' images, which identify the patient.
    """

    hu: Trust
    expect: Expect
    series: str | None
    geometry: Geometry
    largest_gb: float
    headers: bool


def prepare(
    path: str | os.PathLike[str],
    spec: PreprocessingSpec | str = "ct_224",
    *,
    hu: Trust = "auto",
    expect: Expect = "auto",
    table: TableFacts | None = None,
    series: str | None = None,
    geometry: Geometry = "auto",
    largest_gb: float = LARGEST_GB,
    headers: bool = False,
) -> Prepared:
    """Read one scan and bring it to ``spec``: exactly what made the training set.

    ``table``: what a metadata table states of it; the other options are those of ``Reading``. The grid is laid about the
    scan's middle, or where that would cut lung, about the lungs (never under the published geometry, which only warns). Raises PreprocessingError with one line that
    names the file, what is wrong and what to do.
    """
    spec = spec if isinstance(spec, PreprocessingSpec) else PreprocessingSpec.load(spec)
    raw = read(path, series, geometry, largest_gb=largest_gb)
    taken = to_hu(placed(raw, table, geometry), table, hu)
    file_grid = FileGrid.of(taken.array.shape, taken.affine, raw.columns_first)
    volume = orient(taken)
    lungs = find_lungs(volume)
    if reason := no_chest(lungs) if expect != "any" else None:
        if expect == "chest":
            raise PreprocessingError(f"{volume.source}: {reason}; --expect any accepts it")
        volume.warnings.append(f"{reason}: what a model of chests says of it means nothing")
    apart, step = max(zip(volume.spacing, spec.spacing, strict=True), key=lambda pair: pair[0] / pair[1])
    if apart > COARSER * step:
        volume.warnings.append(
            f"slices {apart:.1f} mm apart, for a grid of {step:g} mm: what is smaller may not be seen"
        )
    if doubt := orientation_doubt(lungs):
        volume.warnings.append(doubt)
    centre, kept = _about_the_lungs(volume, lungs, spec)
    if expect == "chest" and kept < LEAST_LUNG:
        raise PreprocessingError(
            f"{volume.source}: only {kept:.0%} of the lungs fit into the grid of spec {spec.name!r}; --expect any takes it "
            f"all the same"
        )
    kept_headers = raw.headers if headers else []
    return Prepared(volume, spec, resampled_affine(volume, spec, centre), file_grid, centre, kept_headers)


def _about_the_lungs(volume: Volume, lungs: Lungs, spec: PreprocessingSpec) -> tuple[Centre | None, float]:
    """Where to lay the grid, if not about the scan's middle, and the share of the lungs in it; warns where lung is cut."""
    if not lungs.is_chest:
        return None, 1.0
    ends = bounds(volume, spec)
    kept = lungs.share_within(ends)
    if kept >= 1 - LUNG_CUT:
        return None, kept
    if spec.published_geometry:
        volume.warnings.append(f"{1 - kept:.0%} of the lungs lie outside the grid, which is centred on the scan")
        return None, kept
    middle = [(size - 1) / 2 for size in volume.array.shape]
    for axis, (low, high) in enumerate(ends):
        first, end = lungs.box[axis]
        if first * lungs.step[axis] < low or end * lungs.step[axis] > high:
            middle[axis] = lungs.middle(axis)
    centre = (middle[0], middle[1], middle[2])
    better = lungs.share_within(bounds(volume, spec, centre))
    if better <= kept:
        volume.warnings.append(f"{1 - kept:.0%} of the lungs lie outside the grid, which is too small for them")
        return None, kept
    volume.warnings.append(
        f"{1 - kept:.0%} of the lungs would lie outside a grid centred on the scan: it is centred on the lungs instead, of which "
        f"{better:.0%} are in it"
    )
    return centre, better


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
    """Bring every volume of a cohort into a store.

    Volumes that are stored already are kept, so a run that was interrupted continues. ``shard`` (i, n) takes
    every n-th volume from the i-th on: shards may run at once on one store. ``calibration`` of the training patients
    become a split of that name, which training never sees. Volumes without a report and reports without a volume are
    refused unless ``partial``: then the former are kept without text, the latter left out. ``keep_no_chest`` and ``labels``:
    see ``read_cohort``. ``linkage``: where to write the table that leads from ids to paths and studies; see
    ``ctclip.preprocessing.linkage``.
    """
    reading = reading or Reading()
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
            f"warning: {output}: {len(changed)} stored volumes (first: {changed[0]}) were made from other files, table entries "
            f"or options than those of this run: they are made again"
        )
    outcomes = [*kept, *_not_read(cohort, set(mine["volume"]))]
    names = {outcome.volume for outcome in kept}
    due = [task for task in tasks if task[0] not in names]
    fresh = _all(due, store.path, reading, workers or len(os.sched_getaffinity(0)))
    outcomes += track(fresh, len(due), "preprocessing")
    write_outcomes(store, outcomes, shard)
    # Of shards, once they are merged: each would look at the whole store.
    doubles = double_notes(store, table) if shard == (1, 1) else []
    return Report(outcomes, [*cohort.notes, *doubles], dict(cohort.unused))


def _kept(store: VolumeStore, tasks: Sequence[Task], reading: Reading) -> tuple[list[Outcome], list[str]]:
    """Outcomes of volumes that are stored already, by what is kept with them, and the names of those that were made from
    something else. Stores of earlier versions do not tell, and have only ``outcomes.csv``."""
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
    """The series asked for, else the one that the table names."""
    return {**reading, "series": reading.get("series") or series}


def _not_read(cohort: Cohort, mine: set[str]) -> list[Outcome]:
    """Outcomes of what is known beforehand: volumes that the cohort lists as none to take, or that cannot be one."""
    refused = [Outcome(name, reason) for name, reason in cohort.refused.items() if name in mine]
    return refused + [Outcome(name, None, left_out=reason) for name, reason in cohort.left_out.items()]


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


def merge_shards(path: str | os.PathLike[str]) -> list[Outcome]:
    """One ``outcomes.csv`` of the shards' own; no volume is read. Refuses while a shard has not finished."""
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
    """Outcomes in the order in which they end. A scan that kills its process is refused; the others go on."""
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
            # One of the first that are left: workers take tasks in order, and hold few ahead.
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
    pool = worker_pool(workers)
    try:
        futures = {pool.submit(_one, task, store, reading): task for task in due}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # A full disk or Ctrl-C must not wait for tens of thousands of tasks that are queued.
        pool.shutdown(cancel_futures=True)


def _one(task: Task, store: Path, reading: Reading) -> Outcome:
    name, path, table, series = task
    target = VolumeStore(store)
    try:
        chosen = _asked(reading, series)
        ready = prepare(path, target.spec, table=table, **chosen)
    except PreprocessingError as error:
        return Outcome(name, str(error))
    except Exception as error:
        # A fault of ours in one scan must not end a run of fifty thousand; what libraries say may quote its header.
        return Outcome(name, f"{name}: could not be prepared ({type(error).__name__}); please report this as a fault")
    spacing = " x ".join(f"{step:.2f}" for step in ready.source_spacing)
    done = Outcome(name, None, tuple(ready.warnings), spacing, " x ".join(map(str, ready.source_shape)))
    try:
        # A run that is killed writes no outcomes.csv: what became of a volume lies with it.
        target.write(name, ready.stored, {**done.row(), SOURCE: source_digest(path, table, chosen)})
    except PreprocessingError as error:
        return Outcome(name, str(error))
    return done
