"""Training steps against an earlier checkout: ``python -m tests.benchmarks.steps_against /tmp/before --rounds 3``.

The two checkouts take turns to draw a cohort of phantoms, preprocess it, and train ``phantom_tiny`` on it for a few steps, in one
process of one thread. It reports the most volumes a second of each, because other work on the machine can only reduce them. To get
the earlier checkout: ``git archive COMMIT | tar x -C /tmp/before``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tests.benchmarks.common import ONE_THREAD, machine, table

OVERRIDES = ["training.epochs=8", "training.text_warmup.steps=0", "training.log_every=2"]


def command(place: Path, *words: object) -> None:
    """Run a command of one checkout; what it says is shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "ctclip", *map(str, words)], cwd=place, env={**os.environ, **ONE_THREAD}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{place}: {done.stdout[-1500:]}")


def rates(place: Path, store: Path, run: Path) -> list[float]:
    """Volumes a second of each interval that a training logs."""
    shutil.rmtree(run, ignore_errors=True)
    command(place, "train", "--config", "phantom_tiny", "--store", store, "--output", run, *OVERRIDES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["volumes_per_second"] for line in lines if "volumes_per_second" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path, help="folder of the earlier checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--volumes", type=int, default=128)
    parser.add_argument("--work", type=Path, help="folder that keeps the cohorts for another run")
    given = parser.parse_args()
    places = {"before": given.before, "now": Path.cwd()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        for name, place in places.items():
            if not (folder / name / "store").exists():
                command(
                    place, "phantom", folder / name / "cohort", "--volumes", given.volumes, "--scale", 4, "--seed", 5
                )
                command(
                    place,
                    "preprocess",
                    folder / name / "cohort",
                    "--output",
                    folder / name / "store",
                    "--spec",
                    "phantom",
                )
        most = dict.fromkeys(places, 0.0)
        for number in range(given.rounds):
            for name, place in places.items():
                best = max(rates(place, folder / name / "store", folder / name / "run"))
                most[name] = max(most[name], best)
                print(f"round {number + 1}, {name}: {best:.2f} volumes a second", flush=True)
    print(f"{machine()}, {date.today()}")
    ratio = most["now"] / most["before"]
    row = ["phantom_tiny, one process", f"{most['before']:.2f}", f"{most['now']:.2f}", f"{ratio:.3f}"]
    print(table(f"{given.rounds} rounds", ["", "before, volumes a second", "now", "now / before"], [row]))


if __name__ == "__main__":
    main()
