"""`ctclip soup`: average the weights of several models."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import BATCH


def soup(
    runs: list[Path] = typer.Argument(..., help="Run folders of one recipe, or their model folders."),
    store: Path = typer.Option(..., help="The store with the patients used for selection."),
    split: str = typer.Option("calibration", help="Split used for selection. Never use the split that you test on."),
    output: Path = typer.Option(..., "--output", "-o", help="The model folder to write, if the mean is better."),
    batch: int = BATCH,
    force: bool = typer.Option(False, "--force", help="Replace a model that is already there."),
) -> None:
    """Average the weights of models that started from the same weights, and save the mean if it is better than each of them.

    `ctclip soup runs/a runs/b runs/c --store store --split calibration --output soup`

    Models are added in the order of their zero-shot AUROC on the split; one that makes the mean worse is left out. Exit code
    3: no mean is better than the best model, and nothing was written.
    """
    from ctclip.adaptation.soup import make_soup
    from ctclip.models.folder import check_new

    check_new(output, force=force)
    averaged = make_soup(runs, store, split, output, batch=batch)
    for name, value in sorted(averaged.alone.items(), key=lambda item: -item[1]):
        print(f"{value:.4f}  {name}")
    if averaged.folder is None:
        print(f"no mean is better than {averaged.members[0]} on split {split}: nothing written")
        raise typer.Exit(3)
    print(f"{averaged.auroc:.4f}  the mean of {', '.join(averaged.members)}")
    print(f"model: {averaged.folder}")
