"""``python -m tests.benchmarks.audit --demo runs/demo``: what the audit finds of what was planted in a demo's cohort.

Needs the store and the model of `ctclip demo`; nothing is written into its folder. Real scans are used where they lie
beside the checkout (``../shared/ct``).
"""

from __future__ import annotations

import argparse
from datetime import date
from importlib import import_module
from pathlib import Path

from tests.benchmarks.common import machine

PARTS = ("drift", "doubles", "pairs", "confounders", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `ctclip demo`")
    parser.add_argument("--model", type=Path, help="model folder; default: that of the demo")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument(
        "--few",
        type=int,
        help="with drift: phantoms of each kind; with doubles: volumes of the store; with pairs: scans of a split; with training: seeds",
    )
    chosen = parser.parse_args()
    print(f"{date.today():%-d %B %Y}, {machine()}\n")
    for part in PARTS:
        if chosen.only in (None, part):
            show = import_module(f"tests.benchmarks.audit.{part}").show
            few = (chosen.few,) if chosen.few and part != "confounders" else ()
            print(show(chosen.demo, chosen.model or chosen.demo / "train" / "model", *few), flush=True)


if __name__ == "__main__":
    main()
