"""How often a scan is called far from the training scans: held-out phantoms, and scans of other kinds."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from scipy import ndimage

from tests.benchmarks.common import table

SCANS, SEED = 60, 2611
REAL = Path(__file__).parents[4] / "shared" / "ct"
REAL_SCANS = {
    "real abdomen": (
        "dicom/ts_abd_contrast_siemens_20", "nifti/ts_abdpelvis_3mm_RAS", "nifti/ts_abd_sm_3mm_RAS",
    ),
    "real head, or phantom of one": ("dicom/dcm_qa_ct/gantry_tilt_ge", "nifti/CT_pitch", "dicom/dcm_qa_ct/philips_28x5mm"),
    "real chest (unlike phantoms too)": (
        "dicom/lungdx_A0001_philips_B_5mm_64", "dicom/lungdx_A0002_siemens_B40f_8mm_30",
        "nifti/ts_chestCTA_aorta_crop_1p5mm_LPS", "nifti/ts_chestCTA_heart_crop_1p5mm_LPS",
    ),
}  # fmt: skip
# HU [slice, row, column] and spacing in mm.
Image = tuple[np.ndarray, tuple[float, float, float]]


def show(demo: Path, model: Path, scans: int = SCANS) -> str:
    from ctclip.inference.model import load

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        shutil.copytree(model, copy)
        seconds, held = _of_store(demo, copy)
        ready = load(copy)
        rows = [["phantoms of the split valid, one a patient (false alarms)", *held]]
        print(rows[-1], file=sys.stderr, flush=True)
        for name, images in KINDS.items():
            rows.append([name, *_judged(ready, Path(scratch), itertools.islice(images(), scans))])
            print(rows[-1], file=sys.stderr, flush=True)
        for name, files in REAL_SCANS.items():
            rows.append([name, *_judged_files(ready, [REAL / file for file in files])])
    title = f"Drift: called far from the training scans (summary: {seconds:.0f} processor seconds)"
    return table(title, ["scans", "n", "called far", "share", "why, most often"], rows)


def _of_store(demo: Path, model: Path) -> tuple[float, list[str]]:
    """Seconds to summarise, and how many held-out phantoms are called far."""
    from ctclip.data.dataset import stored_volumes
    from ctclip.inference.drift import describe, one_a_patient, summarise, usable_summary
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    store, loaded = VolumeStore(demo / "store"), load_model(model)
    began = time.process_time()
    # A folder that has a summary of these weights keeps it.
    summary = usable_summary(loaded) or summarise(model, store)
    assert summary is not None
    seconds = time.process_time() - began
    scans = StoredScans(store, "valid", loaded.spec, model)
    scans.table = one_a_patient(stored_volumes(store, "valid"), 10_000, 0).reset_index(drop=True)
    return seconds, _row([summary.judge(one) for one in describe(loaded, scans)])


def _judged(model, scratch: Path, images: Iterator[Image]) -> list[str]:  # type: ignore[no-untyped-def]
    from ctclip.phantom.cohort import _write_nifti

    paths = []
    for number, (hu, spacing) in enumerate(images):
        path = scratch / f"scan_{number}.nii.gz"
        grid = mock.Mock(
            origin=tuple(-(n - 1) / 2 * s for n, s in zip(hu.shape, spacing, strict=True)), spacing=spacing
        )
        _write_nifti(path, np.rint(hu).astype(np.int16), mock.Mock(grid=grid))
        paths.append(path)
    return _judged_files(model, paths)


def _judged_files(model, paths: list[Path]) -> list[str]:  # type: ignore[no-untyped-def]
    """Through the same doors as `ctclip zero-shot`: read, prepared, encoded, judged."""
    from ctclip.drift.facts import Source
    from ctclip.drift.summary import Described
    from ctclip.preprocessing.errors import PreprocessingError

    verdicts, refused = [], 0
    for path in paths:
        try:
            ready = model.prepare(path)
        except PreprocessingError:
            refused += 1
            continue
        source = Source(ready.source_spacing, ready.source_shape)
        verdicts.append(model._summary.judge(Described.of(ready.voxels, model.spec, model.embed(ready), source)))
    return _row(verdicts, refused)


def _row(verdicts, refused: int = 0) -> list[str]:  # type: ignore[no-untyped-def]
    far = [verdict for verdict in verdicts if verdict.far]
    groups = [reason.split(" (")[0].split(" 0")[0] for verdict in far for reason in verdict.reasons[:1]]
    often = max(sorted(set(groups)), key=groups.count) if groups else ""
    count = f"{len(verdicts)}" + f" (and {refused} refused)" * bool(refused)
    return [count, str(len(far)), f"{len(far) / max(1, len(verdicts)):.1%}", often]


def chests(change: Callable[[np.ndarray, tuple[float, float, float]], Image], down: float = 0.0) -> Iterator[Image]:
    """New phantoms, changed; ``down``: how many lung heights lower the scan lies."""
    from ctclip.phantom import scan as phantom

    drawn = phantom.draw_acquisition

    def lower(patient, random, scale):  # type: ignore[no-untyped-def]
        acquisition = drawn(patient, random, scale)
        z, y, x = acquisition.grid.origin
        grid = dataclasses.replace(acquisition.grid, origin=(z - down * patient.lung_height, y, x))
        return dataclasses.replace(acquisition, grid=grid)

    for number in range(SCANS):
        with mock.patch.object(phantom, "draw_acquisition", lower):
            made = phantom.make_scan(SEED, number, rare_floor=0.15).reconstructions[0]
        yield change(made.hu.astype(np.float32), made.acquisition.grid.spacing)


def heads() -> Iterator[Image]:
    """A skull with brain, ventricles, sinuses and a neck on a head rest."""
    for number in range(SCANS):
        random = np.random.default_rng([SEED, number])
        spacing = (float(random.choice([3.0, 4.0, 5.0])), 2.0, 2.0)
        shape = (round(170 / spacing[0]), 120, 120)
        z, y, x = np.ogrid[tuple(slice(-(n - 1) / 2 * s, n / 2 * s, s) for n, s in zip(shape, spacing, strict=True))]  # type: ignore[misc]
        size = random.uniform(0.9, 1.1)
        radius = np.sqrt((z / (88 * size)) ** 2 + (y / (92 * size)) ** 2 + (x / (74 * size)) ** 2)
        hu = np.full(shape, -1000.0, np.float32)
        neck = ((y - 15) / 55) ** 2 + (x / 55) ** 2 < 1
        hu[np.broadcast_to(neck & (z < -50), shape)] = 50
        for outside, value in ((1.08, 30), (1.0, 1000), (0.91, 34)):
            hu[radius < outside] = value
        hu[((z - 5) / 22) ** 2 + (y / 30) ** 2 + ((abs(x) - 12) / 8) ** 2 < 1] = 8
        hu[((z + 60) / 15) ** 2 + ((y + 65) / 14) ** 2 + (x / 18) ** 2 < 1] = -900
        yield (
            hu + random.normal(0, random.uniform(10, 40), shape).astype(np.float32) * np.where(hu < -900, 0.55, 1),
            spacing,
        )


def _as_it_is(hu: np.ndarray, spacing: tuple[float, float, float]) -> Image:
    return hu, spacing


def _thick(hu: np.ndarray, spacing: tuple[float, float, float]) -> Image:
    """Slices of 8 mm, each the mean of what it covers."""
    smooth = ndimage.uniform_filter1d(hu, max(1, round(8 / spacing[0])), axis=0)
    places = np.arange(0, len(hu) - 1, 8 / spacing[0])
    return smooth[np.rint(places).astype(int)], (8.0, *spacing[1:])


def _thick_but_resampled(hu: np.ndarray, spacing: tuple[float, float, float]) -> Image:
    """The same, interpolated back to the spacing it had, so that no header tells of it."""
    thick, _ = _thick(hu, spacing)
    return ndimage.zoom(thick, (8 / spacing[0], 1, 1), order=1), spacing


def _part(axis: int, first: bool) -> Callable[[np.ndarray, tuple[float, float, float]], Image]:
    def cut(hu: np.ndarray, spacing: tuple[float, float, float]) -> Image:
        middle = hu.shape[axis] // 2
        return np.take(hu, range(middle) if first else range(middle, hu.shape[axis]), axis), spacing

    return cut


def _blank(hu: np.ndarray, spacing: tuple[float, float, float]) -> Image:
    """The whole grid, of which the upper half is air."""
    out = hu.copy()
    out[len(hu) // 2 :] = -1000
    return out, spacing


KINDS: dict[str, Callable[[], Iterator[Image]]] = {
    "new phantoms as they are (false alarms)": lambda: chests(_as_it_is),
    "slices of 8 mm": lambda: chests(_thick),
    "slices of 8 mm, resampled to what they were": lambda: chests(_thick_but_resampled),
    "lower half of a chest": lambda: chests(_part(0, True)),
    "upper half": lambda: chests(_part(0, False)),
    "right half": lambda: chests(_part(2, True)),
    "left half": lambda: chests(_part(2, False)),
    "lower half, the rest of the grid air": lambda: chests(_blank),
    "phantoms scanned a lung's height lower (abdomen)": lambda: chests(_as_it_is, down=1.0),
    "drawn heads": heads,
}
