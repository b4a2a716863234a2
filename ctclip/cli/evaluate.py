"""`ctclip evaluate`: predictions and labels to figures with intervals."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Thresholds(StrEnum):
    calibration = "calibration"
    published = "published"


def evaluate(
    predictions: Path = typer.Argument(..., help="predictions.csv (or .parquet) of `ctclip zero-shot`."),
    labels: Path = typer.Option(None, help="A labels CSV or cohort table; the store's own if not given."),
    protocol: str = typer.Option(
        None, help="A YAML file, or the name of one in configs/protocols; that of the label set if not given."
    ),
    output: Path = typer.Option(
        Path("evaluation"), "--output", "-o", help="Folder for metrics.json, the figures and report.html."
    ),
    store: Path = typer.Option(None, help="The volumes' store: adds the histogram control and example slices."),
    run: Path = typer.Option(None, help="The training run: adds its loss curve and configuration."),
    against: Path = typer.Option(None, help="Other predictions of the same volumes: adds a paired test."),
    calibration: Path = typer.Option(None, help="calibration.json of the model: its probabilities and thresholds."),
    thresholds: Thresholds = typer.Option(
        None, help="published: picked on these very volumes, as CT-CLIP does; the protocol's if not given."
    ),
    bootstrap: int = typer.Option(None, min=10, help="Resamples of patients; the protocol's if not given."),
    seed: int = typer.Option(0, help="Of the bootstrap and the shuffled control."),
    force: bool = typer.Option(False, "--force", help="Replace the evaluation of another run."),
) -> None:
    """Score predictions by a declared protocol: AUROC with intervals by patient, controls, retrieval.

    `ctclip evaluate predictions/predictions.csv --labels labels.csv --protocol ct_rate --output evaluation`

    `ctclip evaluate ours.csv --against theirs.csv --labels labels.csv --output compared`
    """
    from ctclip.evaluation.pages import number, split_note
    from ctclip.evaluation.run_evaluation import run_evaluation

    replaced = (output / "metrics.json").exists()
    result = run_evaluation(
        predictions, output, protocol, labels=labels, store=store, run=run, against=against, calibration=calibration,
        thresholds=thresholds.value if thresholds is not None else None, bootstrap=bootstrap, seed=seed, force=force,
    )  # fmt: skip
    zero, controls = result["zero_shot"], result["controls"]
    if result["patients"] == 1:
        print("note: one patient: no interval can be given, and no figure says anything about other patients")
    if zero["mean_auroc"] is None:
        print(f"mean AUROC undefined: every label has one class only ({result['volumes']} volumes)")
    else:
        low, high = map(number, zero["mean_auroc_interval"])
        print(
            f"mean AUROC {zero['mean_auroc']:.3f} ({low} to {high}) over {zero['labels_defined']} labels, "
            f"{result['volumes']} volumes of {result['patients']} patients"
        )
        for name in zero["labels_undefined"]:
            print(f"undefined: {name} has one class only; the mean leaves it out")
        if "histogram_mean_auroc" in controls:
            print(f"histogram control {number(controls['histogram_mean_auroc'])}")
        print(f"shuffled control {number(controls['shuffled_mean_auroc'])}")
        untrusted, fewest = zero["intervals_not_trusted"], result["intervals"]["trusted_from_patients"]
        if untrusted:
            names = ", ".join(untrusted) if len(untrusted) < len(zero["auroc"]) else "every label"
            print(f"intervals not to be trusted, with fewer than {fewest} positive or negative patients: {names}")
    error = zero["means"]["calibration_error"]["value"]
    if error is not None:
        print(f"calibration error {error:.3f} by label, {zero['pooled_calibration_error']:.3f} of all labels together")
    print(f"thresholds: {zero['thresholds']}")
    if not result["whole_set"]:
        size = result["protocol"]["size"]
        print(
            f"note: the protocol's set has {size:,} volumes, {result['volumes']:,} were scored: not comparable with published figures"
        )
    if split_note(result):
        print(f"note: {split_note(result)}")
    if "paired" in result:
        mean = result["paired"]["mean"]
        print(f"against {against}: {number(mean['difference'])} ({number(mean['lower'])} to {number(mean['upper'])}), p {number(mean['p'])}")  # fmt: skip
    if replaced:
        print(f"note: replaced the evaluation that was in {output}")
    print(f"report: {output / 'report.html'}")
