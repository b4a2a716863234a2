"""`ctclip clean-reports`: sections, sentences and findings of reports."""

from __future__ import annotations

from pathlib import Path

import typer


def clean_reports(
    reports: Path = typer.Argument(
        ...,
        help="A table with a text column, or with findings and impression columns; a .txt file with one report per line; or a store.",
    ),
    label_set: str = typer.Option(..., help="A label set: a YAML file, or the name of one in configs/labels."),
    output: Path = typer.Option(Path("findings.csv"), "--output", "-o", help="The table to write: .csv or .parquet."),
    terms: str = typer.Option(
        None, help="A YAML file of terms, or the name of one in configs/terms. Default: the terms of the label set."
    ),
    language: str = typer.Option("english", help="A YAML file, or the name of one in configs/languages."),
    force: bool = typer.Option(False, "--force", help="Overwrite an existing table."),
) -> None:
    """Split reports into sections, sentences and findings, each finding with side, lobe, size and certainty.

    `ctclip clean-reports reports.csv --label-set ct_rate_18 --output findings.csv`

    Sentences that compare with an earlier examination, and sentences that do not describe the scan, are marked. Misspellings
    that the language lists are corrected.
    """
    from ctclip.labels import load_labels
    from ctclip.report_reading.clean import check_findings, write_findings
    from ctclip.report_reading.clean import clean_reports as clean
    from ctclip.report_reading.findings import Cleaner
    from ctclip.report_reading.reader import Options
    from ctclip.report_reading.reports import load_reports
    from ctclip.report_reading.rules import RulesReader
    from ctclip.report_reading.run import unread_notes

    check_findings(output, force=force)
    reader = RulesReader.build(load_labels(label_set), Options(terms=terms, language=language))
    source = load_reports(reports)
    table = clean(source, Cleaner(reader))
    foreign = {text for text in set(source.texts()) if reader.is_foreign(text)}
    write_findings(table, output, force=force)
    for note in unread_notes(source, foreign, language, "findings are not listed"):
        print(f"note: {note}")
    findings = int((table["label"] != "").sum())
    marked = ", ".join(f"{int(table[name].sum())} {name}" for name in ("comparison", "boilerplate"))
    print(f"findings: {output} ({len(table)} rows, {findings} findings; marked: {marked})")
