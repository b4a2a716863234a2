"""Convert a published CT-CLIP checkpoint to a model folder; no code in the file is executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctclip.config import TextConfig
from ctclip.errors import CheckpointError
from ctclip.heads.folder import save_head, write_prompt_head
from ctclip.heads.linear import LinearHead
from ctclip.labels import load_labels
from ctclip.models.folder import TrainedOn, check_output, file_hash, save_model
from ctclip.models.hub import pretrained_folder
from ctclip.models.huggingface import read_settings, shape_of
from ctclip.models.published import Published, read_published, to_model
from ctclip.models.tokenizers import load_tokenizer
from ctclip.preprocessing.named_files import installed_file
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.prompts import load_prompts

LABELS, PROMPTS, SPEC = "ct_rate_18", "published", "ct_clip"


def import_published(
    file: Path,
    output: Path,
    text: str | None,
    ignore: Sequence[str] = (),
    *,
    text_config: Path | None = None,
    spec: str | None = None,
) -> Path:
    """Write a published checkpoint as a model folder and return it, with the published prompts as a head.

    ``text``: folder or hub name with the tokenizer and ``config.json`` of the checkpoint's BERT; ``text_config``: that
    ``config.json`` separately, with the tokenizer in ``text`` or beside it. ``spec``: the preprocessing spec of the
    training volumes; default: ``ct_clip`` at the checkpoint's in-plane size. The weights fit any number of slices. A
    linear classifier (CT-LiPro) becomes the head ``linear``.
    """
    from transformers import BertModel

    if text is None and text_config is None:
        raise CheckpointError(
            f"{file}: give the tokenizer and config.json of the text encoder with --text-encoder or --text-config"
        )
    check_output(output)
    published = read_published(file, ignore)
    shape = _bert_config(text, text_config)
    source = text_config or text
    for name, value in published.bert.items():
        if getattr(shape, name) != value:
            raise CheckpointError(
                f"{source}: its config.json says {name} {getattr(shape, name)}, the checkpoint has {value}"
            )
    bert = BertModel(shape, add_pooling_layer=False)
    settings = TextConfig(
        pooling="cls", width=shape.hidden_size, depth=shape.num_hidden_layers, heads=shape.num_attention_heads
    )
    tokenizer = load_tokenizer(text or Path(str(text_config)).parent)
    geometry = _spec(published, file, spec)
    model = to_model(published, bert, tokenizer, settings, geometry)
    labels = load_labels(installed_file(LABELS, "labels"))
    card = f"# Imported from {file.name}\n\nsupervision: as published\n\nPublished CT-CLIP weights, sha256 {file_hash(file)}.\n"
    trained_on = TrainedOn(
        supervision="as published",
        cohort="as published",
        body_part=labels.body_part,
        spacing=geometry.spacing,
        synthetic=False,
    )

    def write_heads(folder: Path) -> None:
        write_prompt_head(folder, load_prompts(installed_file(PROMPTS, "prompts")), labels.names)
        if published.classifier:
            weight, bias = published.classifier["weight"], published.classifier["bias"]
            save_head(folder, "linear", LinearHead(model, labels.names, weight, bias, relu=True))

    return save_model(output, model, labels, trained_on=trained_on, card=card, write_more=write_heads)


def _spec(published: Published, file: Path, name: str | None) -> PreprocessingSpec:
    """The preprocessing spec of a checkpoint. Raises CheckpointError if ``name`` does not fit its weights."""
    if name is not None:
        spec = PreprocessingSpec.load(name)
        if spec.shape[1:] != (published.plane, published.plane) or spec.shape[0] % published.volume.patch[0]:
            raise CheckpointError(
                f"{file}: its weights need volumes of {published.plane} x {published.plane} voxels in plane and a multiple of "
                f"{published.volume.patch[0]} slices, the spec {name!r} has {' x '.join(map(str, spec.shape))}"
            )
        return spec
    spec = PreprocessingSpec.load(installed_file(SPEC, "preprocessing"))
    if spec.shape[1:] == (published.plane, published.plane):
        return spec
    # A model with another grid: the published geometry at its in-plane size, with as many slabs as columns of patches.
    slices = published.plane // published.volume.patch[1] * published.volume.patch[0]
    return dataclasses.replace(spec, name=f"{SPEC}_{published.plane}", shape=(slices, published.plane, published.plane))


def _bert_config(text: str | None, text_config: Path | None) -> Any:
    from transformers import BertConfig

    path = text_config or pretrained_folder(str(text), "--text-encoder", weights=False) / "config.json"
    shape = shape_of(read_settings(path), path) if path.is_file() else None
    if not isinstance(shape, BertConfig):
        raise CheckpointError(
            f"{path}: no BERT configuration; put config.json, vocab.txt and tokenizer_config.json of the "
            f"checkpoint's text encoder (microsoft/BiomedVLP-CXR-BERT-specialized for CT-CLIP) in a folder and name it in --text-encoder"
        )
    return shape
