"""`ctclip publish`: a model folder with a full card, on disk and on the hub."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused


def publish(
    context: typer.Context,
    model: str = typer.Argument(..., help="A model folder."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the copy to publish."),
    licence: str = typer.Option(
        ...,
        "--licence",
        "--license",
        help="Licence of the weights, by its name on the Hugging Face Hub, for example cc-by-nc-sa-4.0, apache-2.0, "
        "other.",
    ),
    evaluation: Path = typer.Option(
        None, help="A folder of `ctclip evaluate` for this model; its results are added to the card."
    ),
    repository: str = typer.Option(
        None, help="Repository on the Hugging Face Hub, owner/name. Default: nothing is uploaded."
    ),
    public: bool = typer.Option(False, "--public", help="Make a new repository public. Default: private."),
    force: bool = typer.Option(False, "--force", help="Replace a model that is already there."),
) -> None:
    """Copy a model folder with a full model card and without the patient digests of its calibration; upload it if asked.

    `ctclip publish runs/first/model --output published --licence cc-by-nc-sa-4.0 --evaluation evaluation`
    """
    from ctclip.inference.publish import check_licence
    from ctclip.inference.publish import publish as run
    from ctclip.models.folder import check_new

    if repository is None:
        refuse_unused(context, "needs --repository", "public")
    check_licence(licence)
    check_new(output, force=force)
    page = run(model, output, licence=licence, evaluation=evaluation, repository=repository, private=not public)
    print(f"model with its card: {output}")
    if page is not None:
        print(f"published: {page}")
