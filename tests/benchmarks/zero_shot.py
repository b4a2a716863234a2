"""Speed of zero-shot detection and evaluation at realistic sizes: ``python -m tests.benchmarks.zero_shot --model DIR
--store DIR``."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.common import best_of, machine, table


def detection(model: Path, store: Path, volumes: int) -> tuple[float, float]:
    """Seconds to encode stored volumes once, and to detect 18 abnormalities in them, in turn."""
    from ctclip.heads.folder import PROMPTS, load_head
    from ctclip.inference.run import batches, detect
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded = load_model(model)
    scans = StoredScans(VolumeStore(store), None, loaded.spec, model)
    scans.table = scans.table.head(volumes).reset_index(drop=True)

    def encode() -> None:
        with torch.inference_mode():
            for _, voxels, _ in batches(scans, list(range(len(scans.table))), 8, {}):
                loaded.model.encode_volume(torch.from_numpy(voxels))

    def detected() -> None:
        # Includes embedding the prompts and writing the tables: all that the command does after start-up.
        with tempfile.TemporaryDirectory() as folder:
            detect(loaded, load_head(loaded.path, PROMPTS, loaded.model), scans, Path(folder))

    encode()
    times = [(best_of(encode, 1), best_of(detected, 1)) for _ in range(3)]
    return min(pair[0] for pair in times), min(pair[1] for pair in times)


def command(*arguments: object) -> tuple[float, float]:
    """Wall-clock and processor seconds of a command, including start-up."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "ctclip", *map(str, arguments)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def bootstrap() -> tuple[float, float]:
    """Seconds for 1,000 resamples of 3,039 x 18 by patient, for AUROC alone and for all metrics."""
    from ctclip.evaluation.metrics import bootstrap_auroc, bootstrap_metrics

    random = np.random.default_rng(0)
    labels, scores = (random.random((3039, 18)) < 0.2).astype(float), random.random((3039, 18))
    patients = random.integers(0, 1304, 3039)
    alone = best_of(lambda: bootstrap_auroc(labels, scores, patients, resamples=1000), 1)
    return alone, best_of(
        lambda: bootstrap_metrics(labels, scores, scores, patients, np.full(18, 0.5), resamples=1000), 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/train/model"))
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument(
        "--scan", type=Path, default=None, help="a .nii.gz file; default: the first of the demo's cohort"
    )
    chosen = parser.parse_args()
    scan = chosen.scan or next((chosen.store.parent / "cohort" / "dataset").rglob("valid_*.nii.gz"))
    once, detected = detection(chosen.model, chosen.store, 200)
    with tempfile.TemporaryDirectory() as folder:
        command("zero-shot", "--model", chosen.model, scan, "--output", folder)
        one = min(command("zero-shot", "--model", chosen.model, scan, "--output", folder) for _ in range(2))
    shown = min(command("--help") for _ in range(3))
    alone, every = bootstrap()
    rows = [
        ["200 stored volumes, encoded once", f"{once:.2f}", ""],
        ["200 stored volumes, 18 abnormalities, tables written", f"{detected:.2f}", f"{detected / once:.2f} x encoding once (bar 1.1)"],
        ["one scan from .nii.gz to the printed table, start-up included", f"{one[0]:.2f}", f"bar 10; {one[1]:.2f} of processor time"],
        ["`ctclip --help`", f"{shown[0]:.2f}", f"bar 1; {shown[1]:.2f} of processor time"],
        ["bootstrap, 1,000 resamples of 3,039 x 18 by patient, AUROC", f"{alone:.2f}", "bar 10"],
        ["the same, AUROC and nine more metrics", f"{every:.2f}", "bar 10"],
    ]  # fmt: skip
    print(f"{machine()}\n")
    print(table("Zero-shot and evaluation", ["", "seconds", ""], rows))


if __name__ == "__main__":
    main()
