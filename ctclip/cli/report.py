"""`ctclip report`: one page of an evaluation, or of two side by side."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    first: Path = typer.Argument(..., help="A folder of `ctclip evaluate` (or of the demo)."),
    second: Path = typer.Argument(None, help="Another, to stand beside it."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The page."),
) -> None:
    """A self-contained page of an evaluation, or of two side by side, with the published figures for context.

    `ctclip report runs/first/evaluation runs/second/evaluation --output compared.html`
    """
    from ctclip.evaluation.run_report import compare_reports

    replaced = output.exists()
    page = compare_reports(first, second, output)
    if replaced:
        print(f"note: replaced the page that was at {page}")
    print(f"report: {page}")
