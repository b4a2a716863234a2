"""`ctclip evaluate`: metrics with confidence intervals from predictions and labels."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Thresholds(StrEnum):
    calibration = "calibration"
    published = "published"


def evaluate(
    predictions: Path = typer.Argument(..., help="predictions.csv (or .parquet) written by `ctclip zero-shot`."),
    labels: Path = typer.Option(None, help="A CSV of labels or a cohort table. Default: the labels in the store."),
    protocol: str = typer.Option(
        None, help="A YAML file, or the name of one in configs/protocols. Default: the protocol of the label set."
    ),
    output: Path = typer.Option(
        Path("evaluation"), "--output", "-o", help="Folder for metrics.json, the figures and report.html."
    ),
    store: Path = typer.Option(
        None, help="The store of the volumes; adds the histogram control and example slices to the report."
    ),
    run: Path = typer.Option(
        None, help="The folder of the training run; adds its loss curve and configuration to the report."
    ),
    cohort: Path = typer.Option(
        None,
        help="With --store and --masks: the cohort that the store was made of. Example slices of the report then go "
        "through the smallest finding of each.",
    ),
    masks: Path = typer.Option(None, help="Masks of the cohort, laid out as those of `ctclip phantom`."),
    against: Path = typer.Option(None, help="Predictions of another model for the same volumes; adds a paired test."),
    calibration: Path = typer.Option(
        None, help="calibration.json of the model, for its probabilities and decision thresholds."
    ),
    thresholds: Thresholds = typer.Option(
        None,
        help="Where decision thresholds come from. calibration: the calibration split; published: the evaluated "
        "volumes themselves, as CT-CLIP does. Default: as the protocol says.",
    ),
    bootstrap: int = typer.Option(
        None, min=10, help="Number of bootstrap resamples of patients. Default: as the protocol says."
    ),
    seed: int = typer.Option(0, help="Seed of the bootstrap and of the shuffled control."),
    force: bool = typer.Option(False, "--force", help="Overwrite the evaluation of another run."),
) -> None:
    """Evaluate predictions by a protocol: AUROC with confidence intervals bootstrapped by patient, controls, retrieval.

    `ctclip evaluate predictions/predictions.csv --labels labels.csv --protocol ct_rate --output evaluation`

    `ctclip evaluate ours.csv --against theirs.csv --labels labels.csv --output compared`
    """
    from ctclip.errors import DataError
    from ctclip.evaluation.pages import number, split_note
    from ctclip.evaluation.run_evaluation import run_evaluation
    from ctclip.inference.focus import smallest_finding
    from ctclip.preprocessing.store import VolumeStore

    if (cohort is None) != (masks is None) or (masks is not None and store is None):
        raise DataError("--cohort and --masks go together, with --store")
    focus = None
    if cohort is not None and masks is not None:
        focus = smallest_finding(cohort, masks, VolumeStore(store).spec)
    replaced = (output / "metrics.json").exists()
    result = run_evaluation(
        predictions, output, protocol, labels=labels, store=store, run=run, against=against, calibration=calibration,
        thresholds=thresholds.value if thresholds is not None else None, bootstrap=bootstrap, seed=seed, force=force,
        focus=focus,
    )  # fmt: skip
    zero, controls = result["zero_shot"], result["controls"]
    if result["patients"] == 1:
        print(
            "note: there is only one patient: intervals cannot be computed, and the metrics say nothing about other "
            "patients"
        )
    if zero["mean_auroc"] is None:
        print(f"mean AUROC undefined: every label has only one class ({result['volumes']} volumes)")
    else:
        low, high = map(number, zero["mean_auroc_interval"])
        print(
            f"mean AUROC {zero['mean_auroc']:.3f} ({low} to {high}) over {zero['labels_defined']} labels, "
            f"{result['volumes']} volumes of {result['patients']} patients"
        )
        for name in zero["labels_undefined"]:
            print(f"undefined: {name} has only one class and is not part of the mean")
        if "histogram_mean_auroc" in controls:
            print(f"histogram control {number(controls['histogram_mean_auroc'])}")
        print(f"shuffled control {number(controls['shuffled_mean_auroc'])}")
        untrusted, fewest = zero["intervals_not_trusted"], result["intervals"]["trusted_from_patients"]
        if untrusted:
            names = ", ".join(untrusted) if len(untrusted) < len(zero["auroc"]) else "every label"
            print(f"intervals not to be trusted (fewer than {fewest} positive or negative patients): {names}")
    error = zero["means"]["calibration_error"]["value"]
    if error is not None:
        print(
            f"calibration error {error:.3f} by label, {zero['pooled_calibration_error']:.3f} over all labels together"
        )
    print(f"thresholds: {zero['thresholds']}")
    if not result["whole_set"]:
        size = result["protocol"]["size"]
        print(
            f"note: the protocol's test set has {size:,} volumes but {result['volumes']:,} were scored, so the "
            "metrics are not comparable with published ones"
        )
    if split_note(result):
        print(f"note: {split_note(result)}")
    if "paired" in result:
        mean = result["paired"]["mean"]
        print(f"against {against}: {number(mean['difference'])} ({number(mean['lower'])} to {number(mean['upper'])}), p {number(mean['p'])}")  # fmt: skip
    if replaced:
        print(f"note: replaced the previous evaluation in {output}")
    print(f"report: {output / 'report.html'}")
