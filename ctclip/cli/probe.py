"""`ctclip probe`: linear classifiers on frozen embeddings."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from ctclip.cli.reading import BATCH, FORCE, LABEL_TABLE


class Toward(StrEnum):
    zero = "zero"
    prompts = "prompts"


def probe(
    model: str = typer.Option(..., "--model", "-m", help="The model folder. The head is saved in it."),
    store: Path = typer.Option(
        ..., help="A store written by `ctclip preprocess`, with labels of its own or the volumes that --labels lists."
    ),
    labels: Path = LABEL_TABLE,
    output: Path = typer.Option(
        Path("probe"), "--output", "-o", help="Folder for probe.csv, curve.png and the embeddings."
    ),
    percent: str = typer.Option("1,10,100", help="Percentages of the training patients to fit to."),
    shots: str = typer.Option(
        "", help="Numbers of positive, and of negative, training patients for each label, such as 1,4,16."
    ),
    draws: int = typer.Option(
        3, min=1, help="Number of random draws of patients for each percentage or number of shots."
    ),
    head: str = typer.Option(
        "probe", help="The name under which the probe of all training labels is saved in the model folder."
    ),
    toward: Toward = typer.Option(
        Toward.zero,
        help="What the weights are shrunk towards. zero: the usual probe. prompts: the model's own prompts, which is "
        "better with few labels.",
    ),
    train_split: str = typer.Option("train", help="Split to train on."),
    test_split: str = typer.Option("valid", help="Split to test on."),
    batch: int = BATCH,
    seed: int = typer.Option(0, min=0, help="Seed of the draws and of the folds."),
    force: bool = FORCE,
) -> None:
    """Fit a linear probe to labels and save it in the model folder as a head.

    `ctclip probe --model M --store store --shots 1,4,16 --output probe`

    `ctclip zero-shot --model M --head probe --store store --split valid --output predictions`

    The regularisation of each regression is chosen by cross-validation among the training patients. The head is
    label-supervised; `ctclip evaluate` and `ctclip calibrate` refuse patients that it was fitted to.
    """
    from ctclip import distributed
    from ctclip.adaptation.examples import Splits
    from ctclip.adaptation.fitting import Options, check_output, run_probe
    from ctclip.adaptation.protocol import settings_of
    from ctclip.cli.tables import print_settings
    from ctclip.errors import DataError
    from ctclip.models.folder import load_model

    settings = settings_of(percent, shots)
    if not settings:
        raise DataError("give --percent or --shots")
    check_output(output, "probe")
    options = Options(
        labels, Splits(train_split, test_split), head, draws, batch, seed, force, toward is Toward.prompts
    )
    result = run_probe(load_model(model, distributed.device()), store, output, settings, options)
    print_settings("Linear probe, held-out patients", result.summary, result.zero_shot)
    print(f"tables and curve: {output}")
    print(f"head: {result.folder} (label-supervised; `--head {head}` uses it)")
