"""`ctclip summarise`: save a summary of the training scans with a model, to detect scans unlike them."""

from __future__ import annotations

from pathlib import Path

import typer


def summarise(
    model: str = typer.Option(..., "--model", "-m", help="The model folder. The summary is saved in it."),
    store: Path = typer.Option(..., help="The store written by `ctclip preprocess` that the model was trained on."),
    split: str = typer.Option("train", help="The split that the model was trained on."),
    held_out: str = typer.Option(
        None,
        help="A split of patients that the model has not seen, which sets the limit. Default: calibration, if the "
        "store has it; else folds of the training patients.",
    ),
    rate: float = typer.Option(
        0.01, min=0.001, max=0.2, help="Fraction of similar scans that may be flagged as unusual."
    ),
    patients: int = typer.Option(300, min=20, help="Maximum number of patients from each split, drawn at random."),
    seed: int = typer.Option(0, min=0, help="Seed of the draw and of the folds."),
) -> None:
    """Summarise a model's training scans, so that it warns of scans unlike them.

    `ctclip summarise --model runs/demo/train/model --store store`

    `ctclip train` does this at the end. Afterwards `ctclip zero-shot`, `model.detect` and the page of `ctclip serve` warn
    of scans that are far from the training scans: another part of the body, thicker slices, half a chest.
    """
    from ctclip import distributed
    from ctclip.drift.summary import FEWEST, FILE
    from ctclip.errors import DataError
    from ctclip.inference.drift import summarise as run
    from ctclip.preprocessing.store import VolumeStore

    summary = run(
        model,
        VolumeStore(store),
        distributed.device(),
        split=split,
        held_out=held_out,
        most=patients,
        rate=rate,
        seed=seed,
    )
    if summary is None:
        raise DataError(
            f"{store}: fewer than {FEWEST} patients of a split can be read, too few to describe the training scans"
        )
    held = f", limit from {summary.held_out} held-out patients" if summary.held_out else ", limit by cross-validation"
    print(f"summary of {summary.patients} patients{held}; {summary.rate:.1%} of such scans exceed it")
    print(f"written: {FILE} in {model}")
