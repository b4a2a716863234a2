"""The model folder: what training ends with, what import makes, and what every other command takes.

``config.yaml`` (architecture), ``model.safetensors``, ``tokenizer/``, ``text_config.json`` (the BERT's shape; for a
slice encoder ``vision_config.json`` too), ``preprocessing.yaml`` (the spec its volumes must have), ``prompts.yaml``,
``model_card.md``, for an imported LiPro checkpoint ``classifier.safetensors``, and, once calibrated,
``calibration.json``. Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctclip.config import ModelConfig, SlicesConfig, TextConfig
from ctclip.config_files import dump_config, read_mapping, validated
from ctclip.errors import CheckpointError
from ctclip.models.dual_encoder import DualEncoder, build_volume_encoder
from ctclip.models.text import TextEncoder, load_tokenizer
from ctclip.preprocessing.named_files import installed_file
from ctclip.preprocessing.spec import PreprocessingSpec

REQUIRED = ("config.yaml", "model.safetensors", "tokenizer", "text_config.json", "preprocessing.yaml")


@dataclass
class ModelFolder:
    """A loaded model with everything needed to use it."""

    model: DualEncoder
    spec: PreprocessingSpec
    prompts: dict[str, Any] | None
    path: Path
    hash: str


def save_model(
    folder: str | os.PathLike[str],
    model: DualEncoder,
    spec: PreprocessingSpec,
    *,
    prompts: str | Path | None = None,
    card: str = "",
    state: dict[str, torch.Tensor] | None = None,
    classifier: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a model folder whole or not at all; an existing one is replaced.

    ``state`` stands in for the model's own tensors where they are spread over ranks. ``prompts`` is the path of
    a prompt file to keep with the model. ``classifier``: weight (18, dim) and bias (18,) of a linear probe.
    """
    final = Path(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        tensors = model.state_dict() if state is None else state
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            partial / "model.safetensors",
        )
        if classifier:
            save_file(
                {name: value.contiguous() for name, value in classifier.items()}, partial / "classifier.safetensors"
            )
        (partial / "config.yaml").write_text(dump_config(model.config), encoding="utf-8")
        bert: dict[str, Any] = model.text_encoder.bert.config.to_dict()  # type: ignore[union-attr, operator]
        (partial / "text_config.json").write_text(json.dumps(bert, indent=2, default=str), encoding="utf-8")
        if isinstance(model.config.volume, SlicesConfig):
            shape: dict[str, Any] = model.volume_encoder.vision.config.to_dict()
            (partial / "vision_config.json").write_text(json.dumps(shape, indent=2, default=str), encoding="utf-8")
        model.text_encoder.tokenizer.save_pretrained(partial / "tokenizer")
        spec.save(partial / "preprocessing.yaml")
        if prompts is not None:
            shutil.copyfile(prompts, partial / "prompts.yaml")
        (partial / "model_card.md").write_text(card or "# ctclip model\n", encoding="utf-8")
        partial.chmod(0o755)
        if final.exists():
            # A folder cannot be renamed over another: the old one steps aside until the new one is in place.
            aside = final.with_name(f".{final.name}.replaced")
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            partial.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: the model could not be written ({' '.join(str(error).split())[-160:]}); free some space and start the "
            f"same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def load_model(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> ModelFolder:
    """Load a model folder, or a hub repository that holds one, in evaluation mode.

    Raises CheckpointError naming what is missing or damaged.
    """
    path = _local(str(source))
    for name in REQUIRED:
        if not (path / name).exists():
            raise CheckpointError(
                f"{path}: {name} is missing, this is not a ctclip model folder. `ctclip train` ends with one; "
                f"`ctclip import-checkpoint` makes one of a published checkpoint"
            )
    config = validated(ModelConfig, read_mapping(path / "config.yaml"), str(path / "config.yaml"))
    tokenizer = load_tokenizer(path / "tokenizer")
    text = TextEncoder(_bert_of(path / "text_config.json", config.text), tokenizer, config.text)
    model = DualEncoder(build_volume_encoder(config.volume, _vision_of(path, config)), text, config)
    weights = path / "model.safetensors"
    try:
        state = load_file(weights)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{weights}: does not fit config.yaml or is damaged ({' '.join(str(error).split())[:300]}); "
            f"copy the folder again from where it was made"
        ) from error
    prompts = read_mapping(path / "prompts.yaml") if (path / "prompts.yaml").is_file() else None
    spec = PreprocessingSpec.load(path / "preprocessing.yaml")
    return ModelFolder(model.to(device).eval(), spec, prompts, path, file_hash(weights))


