"""Write a synthetic cohort to disk in the layout of CT-RATE.

``dataset/{train,valid}/train_1/train_1_a/train_1_a_1.nii.gz`` (int16 HU), the reports, labels and metadata CSVs,
and beside them ``masks/`` (uint32 NIfTI, bit i for the i-th of the 18 findings) and ``phantom/`` (what was drawn).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip import __version__
from ctclip.errors import PhantomError
from ctclip.phantom.acquisition import Acquisition
from ctclip.phantom.prevalence import FINDINGS
from ctclip.phantom.scan import Scan, make_scan
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.outputs import check_folder, claim_folder, made_by_us
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.workers import worker_pool

RECONSTRUCTIONS = (0.7, 0.2, 0.1)
SECOND_SCAN = 0.1
# As in CT-RATE's second release, values are in HU already, and the table lists the applied slope and intercept.
RESCALE = {"RescaleIntercept": -1024, "RescaleSlope": 1}

MARKS = {"phantom.json": b'"rare_floor"'}


@dataclass(frozen=True)
class Options:
    """The options of a cohort, kept in ``phantom.json``; a folder with other options is refused."""

    volumes: int
    seed: int = 0
    scale: float = 4.0
    rare_floor: float = 0.0
    valid_fraction: float = 0.2
    # Maximum number of reconstructions per scan.
    reconstructions: int = len(RECONSTRUCTIONS)


@dataclass(frozen=True)
class Task:
    """One scan to generate: its patient and name."""

    patient_number: int
    scan_number: int
    split: str
    name: str
    reconstructions: int


def make_cohort(out: str | os.PathLike[str], options: Options, workers: int | None = None) -> None:
    """Write a cohort of ``options.volumes`` reconstructions; existing scans are kept.

    Raises PhantomError if the folder holds a cohort with other options, and PreprocessingError if it holds other files
    or another process writes there.
    """
    root = Path(out)
    if options.volumes < 2:
        raise PhantomError(f"--volumes {options.volumes}: a cohort needs at least 2")
    check_folder(root, lambda folder: made_by_us(folder, MARKS), "synthetic cohort")
    with contextlib.closing(claim_folder(root)):
        _claim(root, options)
        tasks = list(plan(options))
        due = [task for task in tasks if not _sidecar(root, task).is_file()]
        for _ in track(_all(root, options, due, workers or len(os.sched_getaffinity(0))), len(due), "drawing", "scans"):
            pass
        _write_tables(root, tasks)


def plan(options: Options) -> Iterator[Task]:
    """The scans of a cohort, in order, which depend only on the options."""
    random = np.random.default_rng([options.seed, 99])
    numbers = {"train": 0, "valid": 0}
    drawn = patient = 0
    while drawn < options.volumes:
        # The validation split is drawn at random instead of counted, so that a larger cohort begins with a smaller one.
        split = "valid" if random.random() < options.valid_fraction else "train"
        numbers[split] += 1
        for scan_number in range(1 + int(random.random() < SECOND_SCAN)):
            count = 1 + int(random.choice(len(RECONSTRUCTIONS), p=RECONSTRUCTIONS))
            count = min(count, options.reconstructions, options.volumes - drawn)
            if count:
                name = f"{split}_{numbers[split]}_{'ab'[scan_number]}"
                yield Task(patient, scan_number, split, name, count)
            drawn += count
        patient += 1


def _claim(root: Path, options: Options) -> None:
    path = root / "phantom.json"
    wanted = {"version": __version__, **dataclasses.asdict(options)}
    if path.is_file():
        try:
            kept = dict(plain_json.read(path))
        except (ValueError, TypeError) as error:
            raise PhantomError(f"{path}: damaged; choose another folder, or delete this one") from error
        # Earlier cohorts lack options that were added later; these have their default values.
        kept = {**_defaults(), **kept}
        differing = [key for key in wanted if kept.get(key) != wanted[key]]
        if differing:
            raise PhantomError(
                f"{path}: this folder holds another cohort (differs in {', '.join(differing)}); choose another folder"
            )
    write_text(path, json.dumps(wanted, indent=2))


def _defaults() -> dict[str, Any]:
    return {one.name: one.default for one in dataclasses.fields(Options) if one.default is not dataclasses.MISSING}


def _all(root: Path, options: Options, due: list[Task], workers: int) -> Iterator[None]:
    if workers == 1 or len(due) < 2:
        for task in due:
            _one(root, options, task)
            yield None
        return
    with worker_pool(workers) as pool:
        futures = [pool.submit(_one, root, options, task) for task in due]
        for future in as_completed(futures):
            yield future.result()


def _one(root: Path, options: Options, task: Task) -> None:
    scan = make_scan(
        options.seed, task.patient_number, task.scan_number, scale=options.scale,
        reconstructions=task.reconstructions, rare_floor=options.rare_floor,
    )  # fmt: skip
    patient = task.name.rsplit("_", 1)[0]
    rows = []
    for number, reconstruction in enumerate(scan.reconstructions, start=1):
        volume = f"{task.name}_{number}"
        relative = Path(task.split, patient, task.name)
        _write_nifti(root / "dataset" / relative / f"{volume}.nii.gz", reconstruction.hu, reconstruction.acquisition)
        _write_nifti(
            root / "masks" / relative / f"{volume}_findings.nii.gz", reconstruction.masks, reconstruction.acquisition
        )
        rows.append(_metadata(f"{volume}.nii.gz", reconstruction.acquisition, scan))
    # Written last, so that a scan with a sidecar is complete.
    write_text(_sidecar(root, task), json.dumps(_facts(scan, rows), indent=1))


def _facts(scan: Scan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "report": scan.report, "labels": scan.labels, "metadata": rows,
        "patient": dataclasses.asdict(scan.patient), "findings": [dataclasses.asdict(detail) for detail in scan.details],
    }  # fmt: skip


def _sidecar(root: Path, task: Task) -> Path:
    return root / "phantom" / task.split / f"{task.name}.json"


def _write_nifti(path: Path, array: np.ndarray, acquisition: Acquisition) -> None:
    """Write an array [slice, row, column] LPS+ as NIfTI [column, row, slice] with an affine to RAS."""
    import nibabel as nib
    from isal import igzip

    (z0, y0, x0), (dz, dy, dx) = acquisition.grid.origin, acquisition.grid.spacing
    affine = np.array([[-dx, 0, 0, -x0], [0, -dy, 0, -y0], [0, 0, dz, z0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    with written_beside(path, suffix=".nii.gz") as partial:
        # No time in the gzip header, so that the same seed gives the same bytes.
        partial.write_bytes(igzip.compress(image.to_bytes(), 1, mtime=0))


def _metadata(name: str, acquisition: Acquisition, scan: Scan) -> dict[str, Any]:
    (dz, dy, dx), (slices, rows, columns) = acquisition.grid.spacing, acquisition.grid.shape
    return {
        "VolumeName": name, "Manufacturer": acquisition.maker, "SeriesDescription": f"Thorax {acquisition.kernel}",
        "ConvolutionKernel": acquisition.kernel, "PatientSex": scan.patient.sex, "PatientAge": f"{scan.patient.age:03d}Y",
        **RESCALE, "XYSpacing": f"[{dy:.6g}, {dx:.6g}]", "ZSpacing": f"{dz:.6g}", "SliceThickness": f"{dz:.6g}",
        "Rows": rows, "Columns": columns, "NumberofSlices": slices,
    }  # fmt: skip


def _write_tables(root: Path, tasks: list[Task]) -> None:
    for split, long in (("train", "train"), ("valid", "validation")):
        metadata, reports, labels = [], [], []
        for path in (_sidecar(root, task) for task in tasks if task.split == split):
            try:
                fact = plain_json.read(path)
                for row in fact["metadata"]:
                    name = {"VolumeName": row["VolumeName"]}
                    metadata.append(dict(row))
                    reports.append({**name, **fact["report"]})
                    labels.append({**name, **dict(zip(FINDINGS, fact["labels"], strict=True))})
            except UNFIT as error:
                raise PhantomError(f"{path}: damaged; delete it and run the same command again") from error
        dataset = root / "dataset"
        _write_csv(dataset / "radiology_text_reports" / f"{long}_reports.csv", reports)
        _write_csv(dataset / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", labels)
        _write_csv(dataset / "metadata" / f"{long}_metadata.csv", metadata)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    with written_beside(path) as partial:
        pd.DataFrame(rows).to_csv(partial, index=False)
