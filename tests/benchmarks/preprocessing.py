"""Preprocessing against the published loader: ``python -m tests.benchmarks.preprocessing``.

The baseline is written from the published description: nibabel's float64 decode, slope and intercept, trilinear resize
of the whole volume in float64, clip, float32, centre crop. Both run on the same full-size synthetic scan (512 x 512
pixels), one thread, each in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.common import apart, machine, peak_gb, processor_seconds, table

SPEC = "ct_clip"


def baseline(path: str) -> dict[str, float]:
    """Seconds and GB of the published loader."""
    import nibabel as nib
    import torch

    torch.set_num_threads(1)
    empty = peak_gb()

    def load() -> np.ndarray:
        image = nib.load(path)
        data = image.get_fdata() * 1.0 + 0.0
        spacing = image.header.get_zooms()
        volume = torch.tensor(np.clip(data, -1000, 1000).transpose(2, 0, 1))[None, None]
        target = (1.5, 0.75, 0.75)
        size = [int(n * s / t) for n, s, t in zip(volume.shape[2:], (spacing[2], *spacing[:2]), target, strict=True)]
        resized = torch.nn.functional.interpolate(volume, size=size, mode="trilinear", align_corners=False)[0, 0]
        scaled = (resized / 1000).to(torch.float32).numpy()
        result = np.full((240, 480, 480), -1, np.float32)
        cut, place = [], []
        for n, want in zip(scaled.shape, result.shape, strict=True):
            first, before = max(0, (n - want) // 2), max(0, (want - n) // 2)
            kept = min(n, want)
            cut.append(slice(first, first + kept))
            place.append(slice(before, before + kept))
        result[tuple(place)] = scaled[tuple(cut)]
        return result

    result = load()
    return {"seconds": processor_seconds(load, 3), "gb": peak_gb() - empty, "mean": float(result.mean())}


def ours(path: str) -> dict[str, float]:
    """Seconds and GB of ``ctclip.preprocessing.prepare``."""
    from ctclip.preprocessing import prepare
    from ctclip.preprocessing.spec import PreprocessingSpec

    # Exclude imports and compilation from the measurement.
    small = PreprocessingSpec.load(SPEC)
    small = dataclasses.replace(small, spacing=(24.0, 12.0, 12.0), shape=(16, 32, 32))
    prepare(Path(path).with_name("tiny.nii.gz"), small).voxels.mean()
    empty = peak_gb()
    mean = float(prepare(path, SPEC).voxels.mean())
    return {"seconds": processor_seconds(lambda: prepare(path, SPEC).voxels, 3), "gb": peak_gb() - empty, "mean": mean}


def floor(path: str) -> float:
    """Seconds to decompress the file and pass over its voxels once: a lower bound for any reader on one core."""
    from isal import igzip

    def read() -> float:
        with igzip.open(path, "rb") as stream:
            return float(np.frombuffer(stream.read()[352:], np.int16).max())

    return processor_seconds(read)


def filled(kind: str) -> float:
    """Seconds to allocate and fill a volume of the published spec: 221 MB of float32, or 111 MB of int16."""
    from ctclip.preprocessing.spec import PreprocessingSpec

    return processor_seconds(lambda: np.full(PreprocessingSpec.load(SPEC).shape, -1, kind), 9)


def unpacked(store: str) -> float:
    """Seconds to decompress one stored volume chunk by chunk into the same memory."""
    from ctclip.preprocessing.store import VolumeStore

    opened = VolumeStore(store)
    packed = opened._open(opened.volumes[0])
    chunks, one = packed.schunk, np.empty(packed.schunk.chunksize, np.uint8)
    return processor_seconds(lambda: [chunks.decompress_chunk(i, dst=one) for i in range(chunks.nchunks)], 9)


def stored(store: str) -> float:
    """Seconds to read one training sample from a store as int16 HU; the HU window is applied on the training device."""
    from ctclip.preprocessing.store import VolumeStore

    opened = VolumeStore(store)
    name = opened.volumes[0]
    return processor_seconds(lambda: opened.read_into(name, np.empty(opened.spec.shape, np.int16)), 9)


def windowed(store: str) -> float:
    """Seconds of one stored volume as float32 in [-1, 1], as inference reads it."""
    from ctclip.preprocessing.store import VolumeStore

    opened = VolumeStore(store)
    name = opened.volumes[0]
    return processor_seconds(lambda: opened.voxels(name), 9)


def cropped(store: str) -> float:
    """Seconds of a random crop of 112 x 224 x 224 voxels from a store, as float32 in [-1, 1]."""
    from ctclip.preprocessing.store import VolumeStore

    opened = VolumeStore(store)
    name = opened.volumes[0]
    region = (slice(60, 172), slice(100, 324), slice(130, 354))
    return processor_seconds(lambda: opened.spec.normalise(opened.read(name, region)), 5)


def whole_cohort(folder: str, store: str, workers: int, spec: str = SPEC) -> dict[str, float]:
    """Seconds, and processor seconds, to preprocess a cohort into a new store."""
    import resource

    from ctclip.preprocessing.cohort_run import preprocess_cohort
    from ctclip.preprocessing.spec import PreprocessingSpec

    began = time.perf_counter()
    preprocess_cohort(folder, store, PreprocessingSpec.load(spec), workers=workers)
    seconds = time.perf_counter() - began
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "cpu": sum(usage.ru_utime + usage.ru_stime for usage in spent)}


def write_scan(path: Path, seed: int, scale: float) -> None:
    """One synthetic scan as CT-RATE stores them: int16, gzip."""
    import nibabel as nib

    from ctclip.phantom.scan import make_scan

    made = make_scan(seed, 1, scale=scale).reconstructions[0]
    dz, dy, dx = made.acquisition.grid.spacing
    image = nib.Nifti1Image(made.hu.transpose(2, 1, 0), np.diag([-dx, -dy, dz, 1.0]))
    nib.save(image, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--volumes", type=int, default=24, help="number of volumes of the cohort for parallel efficiency"
    )
    parser.add_argument("--scan", type=Path, help="a .nii.gz file to read; default: a full-size phantom")
    chosen = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    here = __spec__.name if __spec__ is not None else "tests.benchmarks.preprocessing"
    with tempfile.TemporaryDirectory() as folder:
        scan, tiny = Path(folder, "scan.nii.gz"), Path(folder, "tiny.nii.gz")
        if chosen.scan:
            scan.symlink_to(chosen.scan.resolve())
        else:
            write_scan(scan, 15, 1.0)
        write_scan(tiny, 15, 8.0)
        import nibabel as nib

        shape, size = nib.load(scan).shape, scan.stat().st_size / 2**20
        theirs, mine = apart(here, "baseline", str(scan), threads=1), apart(here, "ours", str(scan), threads=1)
        lowest, fill = apart(here, "floor", str(scan), threads=1), apart(here, "filled", "float32", threads=1)
        fill_stored = apart(here, "filled", "int16", threads=1)
        cohort = Path(folder, "cohort")
        cohort.mkdir()
        for index in range(chosen.volumes):
            (cohort / f"scan_{index}.nii.gz").symlink_to(scan)
        alone = apart(here, "whole_cohort", str(cohort), str(Path(folder, "one")), 1, threads=1)
        together = apart(here, "whole_cohort", str(cohort), str(Path(folder, "all")), cores, threads=1)
        single = Path(folder, "single")
        single.mkdir()
        (single / "scan.nii.gz").symlink_to(scan)
        apart(here, "whole_cohort", str(single), str(Path(folder, "coarse")), 1, "ct_224", threads=1)
        sample, coarse = (apart(here, "stored", str(Path(folder, name)), threads=1) for name in ("all", "coarse"))
        inference = apart(here, "windowed", str(Path(folder, "all")), threads=1)
        unpack = apart(here, "unpacked", str(Path(folder, "all")), threads=1)
        crop = apart(here, "cropped", str(Path(folder, "all")), threads=1)
    n = chosen.volumes
    rows = [
        ["one scan, processor seconds", f"{theirs['seconds']:.2f}", f"{mine['seconds']:.2f}", f"{theirs['seconds'] / mine['seconds']:.1f} x faster"],
        ["one scan, memory above start, GB", f"{theirs['gb']:.2f}", f"{mine['gb']:.2f}", f"1/{theirs['gb'] / mine['gb']:.1f}"],
        ["floor: inflate and one pass, processor seconds", "", f"{lowest:.2f}", f"{mine['seconds'] / lowest:.1f} x the floor"],
        [f"floor beside it: filling what {SPEC} hands to a model, seconds", "", f"{fill:.3f}", f"both: {theirs['seconds'] / (lowest + fill):.1f} x faster"],
        ["one training sample of ct_224, whole volume (int16 HU), seconds", f"{theirs['seconds']:.2f}", f"{coarse:.4f}", f"{theirs['seconds'] / coarse:.0f} x faster"],
        [f"one training sample of {SPEC}, whole volume (240 x 480 x 480, int16 HU), seconds", f"{theirs['seconds']:.2f}", f"{sample:.3f}", f"{theirs['seconds'] / sample:.0f} x faster"],
        ["floor of that: decompressing, and filling the result, seconds", "", f"{unpack:.3f} + {fill_stored:.3f}", f"{theirs['seconds'] / (unpack + fill_stored):.0f} x faster"],
        ["the same as float32 in [-1, 1], as inference reads it, seconds", f"{theirs['seconds']:.2f}", f"{inference:.3f}", f"{theirs['seconds'] / inference:.0f} x faster"],
        ["floor of that: decompressing, and filling the result, seconds", "", f"{unpack:.3f} + {fill:.3f}", f"{theirs['seconds'] / (unpack + fill):.0f} x faster"],
        [f"one training sample of {SPEC}, crop of 112 x 224 x 224, seconds", f"{theirs['seconds']:.2f}", f"{crop:.3f}", f"{theirs['seconds'] / crop:.0f} x faster"],
        [f"{n} scans into a store, 1 process, seconds", "", f"{alone['seconds']:.1f}", f"{alone['seconds'] / n:.2f} a scan"],
        [f"{n} scans into a store, {cores} processes, seconds", "", f"{together['seconds']:.1f}", f"{alone['seconds'] / together['seconds'] / cores:.0%} parallel efficiency"],
        ["floor of that: inflate and one pass, seconds", "", f"{n * lowest / cores:.1f}", f"{together['seconds'] * cores / (n * lowest):.1f} x the floor"],
        [f"processor seconds of {n} scans, 1 and {cores} processes", "", f"{alone['cpu']:.1f}, {together['cpu']:.1f}", f"{alone['cpu'] / together['cpu']:.0%}"],
    ]  # fmt: skip
    print(f"{machine()}; scan of {' x '.join(map(str, shape))} voxels, {size:.0f} MiB as .nii.gz, spec {SPEC}")
    print(f"mean of the result: published way {theirs['mean']:.5f}, ours {mine['mean']:.5f}\n")
    print(table("Preprocessing", ["", "published way", "ctclip", "ratio"], rows))


if __name__ == "__main__":
    main()
