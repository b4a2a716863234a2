"""The whole pipeline on a synthetic cohort: every stage is an ordinary command, printed before it runs.

Finished stages are skipped, and an interrupted cohort, store or training run resumes where it stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctclip.errors import CtclipError
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.outputs import check_folder, made_by_us


@dataclass(frozen=True)
class Size:
    """How large a demo is."""

    volumes: int
    overrides: tuple[str, ...]
    bootstrap: int
    calibration: float
    # Minutes of each stage on two cores with AVX-512; the time left is estimated from their proportions.
    minutes: tuple[float, float, float, float, float, float, float]
    scale: float = 4.0
    spec: str = "phantom"
    reconstructions: int = 3
    # Whether the model learns enough that at least one label can be calibrated.
    learns: bool = True


SIZES = {
    "default": Size(5200, (), 1000, 0.08, (5.1, 1.4, 28.0, 0.4, 0.1, 0.7, 0.4)),
    # Large enough to learn large findings, with the coarsest voxels that show them. In so few steps, whole reports alone
    # teach more than single sentences as well.
    "quick": Size(
        1640,
        (
            "training.epochs=7",
            "training.text_warmup.steps=80",
            "training.summary_patients=100",
            "objectives={clip: {queue: 2048}}",
        ),
        200,
        0.1,
        (1.3, 1.0, 5.2, 0.3, 0.2, 0.4, 0.6),
        scale=5.5,
        spec="phantom_coarse",
        reconstructions=1,
    ),
    # Runs every stage, but is far too small to learn from.
    "smoke": Size(
        60,
        (
            "training.epochs=1",
            "training.text_warmup.steps=20",
            "training.batch=8",
            "training.log_every=1",
            "model.text.vocabulary=600",
        ),
        100,
        # With so few patients, a third is needed for any label to have enough positives and negatives.
        0.35,
        (0.1, 0.1, 0.5, 0.2, 0.1, 0.2, 0.3),
        learns=False,
    ),
}


def demo(output: Path, size: str, seed: int, processes: int) -> dict[str, float]:
    """Run all stages and write to ``output``; return the seconds of each stage. Raises CtclipError if one fails."""
    chosen = SIZES[size]
    cohort, store, run, predictions = output / "cohort", output / "store", output / "train", output / "predictions"
    model, calibration = run / "model", output / "calibration"
    calibrated = model / "heads" / "prompts" / "calibration.json"
    stages: list[tuple[str, list[str], Path]] = [
        ("phantom", ["phantom", str(cohort), "--volumes", str(chosen.volumes), "--seed", str(seed), "--scale", f"{chosen.scale:g}", "--reconstructions", str(chosen.reconstructions), "--rare-floor", "0.15"], cohort / "dataset" / "metadata"),
        ("preprocess", ["preprocess", str(cohort), "--output", str(store), "--spec", chosen.spec, "--calibration-fraction", str(chosen.calibration)], store / "outcomes.csv"),
        ("train", ["train", "--config", "phantom_tiny", "--store", str(store), "--output", str(run), "--processes", str(processes), f"seed={seed}", f"preprocessing={chosen.spec}", *(fast_precision() if chosen.learns else ()), *chosen.overrides], model),
        ("zero-shot, calibration split", ["zero-shot", "--model", str(model), "--store", str(store), "--split", "calibration", "--output", str(calibration)], calibration / "predictions.csv"),
        ("calibrate", ["calibrate", str(calibration / "predictions.csv"), "--model", str(model), "--store", str(store)], calibrated),
        ("zero-shot", ["zero-shot", "--model", str(model), "--store", str(store), "--split", "valid", "--embed-reports", "--output", str(predictions)], predictions / "embeddings.parquet"),
        ("evaluate", ["evaluate", str(predictions / "predictions.csv"), "--store", str(store), "--protocol", "phantom", "--cohort", str(cohort), "--masks", str(cohort / "masks"), "--run", str(run), "--calibration", str(calibrated), "--output", str(output), "--bootstrap", str(chosen.bootstrap)], output / "report.html"),
    ]  # fmt: skip
    _claim(output, {"size": size, "seed": seed})
    book = output / "seconds.json"
    seconds = _seconds(book) if book.is_file() else {}
    for number, (name, arguments, done) in enumerate(stages):
        if name == "evaluate" and not calibrated.is_file():
            place = arguments.index("--calibration")
            del arguments[place : place + 2]
        left = minutes_left(chosen.minutes, seconds, [stage for stage, _, _ in stages[:number]])
        print(f"\n[stage {number + 1} of {len(stages)}, about {max(1, round(left))} min left in all]")
        print(f"$ ctclip {shlex.join(arguments)}", flush=True)
        if name in seconds and done.exists():
            print(f"already done, in {seconds[name]:.0f} s", flush=True)
            continue
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "ctclip", *arguments], check=False).returncode
        if code == 2 and name == "calibrate" and not chosen.learns:
            print(
                "not calibrated: a model that has learned nothing may rank every label the wrong way round", flush=True
            )
        elif code != 0:
            raise CtclipError(
                f"the stage {name!r} failed with exit code {code}; fix the error above and run the demo again"
            )
        # The time of an interrupted stage is added to its earlier time.
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
        write_text(book, json.dumps(seconds, indent=2))
    return seconds


def _seconds(book: Path) -> dict[str, float]:
    """The time of each finished stage."""
    try:
        return {str(name): float(value) for name, value in plain_json.read(book).items()}
    except UNFIT as error:
        raise CtclipError(f"{book}: damaged; delete it and run the demo again, which repeats its stages") from error


def minutes_left(usual: Sequence[float], seconds: Mapping[str, float], past: Sequence[str]) -> float:
    """Minutes until the end: the usual time of the remaining stages, scaled by how much longer than usual the ``past``
    stages took.

    ``usual``: usual time of each stage; ``seconds``: time of finished stages, by name; ``past``: names of finished
    stages, in order.
    """
    taken, expected = sum(seconds[name] for name in past) / 60, sum(usual[: len(past)])
    # Short first stages are a poor basis for the estimate.
    slower = (taken + 1) / (expected + 1)
    return slower * sum(usual[len(past) :])


def finish(output: Path, seconds: dict[str, float]) -> dict:  # type: ignore[type-arg]
    """Write the stages' times into ``metrics.json`` and return it."""
    path = output / "metrics.json"
    metrics = plain_json.read(path)
    metrics["seconds"] = {**seconds, "total": sum(seconds.values())}
    write_text(path, json.dumps(metrics, indent=2))
    predictions = (output / "predictions" / "predictions.csv").read_text(encoding="utf-8")
    write_text(output / "predictions.csv", predictions)
    return metrics


def fast_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The change of the recipe for a processor that multiplies matrices in bfloat16, which takes a third less time."""
    from ctclip.models.precision import cpu_multiplies_bf16

    return ("training.precision=bf16",) if cpu_multiplies_bf16(cpuinfo) else ()


def default_processes() -> int:
    """One process per GPU; without GPUs, two processes if there are two cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, len(os.sched_getaffinity(0)))


def _claim(output: Path, options: dict[str, object]) -> None:
    path = output / "demo.json"
    check_folder(output, lambda folder: made_by_us(folder, {path.name: b'"size"'}), "demo")
    if path.is_file():
        try:
            earlier = plain_json.read(path)
        except ValueError as error:
            raise CtclipError(f"{path}: damaged; choose another --output, or delete this folder") from error
        if earlier != options:
            raise CtclipError(
                f"{path}: this folder holds another demo {earlier}; choose another --output, or delete it"
            )
    write_text(path, json.dumps(options))
