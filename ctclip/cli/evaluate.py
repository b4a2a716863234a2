"""`ctclip evaluate`: metrics with confidence intervals from predictions and labels."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused


class Thresholds(StrEnum):
    calibration = "calibration"
    published = "published"


def evaluate(
    context: typer.Context,
    predictions: Path = typer.Argument(None, help="predictions.csv (or .parquet) written by `ctclip zero-shot`."),
    reports: Path = typer.Option(
        None, help="Instead of predictions: drafts.csv written by `ctclip draft --store`; needs --store."
    ),
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
        help="With --store and --masks: the cohort that the store was preprocessed from. Example slices of the report "
        "then go "
        "through the smallest finding of each.",
    ),
    masks: Path = typer.Option(None, help="Masks of the cohort, in the layout of `ctclip phantom`."),
    against: list[Path] = typer.Option(
        None,
        help="Predictions of another model for the same volumes; adds a paired test. With --reports: other drafts of the "
        "same volumes, such as those of `ctclip draft --method retrieval`. May be repeated with --reports.",
    ),
    calibration: Path = typer.Option(
        None, help="calibration.json of the model, for its probabilities and decision thresholds."
    ),
    thresholds: Thresholds = typer.Option(
        None,
        help="Origin of the decision thresholds. calibration: the calibration split; published: the evaluated "
        "volumes themselves, as CT-CLIP does. Default: set by the protocol.",
    ),
    bootstrap: int = typer.Option(
        None, min=10, help="Number of bootstrap resamples of patients. Default: set by the protocol."
    ),
    label_set: str = typer.Option(
        None, help="With --reports: the findings to read. Default: the label set of the store."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of the bootstrap and of the shuffled control."),
    force: bool = typer.Option(False, "--force", help="Overwrite the evaluation of another run."),
) -> None:
    """Evaluate predictions by a protocol: AUROC with confidence intervals bootstrapped by patient, controls, retrieval.

    `ctclip evaluate predictions/predictions.csv --labels labels.csv --protocol ct_rate --output evaluation`

    `ctclip evaluate ours.csv --against theirs.csv --labels labels.csv --output compared`

    `ctclip evaluate --reports drafts.csv --store store --against retrieval.csv --output drafted`
    """
    from ctclip.errors import DataError

    if (predictions is None) == (reports is None):
        raise DataError("give either predictions or --reports")
    if reports is None:
        refuse_unused(context, "needs --reports", "label_set")
    else:
        unused = ("labels", "protocol", "run", "cohort", "masks", "calibration", "thresholds")
        refuse_unused(context, "applies to predictions, not to --reports", *unused)
        _evaluate_reports(reports, store, output, against or [], label_set, bootstrap or 1000, seed, force)
        return
    if against is not None and len(against) > 1:
        raise DataError("give --against once; only --reports takes it several times")
    other = against[0] if against else None
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
        predictions, output, protocol, labels=labels, store=store, run=run, against=other, calibration=calibration,
        thresholds=thresholds.value if thresholds is not None else None, bootstrap=bootstrap, seed=seed, force=force,
        focus=focus,
    )  # fmt: skip
    zero, controls = result["zero_shot"], result["controls"]
    if result["patients"] == 1:
        print(
            "note: there is only one patient: intervals cannot be computed, and the metrics may not apply to other "
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
            print(f"unreliable intervals (fewer than {fewest} positive or negative patients): {names}")
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
        print(f"against {other}: {number(mean['difference'])} ({number(mean['lower'])} to {number(mean['upper'])}), p {number(mean['p'])}")  # fmt: skip
    if replaced:
        print(f"note: replaced the previous evaluation in {output}")
    print(f"report: {output / 'report.html'}")


def _evaluate_reports(
    drafts: Path, store: Path | None, output: Path, against: list[Path], label_set: str | None, bootstrap: int, seed: int,
    force: bool,
) -> None:  # fmt: skip
    from ctclip.cli.tables import print_report_scores
    from ctclip.errors import DataError
    from ctclip.evaluation.run_reports import FILES, run_reports

    if store is None:
        raise DataError("--reports needs --store, the store with the radiologists' reports of the same volumes")
    result = run_reports(
        drafts, store, output, against=against, label_set=label_set, bootstrap=bootstrap, seed=seed, force=force
    )
    print_report_scores(result)
    print(f"report: {output / FILES[-1]}")
