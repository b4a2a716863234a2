"""`ctclip evaluate`: predictions and labels to figures with intervals."""

from __future__ import annotations

from pathlib import Path

import typer


def evaluate(
    predictions: Path = typer.Argument(..., help="predictions.csv (or .parquet) of `ctclip zero-shot`."),
    labels: Path = typer.Option(None, help="A labels CSV or cohort table; the store's own if not given."),
    protocol: str = typer.Option("ct_rate", help="A YAML file, or the name of one in configs/protocols."),
    output: Path = typer.Option(
        Path("evaluation"), "--output", "-o", help="Folder for metrics.json, the figures and report.html."
    ),
    store: Path = typer.Option(None, help="The volumes' store: adds the histogram control and example slices."),
    run: Path = typer.Option(None, help="The training run: adds its loss curve and configuration."),
    bootstrap: int = typer.Option(None, min=10, help="Resamples of patients; the protocol's if not given."),
    seed: int = typer.Option(0, help="Of the bootstrap and the shuffled control."),
) -> None:
    """Score predictions by a declared protocol: AUROC with bootstrap intervals by patient, controls, retrieval.

    `ctclip evaluate predictions/predictions.csv --labels labels.csv --protocol ct_rate --output evaluation`
    """
    from ctclip.evaluation.command import run_evaluation

    found = run_evaluation(
        predictions, output, protocol, labels=labels, store=store, run=run, bootstrap=bootstrap, seed=seed
    )
    zero, controls = found["zero_shot"], found["controls"]
    low, high = zero["mean_auroc_interval"]
    print(
        f"mean AUROC {zero['mean_auroc']:.3f} ({low:.3f} to {high:.3f}) over {zero['labels_defined']} labels, {found['volumes']} volumes"
    )
    if "histogram_mean_auroc" in controls:
        print(f"histogram control {controls['histogram_mean_auroc']:.3f}")
    print(f"shuffled control {controls['shuffled_mean_auroc']:.3f}")
    print(f"report: {output / 'report.html'}")
