"""`ctclip imagine`: generate synthetic volumes from texts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused


class ImagineMethod(StrEnum):
    decoder = "decoder"
    dream = "dream"


def imagine(
    context: typer.Context,
    texts: list[str] = typer.Argument(
        ..., metavar="TEXT...", help="One or more texts, worded like sentences of a report."
    ),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    output: Path = typer.Option(
        ..., "--output", "-o", help="A NIfTI file, .nii.gz or .nii; the word synthetic is added to its name."
    ),
    method: ImagineMethod = typer.Option(
        None,
        help="decoder: generate a volume from noise with the decoder trained by `ctclip adapt --method decode`. dream: "
        "change a volume step by step until its embedding matches the text. Default: decoder if the model has "
        "one, else dream.",
    ),
    store: Path = typer.Option(
        None, help="dream: start from the mean volume of this store. Default: start from noise."
    ),
    split: str = typer.Option("train", help="The split of --store."),
    number: int = typer.Option(1, "--number", "-n", min=1, max=10_000, help="Number of volumes for each text."),
    steps: int = typer.Option(
        None, min=1, max=1000, help="Number of steps for each volume. Default: 25 for decoder, 100 for dream."
    ),
    guidance: float = typer.Option(
        None,
        min=0,
        max=100,
        help="decoder: how much the text is exaggerated; 1: not at all. Default: 4.",
    ),
    decoder: str = typer.Option(None, help="decoder: the name of its head. Default: the first decoder of the model."),
    seed: int = typer.Option(
        0, min=0, help="Seed of the first volume of each text; further volumes use the numbers that follow."
    ),
    head: str = typer.Option("prompts", help="The head that scores the volumes afterwards."),
    language: str = typer.Option(
        "english", help="Language of the texts: a YAML file, or the name of one in configs/languages."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite files that are not synthetic volumes."),
) -> None:
    """Generate synthetic volumes that match a text, to show what a model associates with the text.

    `ctclip imagine "Moderate effusion on the left." --model runs/demo/train/model --store runs/demo/store --output x.nii.gz`

    The volumes are NIfTI in HU on the grid of the model, and marked as synthetic in name, header and page. A decoder
    generates volumes like those in its training data with such a text; a dream shows what raises the score of the
    model, which need not look like a scan. For research only.
    """
    from ctclip import distributed
    from ctclip.imagining.imagine import Imagining
    from ctclip.imagining.imagine import imagine as imagined
    from ctclip.imagining.synthetic import check_output, page_file, write_volumes
    from ctclip.inference.model import load

    if store is None:
        refuse_unused(context, "needs --store", "split")
    check_output(output, len(texts) * number, force=force)
    loaded = load(model, distributed.device())
    detector = loaded.head(head)
    given = Imagining(
        number, seed, steps, store, split, language, None if method is None else method.value, guidance, decoder
    )
    volumes = imagined(loaded.folder, detector, texts, given)
    for path, one in write_volumes(output, volumes, len(texts) * number, loaded.spec, force=force):
        print(f"synthetic: {path} ({one.text} {one.words})")
    print(f"page: {page_file(output)}")
    for caveat in loaded.folder.trained_on.caveats():
        print(f"warning: {caveat}")
