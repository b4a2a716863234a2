"""`ctclip soup`: the mean of several models' weights."""

from __future__ import annotations

from pathlib import Path

import typer


def soup(
    runs: list[Path] = typer.Argument(..., help="Runs of one recipe, or their model folders."),
    store: Path = typer.Option(..., help="The store whose held-out patients decide."),
    split: str = typer.Option("calibration", help="Split that decides: never the one that is tested."),
    output: Path = typer.Option(..., "--output", "-o", help="Where the model folder is written, if it is better."),
    batch: int = typer.Option(8, min=1, help="Volumes encoded at once."),
) -> None:
    """Average the weights of models that began with the same weights, and keep the mean if it is better than each.

    `ctclip soup runs/a runs/b runs/c --store store --split calibration --output soup`

    Models are added in the order of their zero-shot AUROC on the split, as long as the mean does not get worse. Exit code 3:
    no mean is better than the best model, and nothing was written.
    """
    from ctclip.adaptation.soup import make_soup

    made = make_soup(runs, store, split, output, batch=batch)
    for name, value in sorted(made.alone.items(), key=lambda item: -item[1]):
        print(f"{value:.4f}  {name}")
    if made.folder is None:
        print(f"no mean is better than {made.members[0]} on split {split}: nothing written")
        raise typer.Exit(3)
    print(f"{made.auroc:.4f}  the mean of {', '.join(made.members)}")
    print(f"model: {made.folder}")
