"""`ctclip import-checkpoint`: a published CT-CLIP checkpoint to a model folder."""

from __future__ import annotations

from pathlib import Path

import typer


def import_checkpoint(
    file: Path = typer.Argument(..., help="CT-CLIP_v2.pt, CT_VocabFine_v2.pt, CT_LiPro_v2.pt or the like."),
    output: Path = typer.Option(..., "--output", "-o", help="The model folder to write."),
    text: str = typer.Option(
        None, help="Folder or hub name with the tokenizer and config.json of the checkpoint's BERT."
    ),
    text_config: Path = typer.Option(
        None, help="That config.json by itself; the tokenizer is taken from --text, or from beside it."
    ),
    spec: str = typer.Option(
        None,
        help="Preprocessing of the volumes it learned from; ct_clip at the checkpoint's in-plane size if not given.",
    ),
    ignore: list[str] = typer.Option(
        None, help="A key that may be dropped, or a pattern of some ('decoder.*'); may be repeated."
    ),
) -> None:
    """Turn a published CT-CLIP checkpoint into a model folder; nothing in the file is executed.

    `ctclip import-checkpoint CT-CLIP_v2.pt --text BiomedVLP-CXR-BERT-specialized --output models/ct-clip`
    """
    from huggingface_hub.utils import logging

    from ctclip.inference.import_published import import_published

    # A hub that cannot be reached is said once, at the end.
    logging.set_verbosity_error()
    folder = import_published(file, output, text, ignore or [], text_config=text_config, spec=spec)
    print(f"model: {folder}")
