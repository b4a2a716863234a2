"""`ctclip demo`: the whole pipeline on a synthetic cohort."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Chosen(StrEnum):
    default = "default"
    quick = "quick"
    smoke = "smoke"


def demo(
    output: Path = typer.Option(
        Path("runs/demo"),
        "--output",
        "-o",
        help="Folder for the demo. If it holds an unfinished demo, that demo is resumed.",
    ),
    size: Chosen = typer.Option(
        Chosen.default,
        help="default: half an hour, detects most abnormalities; quick: twelve minutes, detects large ones; "
        "smoke: two minutes, runs every stage but learns nothing.",
    ),
    seed: int = typer.Option(0, min=0, help="Seed of the cohort and of the training."),
    processes: int = typer.Option(
        None, min=1, help="Number of training processes. Default: one per GPU, or 2 on a CPU."
    ),
) -> None:
    """Run the whole pipeline on a synthetic cohort: phantoms, preprocessing, training, zero-shot detection, report.

    `ctclip demo --size smoke --output runs/smoke`
    """
    from ctclip.demo import default_processes, finish
    from ctclip.demo import demo as run

    seconds = run(output, size.value, seed, processes or default_processes())
    metrics = finish(output, seconds)
    zero, controls = metrics["zero_shot"], metrics["controls"]
    low, high = zero["mean_auroc_interval"]
    retrieval = metrics["retrieval"]["report_to_volume"]
    weak = [name for name, entry in zero["auroc"].items() if entry["lower"] is not None and entry["lower"] <= 0.5]
    print(
        f"\nzero-shot mean AUROC  {zero['mean_auroc']:.3f}  (95 % interval {low:.3f} to {high:.3f}), "
        f"{zero['labels_defined']} abnormalities, reports only"
    )
    print(
        f"histogram control     {controls.get('histogram_mean_auroc', float('nan')):.3f}  (supervised, sees only HU "
        "frequencies)"
    )
    print(f"shuffled labels       {controls['shuffled_mean_auroc']:.3f}")
    print(
        "report to volume      recall "
        f"{', '.join(f'{retrieval[k]:.1%} @{k[7:]}' for k in ('recall@1', 'recall@5', 'recall@10') if k in retrieval)} of {retrieval['pool']} volumes"
    )
    if weak:
        print(f"not above chance      {', '.join(weak)}")
    print(f"time                  {metrics['seconds']['total'] / 60:.1f} minutes")
    print(f"report                {output / 'report.html'}")
