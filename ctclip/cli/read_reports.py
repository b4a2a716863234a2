"""`ctclip read-reports`: labels from reports."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused


class Value(StrEnum):
    one = "1"
    zero = "0"
    empty = "empty"

    @property
    def number(self) -> int | None:
        return None if self is Value.empty else int(self.value)


def read_reports(
    context: typer.Context,
    reports: Path = typer.Argument(
        ...,
        help="A table with a text column, or with findings and impression columns; a .txt file with one report per line; or a store.",
    ),
    label_set: str = typer.Option(..., help="A label set: a YAML file, or the name of one in configs/labels."),
    output: Path = typer.Option(
        Path("labels.csv"), "--output", "-o", help="The table of labels to write: .csv or .parquet."
    ),
    reader: str = typer.Option("rules", help="rules, classifier, language-model, or one of your own as module:Name."),
    terms: str = typer.Option(
        None,
        help="rules: a YAML file of terms, or the name of one in configs/terms. Default: the terms of the label set.",
    ),
    language: str = typer.Option("english", help="rules: a YAML file, or the name of one in configs/languages."),
    reader_model: Path = typer.Option(None, help="classifier, language-model: the local folder of the text model."),
    threshold: float = typer.Option(
        0.5, min=0, max=1, help="classifier: a label is present at this probability or above."
    ),
    cache: Path = typer.Option(
        None,
        help="language-model: folder for answers, so that an interrupted run can resume. Default: OUTPUT.answers.",
    ),
    batch: int = typer.Option(16, min=1, help="classifier, language-model: number of reports in a batch."),
    uncertain: Value = typer.Option(Value.empty, help="Value in the table for an uncertain label."),
    not_mentioned: Value = typer.Option(Value.zero, help="Value in the table for a label that is not mentioned."),
    against: Path = typer.Option(
        None,
        help="Another table of labels to compare with; prints agreement and kappa, and writes the sentences that differ.",
    ),
    workers: int = typer.Option(None, min=1, help="rules: number of worker processes. Default: one per core."),
    force: bool = typer.Option(False, "--force", help="Overwrite the labels of another run."),
) -> None:
    """Read labels from reports: present, absent, uncertain or not mentioned, with the sentence that states it.

    `ctclip read-reports reports.csv --label-set ct_rate_18 --output labels.csv`

    `ctclip read-reports reports.csv --label-set ct_rate_18 --against published.csv`

    The sentences are written beside the labels, as labels.statements.jsonl. Exit code 3: some reports were not read.
    """
    import os

    from ctclip import distributed
    from ctclip.cli.show_readings import show_agreement, show_counts
    from ctclip.labels import load_labels
    from ctclip.report_reading.compare import compare as compare_with
    from ctclip.report_reading.reader import Options
    from ctclip.report_reading.reports import load_reports
    from ctclip.report_reading.run import Values, check_output, read_all, write_readings

    if reader in ("classifier", "language-model"):
        refuse_unused(context, "applies only to --reader rules", "terms", "workers")
    if reader in ("rules", "classifier"):
        refuse_unused(context, "applies only to --reader language-model", "cache")
    if reader in ("rules", "language-model"):
        refuse_unused(context, "applies only to --reader classifier", "threshold")
    if reader == "rules":
        refuse_unused(context, "applies only to --reader classifier and language-model", "reader_model", "batch")
    check_output(output, compared=against is not None, force=force)
    device = "cpu" if reader_model is None else str(distributed.device())
    if cache is None and reader == "language-model":
        cache = output.with_suffix(".answers")
    options = Options(terms, language, reader_model, batch, threshold, cache, device)
    values = Values(uncertain.number, not_mentioned.number)
    workers = workers or len(os.sched_getaffinity(0))
    result = read_all(load_reports(reports), load_labels(label_set), reader, options, workers)
    compared = compare_with(result, against, values) if against is not None else None
    written, statements = write_readings(result, output, values, force=force)
    show_counts(result)
    if compared is not None:
        show_agreement(*compared, output)
    for note in result.notes:
        print(f"note: {note}")
    print(f"labels: {written} ({len(result.readings)} reports, {result.reader})")
    print(f"sentences: {statements}")
    if any(reading is None for reading in result.readings):
        raise typer.Exit(3)
