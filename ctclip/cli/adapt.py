"""`ctclip adapt`: a model of one's own from labels or pairs, by the method that is named."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class AdaptMethod(StrEnum):
    coop = "coop"
    vocabfine = "vocabfine"
    classfine = "classfine"
    lora = "lora"
    full = "full"
    last_layers = "last-layers"


def adapt(
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Values that replace the recipe's."),
    method: AdaptMethod = typer.Option(..., help="coop learns prompts in seconds; the others train the encoders."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder to begin with, an imported checkpoint's too."),
    store: Path = typer.Option(..., help="A store of `ctclip preprocess`, with the model's spec."),
    output: Path = typer.Option(..., "--output", "-o", help="Run folder (coop: folder of its tables)."),
    labels: Path = typer.Option(None, help="Your own labels: a CSV with a column 'volume' and columns of 0 and 1."),
    config: str = typer.Option(None, "--config", "-c", help="A recipe in place of configs/adapt/METHOD.yaml."),
    shots: int = typer.Option(None, min=1, help="Positive and negative training patients a label."),
    fraction: float = typer.Option(100.0, help="Share of the training patients whose labels are used, in per cent."),
    head: str = typer.Option("coop", help="coop: name under which the head is kept with the model."),
    draws: int = typer.Option(1, min=1, help="coop: draws of patients; the head of the first is kept."),
    train_split: str = typer.Option("train", help="Split that is adapted to."),
    test_split: str = typer.Option("valid", help="coop: split that is scored."),
    seed: int = typer.Option(0, min=0, help="Of the draws and the training."),
    merge: bool = typer.Option(False, "--merge", help="lora: fold the adapters into the weights of the model folder."),
    processes: int = typer.Option(1, min=1, help="Start this many DeepSpeed processes here."),
    force: bool = typer.Option(False, "--force", help="Replace other tables, or continue another run's folder."),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Set by the deepspeed launcher."),
) -> None:
    """Adapt a model to your own scans.

    `ctclip adapt --method coop --model M --store store --shots 16 --output adapted`

    `ctclip adapt --method vocabfine --model M --store store --output runs/vocabfine`

    coop learns the words of prompts on frozen embeddings and keeps them with the model as a head. vocabfine fits the
    prompts' scores to labels, classfine a linear layer, full continues the contrast on your pairs; lora and last-layers do
    what vocabfine does with few parameters. Those end with a model folder and resume as `ctclip train` does.
    """
    from ctclip.adaptation.protocol import Setting

    setting = Setting("shots", shots) if shots is not None else Setting("fraction", fraction)
    if method is AdaptMethod.coop:
        _coop(overrides or [], model, store, output, labels, config, setting, head, draws, (train_split, test_split), seed, force)  # fmt: skip
        return
    from ctclip import distributed, extras
    from ctclip.models.folder import local_folder

    extras.check("train")
    from ctclip.adaptation.recipes import Recipe, configured

    recipe = Recipe(
        method.value, model, store, labels, config, tuple(overrides or ()), setting, train_split, seed, merge
    )
    if processes > 1 and not distributed.launched():
        # What is wrong is said here, once, and not by every rank.
        configured(recipe, local_folder(model), output)
        raise typer.Exit(distributed.launch(processes, "ctclip.adapt"))
    distributed.prepare_environment()
    from ctclip.adaptation.recipes import run_recipe
    from ctclip.training.loop import INTERRUPTED, Interrupted

    try:
        folder = run_recipe(recipe, output, force=force)
    except Interrupted as reason:
        if distributed.launched_rank() == 0:
            print(f"interrupted: {reason}", flush=True)
        raise typer.Exit(INTERRUPTED) from reason
    if distributed.launched_rank() == 0:
        print(f"model: {folder}")


def _coop(
    overrides: list[str], model: str, store: Path, output: Path, labels: Path | None, config: str | None, setting: object,
    head: str, draws: int, splits: tuple[str, str], seed: int, force: bool,
) -> None:  # fmt: skip
    from ctclip import distributed
    from ctclip.adaptation.coop import CoopConfig
    from ctclip.adaptation.examples import Splits
    from ctclip.adaptation.fitting import Options, run_coop
    from ctclip.adaptation.protocol import Setting
    from ctclip.cli.tables import print_contexts, print_settings
    from ctclip.config_files import find_config, load_section
    from ctclip.models.folder import load_model

    assert isinstance(setting, Setting)
    chosen = load_section(CoopConfig, find_config(config or "coop", "adapt"), overrides)
    options = Options(labels, Splits(*splits), head, draws, seed=seed, force=force)
    result = run_coop(load_model(model, distributed.device()), store, output, setting, chosen, options)
    print_settings("Learned prompts, held-out patients", result.summary, result.zero_shot)
    print_contexts(result.head)
    print(f"tables: {output}")
    print(f"head: {result.folder} (label-supervised; `--head {head}` uses it)")
