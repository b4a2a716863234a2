"""`ctclip report`: a page with one evaluation, or with two side by side."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    first: Path = typer.Argument(..., help="A folder written by `ctclip evaluate` or `ctclip demo`."),
    second: Path = typer.Argument(None, help="A second one, to compare with the first."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The HTML file to write."),
) -> None:
    """Write a self-contained page with one evaluation, or with two side by side, and published results for context.

    `ctclip report runs/first/evaluation runs/second/evaluation --output compared.html`
    """
    from ctclip.evaluation.run_report import compare_reports

    replaced = output.exists()
    page = compare_reports(first, second, output)
    if replaced:
        print(f"note: replaced the previous page at {page}")
    print(f"report: {page}")
