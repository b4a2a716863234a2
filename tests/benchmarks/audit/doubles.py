"""Copies of phantoms that were changed, put under other names into another split: how many are found."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from tests.benchmarks.common import table

COPIES, SEED = 50, 12


def show(demo: Path, model: Path, volumes: int | None = None) -> str:
    import nibabel as nib

    from ctclip.audit.doubles import ALIKE, COPY, NEAREST, compare_closely
    from ctclip.audit.fingerprints import (
        Detail,
        candidates,
        compare,
        fine_detail,
        fingerprint,
        middle,
        slice_vectors,
    )
    from ctclip.audit.pictures import pictures
    from ctclip.preprocessing.pipeline import prepare
    from ctclip.preprocessing.store import VolumeStore

    store, random = VolumeStore(demo / "store"), np.random.default_rng(SEED)
    cohort = store.cohort[store.cohort["volume"].isin(set(store.volumes))].set_index("volume")
    cohort = cohort.head(volumes or len(cohort))
    names = cohort.index.tolist()
    sources = random.choice(len(names), COPIES, replace=False)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        taken = pictures(store, names, Path(scratch) / "cache")
        prints, middles = taken.prints.whole(), list(taken.middles.whole())
        reading = time.process_time() - began
        copies, close = [], []
        for number, source in enumerate(sources):
            image = nib.load(demo / "cohort" / cohort.at[names[source], "path"])
            path = Path(scratch) / f"copy_{number}.nii.gz"
            nib.save(_changed(image, number, random), path)
            hu = prepare(path, store.spec).hu
            copies.append(fingerprint(hu, store.spec))
            close.append(hu)
            middles.append(middle(hu, store.spec))
    every = np.concatenate([prints, np.stack(copies)])
    scans = np.concatenate([np.unique(cohort["scan"], return_inverse=True)[1], -1 - np.arange(COPIES)])
    patients = np.concatenate([np.unique(cohort["patient"], return_inverse=True)[1], -1 - np.arange(COPIES)])
    began = time.process_time()
    pairs = candidates(slice_vectors(every), scans, NEAREST)
    coarse = compare(every, pairs)
    likeness = coarse[:, 0]

    def whole(index: int) -> Detail:
        hu = close[index - len(names)] if index >= len(names) else store.read(names[index])
        return fine_detail(hu, store.spec)

    alike = np.flatnonzero(likeness >= ALIKE)
    likeness = np.zeros(len(pairs))
    likeness[alike] = compare_closely(
        whole, middles, [pairs[index] for index in alike], coarse[alike, 1].astype(bool).tolist()
    )
    seconds = time.process_time() - began
    # A copy is also a copy of the other reconstructions of its scan, and of the patient's other scan.
    owner = patients.copy()
    owner[len(names) :] = patients[sources]
    same = np.array([owner[one] == owner[other] for one, other in pairs])
    called = likeness >= COPY
    # By copy, the pair with its scan that is most alike; -1 if no reconstruction of the scan was compared.
    best, at_once = np.full(COPIES, -1.0), np.full(COPIES, np.nan)
    for (one, other), value, before in zip(pairs, likeness, coarse[:, 0], strict=True):
        number = other - len(names)
        if number >= 0 and scans[one] == scans[sources[number]] and value > best[number]:
            best[number], at_once[number] = value, before
    rows = []
    for kind, what in enumerate(KINDS):
        values = best[kind :: len(KINDS)]
        rows.append(
            [what, f"{int((values >= COPY).sum())} of {len(values)}", f"{values.min():.2f} to {values.max():.2f}"]
        )
    false = int((called & ~same).sum())
    total = len(every) * (len(every) - 1) // 2
    others = likeness[~same]
    rows.append(
        ["all copies", f"{int((best >= COPY).sum())} of {COPIES}", f"at 9 mm at least {np.nanmin(at_once):.2f}"]
    )
    strangers = np.quantile(coarse[~same, 0], [0.5, 0.9, 0.99, 1])
    rows.append(["pairs of different patients that were compared", "", f"at 9 mm: median {strangers[0]:.2f}, 90 % {strangers[1]:.2f}, 99 % {strangers[2]:.2f}, most {strangers[3]:.2f}"])  # fmt: skip
    rows.append(["pairs of different patients called copies", f"{false} of {total:,} pairs ({1e4 * false / total:.3f} in 10,000)", f"at most {others.max():.2f}"])  # fmt: skip
    title = (
        f"Doubles: {COPIES} changed copies among {len(names):,} phantoms (processor time: reading {reading:.0f} s, "
        f"{len(pairs):,} pairs compared at 9 mm and {len(alike):,} at 4 mm in {seconds:.0f} s)"
    )
    return table(title, ["copies", "found", "correlation"], rows)


KINDS = ("other spacing", "noise of 30 HU", "cropped", "slices reversed", "all four")


def _changed(image, number: int, random: np.random.Generator):  # type: ignore[no-untyped-def]
    """A copy, changed as its number says: NIfTI [column, row, slice]."""
    import nibabel as nib

    hu, affine = np.asarray(image.dataobj).astype(np.float32), image.affine.copy()
    kind = number % len(KINDS)
    if kind in (0, 4):
        factor = random.uniform(1.2, 1.6, 3)
        hu = ndimage.zoom(hu, 1 / factor, order=1)
        affine[:3, :3] *= factor
    if kind in (1, 4):
        hu = hu + random.normal(0, 30, hu.shape).astype(np.float32)
    if kind in (2, 4):
        low = [int(random.uniform(0, 0.1) * n) for n in hu.shape]
        high = [n - int(random.uniform(0, share) * n) for n, share in zip(hu.shape, (0.1, 0.1, 0.2), strict=True)]
        hu = hu[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    if kind in (3, 4):
        hu = hu[:, :, ::-1]
    return nib.Nifti1Image(np.rint(hu).astype(np.int16), affine)