def import_published(
    file: Path, output: Path, text: str | None, ignore: Sequence[str] = (), *, text_config: Path | None = None
) -> Path:
    """A published checkpoint as a model folder: spec ``ct_clip`` and the published prompts go with it.

    ``text``: folder or hub name with the tokenizer and ``config.json`` of the checkpoint's BERT; ``text_config``: that
    ``config.json`` by itself, with the tokenizer in ``text`` or beside it. A linear probe's head (CT-LiPro) is kept.
    """
    from transformers import BertModel

    from ctclip.models.published import read_published, to_model

    if text is None and text_config is None:
        raise CheckpointError(f"{file}: name the text encoder's tokenizer and config.json in --text or --text-config")
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
    model = to_model(published, bert, tokenizer, settings)
    spec = PreprocessingSpec.load(installed_file("ct_clip", "preprocessing"))
    if published.volume.shape != (spec.shape[0], spec.shape[2], spec.shape[1]):
        # A model of another grid: the same published geometry at its own size.
        spec = dataclasses.replace(spec, name=f"ct_clip_{published.volume.shape[1]}", shape=published.volume.shape)
    card = f"# Imported from {file.name}\n\nsupervision: as published\n\nPublished CT-CLIP weights, sha256 {file_hash(file)}.\n"
    return save_model(
        output, model, spec, prompts=installed_file("published", "prompts"), card=card, classifier=published.classifier
    )


def _bert_config(text: str | None, text_config: Path | None) -> Any:
    from transformers import BertConfig

    try:
        if text_config is not None:
            return BertConfig.from_dict(json.loads(text_config.read_text(encoding="utf-8")))
        return BertConfig.from_pretrained(str(text))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{text_config or text}: no BERT configuration; put config.json, vocab.txt and tokenizer_config.json of the "
            f"checkpoint's text encoder (microsoft/BiomedVLP-CXR-BERT-specialized for CT-CLIP) in a folder and name it in --text"
        ) from error


def file_hash(path: Path) -> str:
    """The first 12 hex digits of a file's SHA-256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _bert_of(path: Path, config: TextConfig) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel, BertConfig, BertModel

    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("auto_map", None)
    kind = values.pop("model_type", "bert")
    if kind in ("bert", "cxr-bert"):
        bert: Any = BertModel(BertConfig.from_dict(values), add_pooling_layer=False)
    else:
        bert = AutoModel.from_config(AutoConfig.for_model(kind, **values))
    if config.tuning == "lora":
        from ctclip.models.text import with_lora

        bert = with_lora(bert, config)
    return bert


def _vision_of(path: Path, config: ModelConfig) -> Any:
    """A slice encoder's 2-D model, built from the folder alone."""
    if not isinstance(config.volume, SlicesConfig):
        return None
    from ctclip.models.slices import vision_of

    shape = path / "vision_config.json"
    if not shape.is_file():
        raise CheckpointError(f"{path}: vision_config.json is missing; copy the folder again from where it was made")
    return vision_of(json.loads(shape.read_text(encoding="utf-8")))


def _local(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/")):
        raise CheckpointError(f"{source}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return Path(
            snapshot_download(
                source, allow_patterns=[*REQUIRED, "classifier.safetensors", "tokenizer/*", "*.yaml", "*.json", "*.md"]
            )
        )
    raise CheckpointError(f"{source}: neither a folder here nor a repository that could be fetched from the hub")
