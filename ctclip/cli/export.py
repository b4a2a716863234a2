"""`ctclip export`: write a model folder from any checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import typer


def export(
    run: Path = typer.Argument(..., help="A run folder of `ctclip train`."),
    output: Path = typer.Option(..., "--output", "-o", help="The model folder to write."),
    checkpoint: str = typer.Option(
        "newest", help="Which checkpoint: newest, best (lowest validation loss), or the number of a step."
    ),
    force: bool = typer.Option(False, "--force", help="Replace a model that is already there."),
) -> None:
    """Write a model folder from a checkpoint of a run, finished or still training.

    `ctclip export runs/first --checkpoint best --output models/first`
    """
    from ctclip.models.folder import check_new
    from ctclip.training.export import export_checkpoint

    check_new(output, force=force)
    source = export_checkpoint(run, output, checkpoint)
    print(f"model: {output} (from {source})")
