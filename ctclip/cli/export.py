"""`ctclip export`: a model folder of any checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import typer


def export(
    run: Path = typer.Argument(..., help="A run folder of `ctclip train`."),
    output: Path = typer.Option(..., "--output", "-o", help="The model folder to write."),
    checkpoint: str = typer.Option("newest", help="newest, best (lowest validation loss), or a step."),
) -> None:
    """Write the model folder of a checkpoint, of a finished run or of one that goes on.

    `ctclip export runs/first --checkpoint best --output models/first`
    """
    from ctclip.training.export import export_checkpoint

    taken = export_checkpoint(run, output, checkpoint)
    print(f"model: {output} (from {taken})")
