"""`ctclip probe`: a classifier on frozen embeddings, from as many labels as there are."""

from __future__ import annotations

from pathlib import Path

import typer


def probe(
    model: str = typer.Option(..., "--model", "-m", help="A model folder; the head is kept in it."),
    store: Path = typer.Option(..., help="A store of `ctclip preprocess` with labels, or the volumes of --labels."),
    labels: Path = typer.Option(None, help="Your own labels: a CSV with a column 'volume' and columns of 0 and 1."),
    output: Path = typer.Option(
        Path("probe"), "--output", "-o", help="Folder for probe.csv, curve.png and the embeddings."
    ),
    fractions: str = typer.Option("1,10,100", help="Shares of the training patients in per cent."),
    shots: str = typer.Option("", help="Positive and negative training patients a label, such as 1,4,16."),
    draws: int = typer.Option(3, min=1, help="Draws of patients for each share or number of shots."),
    head: str = typer.Option("probe", help="Name under which the probe of all training labels is kept."),
    train_split: str = typer.Option("train", help="Split that is fitted to."),
    test_split: str = typer.Option("valid", help="Split that is scored."),
    batch: int = typer.Option(8, min=1, help="Volumes encoded at once."),
    seed: int = typer.Option(0, min=0, help="Of the draws and the folds."),
    force: bool = typer.Option(False, "--force", help="Replace the tables of another probe."),
) -> None:
    """Fit a linear probe to labels and keep it with the model as a head.

    `ctclip probe --model M --store store --shots 1,4,16 --output probe`

    `ctclip zero-shot --model M --head probe --store store --split valid --output predictions`

    The strength of each regression is chosen by cross-validation inside the training patients. The head is
    label-supervised, and patients it was fitted to are refused in a test and in a calibration.
    """
    from ctclip import distributed
    from ctclip.adaptation.examples import Splits
    from ctclip.adaptation.fitting import Options, run_probe
    from ctclip.adaptation.protocol import settings_of
    from ctclip.cli.tables import print_settings
    from ctclip.errors import DataError
    from ctclip.models.folder import load_model

    settings = settings_of(fractions, shots)
    if not settings:
        raise DataError("give --fractions or --shots")
    options = Options(labels, Splits(train_split, test_split), head, draws, batch, seed, force)
    result = run_probe(load_model(model, distributed.device()), store, output, settings, options)
    print_settings("Linear probe, held-out patients", result.summary, result.zero_shot)
    print(f"tables and curve: {output}")
    print(f"head: {result.folder} (label-supervised; `--head {head}` uses it)")
