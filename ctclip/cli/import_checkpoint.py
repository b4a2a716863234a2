"""`ctclip import-checkpoint`: turn a published CT-CLIP checkpoint into a model folder."""

from __future__ import annotations

from pathlib import Path

import typer


def import_checkpoint(
    file: Path = typer.Argument(
        ..., help="The checkpoint: CT-CLIP_v2.pt, CT_VocabFine_v2.pt, CT_LiPro_v2.pt or a similar file."
    ),
    output: Path = typer.Option(..., "--output", "-o", help="The model folder to write."),
    text_encoder: str = typer.Option(
        None,
        help="A folder, or a name on the Hugging Face Hub, with the tokenizer and config.json of the checkpoint's BERT.",
    ),
    text_config: Path = typer.Option(
        None,
        help="The config.json of that BERT, if it is elsewhere. The tokenizer is read from --text-encoder, or else from the folder of this file.",
    ),
    spec: str = typer.Option(
        None,
        help="Preprocessing spec of the volumes that the checkpoint was trained on. Default: ct_clip at the in-plane size of the checkpoint.",
    ),
    ignore: list[str] = typer.Option(
        None, help="A key of the checkpoint to leave out, or a pattern such as 'decoder.*'. May be repeated."
    ),
    force: bool = typer.Option(False, "--force", help="Replace a model that is already there."),
) -> None:
    """Turn a published CT-CLIP checkpoint into a model folder. No code in the file is executed.

    `ctclip import-checkpoint CT-CLIP_v2.pt --text-encoder BiomedVLP-CXR-BERT-specialized --output models/ct-clip`
    """
    from huggingface_hub.utils import logging

    from ctclip.inference.import_published import import_published
    from ctclip.models.folder import check_new

    check_new(output, force=force)
    # Report only once, at the end, that the hub cannot be reached.
    logging.set_verbosity_error()
    folder = import_published(file, output, text_encoder, ignore or [], text_config=text_config, spec=spec)
    print(f"model: {folder}")
