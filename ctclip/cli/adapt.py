"""`ctclip adapt`: fit a model to scans of your own, by one of several methods."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import typer

from ctclip.cli.reading import LABEL_TABLE
from ctclip.cli.unused import refuse_unused


class AdaptMethod(StrEnum):
    coop = "coop"
    caption = "caption"
    prior = "prior"
    locate = "locate"
    decode = "decode"
    vocabfine = "vocabfine"
    classfine = "classfine"
    lora = "lora"
    full = "full"
    last_layers = "last-layers"


# Methods that save a head in the model folder, and train in one process.
HEADS = (AdaptMethod.coop, AdaptMethod.caption, AdaptMethod.prior, AdaptMethod.locate, AdaptMethod.decode)


def adapt(
    context: typer.Context,
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Values that override the recipe, such as training.epochs=5."
    ),
    method: AdaptMethod = typer.Option(
        ...,
        help="coop: learn prompts, in seconds to minutes. caption: learn to write reports. prior: learn to map texts "
        "to volume embeddings. locate: learn which part of a volume a text describes. decode: learn to generate "
        "volumes from texts. The other methods train encoders; see above.",
    ),
    model: str = typer.Option(
        ..., "--model", "-m", help="The model folder to start from, which may be an imported checkpoint."
    ),
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess` with the model's spec."),
    output: Path = typer.Option(
        ...,
        "--output",
        "-o",
        help="The run folder; with coop, caption, prior, locate and decode, the folder for tables.",
    ),
    labels: Path = LABEL_TABLE,
    config: str = typer.Option(
        None,
        "--config",
        "-c",
        help="A recipe to use instead of configs/adapt/METHOD.yaml: a YAML file, or the name of one there.",
    ),
    shots: int = typer.Option(
        None, min=1, help="Number of positive, and of negative, training patients to use for each label. Default: all."
    ),
    percent: float = typer.Option(100.0, help="Percentage of the training patients whose labels are used."),
    head: str = typer.Option(
        None,
        help="coop, caption, prior, locate, decode: the name under which the head is saved in the model folder. Default: the method's.",
    ),
    draws: int = typer.Option(
        1, min=1, help="coop: number of random draws of patients; the head of the first draw is saved."
    ),
    train_split: str = typer.Option("train", help="Split to train on."),
    test_split: str = typer.Option("valid", help="coop: split to test on."),
    seed: int = typer.Option(0, min=0, help="Seed of the draws and of the training."),
    merge: bool = typer.Option(False, "--merge-adapters", help="lora: merge the adapters into the weights at the end."),
    processes: int = typer.Option(
        1, min=1, help="Number of DeepSpeed processes to start on this machine. Leave it at 1 under a launcher."
    ),
    force: bool = typer.Option(
        False,
        "--force",
        help="Overwrite the tables of another run, or resume a run although its configuration or data have changed.",
    ),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Set by the DeepSpeed launcher."),
) -> None:
    """Adapt a model to your own scans.

    `ctclip adapt --method coop --model M --store store --shots 16 --output adapted`

    `ctclip adapt --method vocabfine --model M --store store --output runs/vocabfine`

    coop learns prompts on frozen embeddings, and saves them in the model folder as a head.

    caption trains a decoder that writes reports, on frozen tokens of the volumes, and saves it as a head for `ctclip draft`; it
    reads no labels.

    prior learns, on frozen embeddings, a map from the embedding of a text to embeddings of matching volumes, and saves
    it as a head; it reads no labels.

    locate learns, on frozen features, which cells of a volume the sentences of its report describe, and saves a locator
    as a head, which `ctclip explain` and `ctclip find` use for their maps; it reads no labels and no masks.

    decode trains a decoder that generates volumes from the embeddings of the frozen model, and saves it as a head for
    `ctclip imagine`; it reads no labels. A run that was stopped resumes.

    The other methods train, write a new model folder, and resume as `ctclip train` does: vocabfine fits the scores of
    the prompts to labels; classfine fits a linear layer; lora and last-layers train like vocabfine with fewer
    parameters; full continues the contrastive training on pairs of volumes and reports.
    """
    from ctclip import distributed
    from ctclip.adaptation.protocol import Setting

    if method not in HEADS:
        refuse_unused(context, "applies only to methods that save a head: " + ", ".join(HEADS), "head")
    else:
        refuse_unused(context, f"does not apply to --method {method.value}, which trains in one process", "processes")
        distributed.refuse_ranks(f"--method {method.value}")
    if method is not AdaptMethod.coop:
        refuse_unused(context, "applies only to --method coop", "draws", "test_split")
    if method is not AdaptMethod.lora:
        refuse_unused(context, "applies only to --method lora", "merge")
    if shots is not None:
        refuse_unused(context, "does not apply to --shots: give one of them", "percent")
    setting = Setting("shots", shots) if shots is not None else Setting("fraction", percent)
    if method is AdaptMethod.coop:
        _coop(overrides or [], model, store, output, labels, config, setting, head or "coop", draws, (train_split, test_split), seed, force)  # fmt: skip
        return
    if method in HEADS:
        _unlabelled(
            method, overrides or [], model, store, output, labels, config, setting, head, train_split, seed, force
        )
        return
    from ctclip import extras
    from ctclip.models.folder import local_folder

    extras.check("train")
    from ctclip.adaptation.recipes import Recipe, configured

    recipe = Recipe(
        method.value, model, store, labels, config, tuple(overrides or ()), setting, train_split, seed, merge
    )
    if processes > 1 and not distributed.launched():
        # Errors are reported here once, instead of by every rank.
        configured(recipe, local_folder(model), output)
        raise typer.Exit(distributed.launch(processes, "ctclip.adapt", context.obj))
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
    from ctclip.adaptation.fitting import Options, check_output, run_coop
    from ctclip.adaptation.protocol import Setting
    from ctclip.cli.tables import print_contexts, print_settings
    from ctclip.config_files import find_config, load_section
    from ctclip.models.folder import load_model

    assert isinstance(setting, Setting)
    check_output(output, "coop")
    chosen = load_section(CoopConfig, find_config(config or "coop", "adapt"), overrides)
    options = Options(labels, Splits(*splits), head, draws, seed=seed, force=force)
    result = run_coop(load_model(model, distributed.device()), store, output, setting, chosen, options)
    print_settings("Learned prompts, held-out patients", result.summary, result.zero_shot)
    print_contexts(result.head)
    print(f"tables: {output}")
    print(f"head: {result.folder} (label-supervised; `--head {head}` uses it)")


def _unlabelled(
    method: AdaptMethod, overrides: list[str], model: str, store: Path, output: Path, labels: Path | None,
    config: str | None, setting: object, head: str | None, split: str, seed: int, force: bool,
) -> None:  # fmt: skip
    """Heads that learn from reports alone."""
    from ctclip import distributed
    from ctclip.adaptation import caption, decode, decode_config, locate, prior
    from ctclip.adaptation.protocol import Setting
    from ctclip.config_files import find_config, load_section
    from ctclip.errors import ConfigError
    from ctclip.models.folder import load_model
    from ctclip.schema import Section

    if labels is not None or setting != Setting("fraction", 100.0):
        raise ConfigError(f"--method {method.value} reads no labels: leave out --labels, --shots and --percent")
    path, name = find_config(config or method.value, "adapt"), head or method.value
    kinds: dict[AdaptMethod, tuple[type[Section], Callable[..., Path], str, str]] = {
        AdaptMethod.caption: (caption.CaptionConfig, caption.run_caption, caption.LOSSES, f"`ctclip draft --head {name}` uses it"),
        AdaptMethod.locate: (locate.LocateConfig, locate.run_locate, locate.LOSSES, "`ctclip explain` uses it: --method learned"),
        AdaptMethod.decode: (decode_config.DecodeConfig, decode.run_decode, decode.LOSSES, "`ctclip imagine` generates "
                                                                                    "volumes with it"),
        AdaptMethod.prior: (prior.PriorConfig, prior.run_prior, prior.LOSSES, f"`ctclip zero-shot --head {name}` scores with it"),
    }  # fmt: skip
    section, run, losses, use = kinds[method]
    chosen = load_section(section, path, overrides)
    loaded = load_model(model, distributed.device())
    folder = run(loaded, store, output, chosen, head=name, split=split, seed=seed, force=force)
    print(f"losses: {output / losses}")
    print(f"head: {folder} ({use})")
