"""The model folder, which training and import write and every other command reads.

``config.yaml`` (architecture), ``model.safetensors``, ``tokenizer/``, ``text_config.json`` (the text encoder's shape;
for a slice encoder ``vision_config.json`` too), ``preprocessing.yaml`` (the spec its volumes must have),
``labels.yaml``, ``trained_on.yaml`` (its training data), ``SHA256SUMS`` (of the weights), ``model_card.md``, and ``heads/``
(``ctclip/heads/folder.py``). It contains no code, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctclip import plugins
from ctclip.config import ModelConfig
from ctclip.config_files import dump_config, read_mapping
from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import FILE as LABELS
from ctclip.labels import LabelSet, expected, load_labels
from ctclip.models.checksums import FILE as CHECKSUMS
from ctclip.models.checksums import checked_sha256, finite, sha256, write_checksums
from ctclip.models.dual_encoder import DualEncoder, build_volume_encoder
from ctclip.models.hub import model_folder
from ctclip.models.huggingface import read_settings, vision_model_of
from ctclip.models.slices import SlicesConfig
from ctclip.models.text import text_encoder_of
from ctclip.models.tokenizers import load_tokenizer
from ctclip.preprocessing.errors import PreprocessingError, printable
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.named_files import installed_file
from ctclip.preprocessing.outputs import check_replaceable, put_in_place
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.schema import Section, validated

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Reading

ARCHITECTURE = ("config.yaml", "tokenizer", "text_config.json", "preprocessing.yaml")
REQUIRED = (*ARCHITECTURE, "model.safetensors")
TRAINED_ON = "trained_on.yaml"
CARD = "model_card.md"
# File of ``ctclip.drift.summary``.
SUMMARY = "training_summary.safetensors"
# File of ``ctclip.inference.precision``.
PRECISION = "precision.json"
KIND = "model folder of ours alone"
# Number of hex digits of the SHA-256 that identify a model.
HASH = 12
# All files of a model folder: ours, those of version 0.2, and those that the hub adds.
PARTS = {
    *REQUIRED, LABELS, TRAINED_ON, SUMMARY, PRECISION, CHECKSUMS, CARD, "heads", "vision_config.json",
    "adaptation.json", "prompts.yaml", "calibration.json", "classifier.safetensors", "README.md", ".gitattributes", ".cache",
}  # fmt: skip
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
}  # fmt: skip
# Assumed for folders of version 0.2, which have no label set.
LABELS_BEFORE = "ct_rate_18"
# Encoder settings that version 0.2 stated in addition to the spec, and the spec values that they repeat.
REPEATED = ("spacing", "hu_window", "shape")


class TrainedOn(Section):
    """What a model was trained on; tables and pages state it."""

    supervision: str = ""
    label_source: str = ""
    cohort: str = ""
    volumes: int | None = None
    patients: int | None = None
    synthetic: bool | None = None
    body_part: str = ""
    spacing: tuple[float, float, float] | None = None
    sections: tuple[str, ...] = ("findings", "impression")
    init: str = ""

    @field_validator("supervision", "label_source", "cohort", "body_part", "init")
    @classmethod
    def _printable(cls, text: str) -> str:
        """Remove control characters, because the folder may come from a stranger and these texts are printed."""
        return printable(text)

    def words(self) -> str:
        """One line: number of scans, patients or phantoms, body part, spacing and cohort."""
        kind = {True: "synthetic scans", False: "scans of patients", None: "scans"}[self.synthetic]
        count = f"{self.volumes:,} {kind}" if self.volumes is not None else kind
        spacing = f"{' x '.join(f'{step:g}' for step in self.spacing)} mm" if self.spacing is not None else ""
        body_part = {"": "body part not stated", "any": "any body part"}.get(self.body_part, self.body_part)
        return ", ".join(filter(None, [count, body_part, spacing, f"cohort {self.cohort}" if self.cohort else ""]))

    def caveats(self) -> list[str]:
        """Warnings for all readers of this model's scores."""
        if self.synthetic:
            return ["this model was trained only on synthetic scans: its scores for scans of patients are meaningless"]
        return []


@dataclass
class Architecture:
    """A model without its weights, and the settings kept beside it."""

    model: DualEncoder
    spec: PreprocessingSpec
    labels: LabelSet


@dataclass
class ModelFolder:
    """A loaded model with everything needed to use it; its heads are loaded by ``ctclip.heads.folder.load_head``."""

    model: DualEncoder
    spec: PreprocessingSpec
    labels: LabelSet
    path: Path
    hash: str
    trained_on: TrainedOn = field(default_factory=TrainedOn)

    def reading(self, given: Reading) -> Reading:
        """``given``, without the check for a chest if the model was trained on another body part."""
        return {
            **given,
            "expect": expected(self.trained_on.body_part or self.labels.body_part, given.get("expect", "auto")),
        }


def save_model(
    folder: str | os.PathLike[str],
    model: DualEncoder,
    labels: LabelSet,
    *,
    trained_on: TrainedOn | None = None,
    card: str = "",
    state: dict[str, torch.Tensor] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a complete model folder atomically; an existing model folder is replaced, and any other non-empty folder is
    refused.

    ``state`` replaces the model's own tensors if they are sharded over ranks. ``write_more`` is called with the folder
    before it is moved into place, to add heads.
    """
    check_output(folder)
    final = Path(os.path.abspath(folder))
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_folder(f".{final.name[:60]}.", ".partial", final.parent) as partial:
            tensors = model.state_dict() if state is None else state
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                partial / "model.safetensors",
            )
            write_checksums(partial)
            write_architecture(partial, model, labels)
            facts = (trained_on or TrainedOn()).model_dump(mode="json")
            write_text(partial / TRAINED_ON, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))
            (partial / CARD).write_text(card or "# ctclip model\n", encoding="utf-8")
            if write_more is not None:
                write_more(partial)
            partial.chmod(0o755)
            put_in_place(partial, final, is_model_folder, KIND)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: the model could not be written ({' '.join(str(error).split())[-160:]}); free some space and "
            "start the same command again"
        ) from error
    return Path(folder)


def write_architecture(folder: Path, model: DualEncoder, labels: LabelSet) -> None:
    """Write a model folder without weights: enough to build the model again without its sources."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.model_copy(update={"init": None})
    write_text(folder / "config.yaml", dump_config(config))
    bert: dict[str, Any] = model.text_encoder.bert.config.to_dict()
    write_text(folder / "text_config.json", json.dumps(bert, indent=2, default=str))
    if isinstance(model.config.volume, SlicesConfig):
        shape: dict[str, Any] = model.volume_encoder.vision.config.to_dict()  # type: ignore[union-attr, operator]
        write_text(folder / "vision_config.json", json.dumps(shape, indent=2, default=str))
    model.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
    model.spec.save(folder / "preprocessing.yaml")
    labels.save(folder / LABELS)


def read_architecture(
    path: Path, change: Callable[[ModelConfig], ModelConfig] | None = None, spec: PreprocessingSpec | None = None
) -> Architecture:
    """The model that ``write_architecture`` described, freshly initialised; ``change``: a function that changes its
    configuration before it is built; ``spec``: a geometry to use instead of its own. Raises CheckpointError naming what
    is missing."""
    for name in ARCHITECTURE:
        if not (path / name).exists():
            raise CheckpointError(
                f"{path}: {name} is missing, so this is not a ctclip model folder. `ctclip train` writes one; "
                f"`ctclip import-checkpoint` makes one from a published checkpoint"
            )
    own = PreprocessingSpec.load(path / "preprocessing.yaml", whole=True)
    config, geometry = _config_of(path, own)
    config = config if change is None else change(config)
    geometry = geometry if spec is None else spec
    _check_size(path, config, geometry)
    tokenizer = load_tokenizer(path / "tokenizer")
    settings = path / "text_config.json"
    try:
        text = text_encoder_of(read_settings(settings), tokenizer, config.text, settings)
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{settings}: {str(error).removeprefix(f'{settings}: ')}") from error
    model = DualEncoder(build_volume_encoder(config.volume, geometry, **_vision_of(path, config)), text, config)
    return Architecture(model, own, _labels_of(path))


def check_output(folder: str | os.PathLike[str]) -> None:
    """Raise PreprocessingError unless a model folder may be written at ``folder``. Call this before hours of work."""
    check_replaceable(folder, is_model_folder, KIND)


def check_new(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """``check_output``, and raise PreprocessingError if a model is there already, unless ``force``: it may be another one,
    and the only copy."""
    check_output(folder)
    if not force and os.path.isdir(folder) and os.listdir(folder):
        raise PreprocessingError(f"{folder}: holds a model; give another --output, or replace it with --force")


def check_addition(folder: Path, what: str) -> None:
    """Raise CheckpointError if ``what`` cannot be saved in a model folder. Call this before hours of work."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{folder}: cannot be written into, and {what} would be saved there; copy the model folder"
        )


def is_model_folder(folder: Path) -> bool:
    """Whether a folder contains only a model folder of ctclip, so that replacing it loses no other file."""
    names = {path.name for path in folder.iterdir()}
    if not (set(REQUIRED) <= names and names <= PARTS):
        return False
    tokenizer, heads, cache = folder / "tokenizer", folder / "heads", folder / ".cache"
    return (
        all(path.name in TOKENIZER for path in tokenizer.iterdir())
        and all(is_head_folder(path) for path in (heads.iterdir() if heads.is_dir() else ()))
        and (not cache.exists() or {path.name for path in cache.iterdir()} <= {"huggingface"})
    )


def is_head_folder(folder: Path) -> bool:
    """Whether a folder contains only the settings and tensors of a head, and their checksums."""
    return (folder / "head.yaml").is_file() and all(
        (path.suffix in (".yaml", ".json", ".safetensors") or path.name == CHECKSUMS) and path.is_file()
        for path in folder.iterdir()
    )


def load_model(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> ModelFolder:
    """Load a model folder, or a hub repository that holds one, in evaluation mode.

    A folder written by version 0.2 can also be opened; missing parts are filled in, with a note on stderr. Raises
    CheckpointError naming what is missing or damaged.
    """
    path = local_folder(str(source))
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path}: model.safetensors is missing, so this is not a ctclip model folder. `ctclip train` writes one; "
            f"`ctclip import-checkpoint` makes one from a published checkpoint"
        )
    built = read_architecture(path)
    model = built.model
    weights = path / "model.safetensors"
    digest = checked_sha256(weights)
    try:
        model.load_state_dict(finite(load_file(weights), weights))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{weights}: does not fit config.yaml or is damaged ({' '.join(str(error).split())[:300]}); "
            f"copy the folder again from its source"
        ) from error
    return ModelFolder(model.to(device).eval(), built.spec, built.labels, path, digest[:HASH], read_trained_on(path))


def _config_of(path: Path, spec: PreprocessingSpec) -> tuple[ModelConfig, PreprocessingSpec]:
    """The architecture of a folder, and the geometry its encoder was built for: that of the spec, unless the
    configuration of a 0.2 folder differs."""
    values = read_mapping(path / "config.yaml")
    volume = values.get("volume")
    geometry = spec
    if isinstance(volume, dict):
        plugins.refuse_unknown_code("encoder", str(volume.get("kind", "")), str(path / "config.yaml"))
        repeated = {name: volume.pop(name) for name in REPEATED if name in volume}
        if volume.get("kind") == "slices" and "spacing" in repeated:
            repeated["spacing"] = [repeated["spacing"], *spec.spacing[1:]]
        if volume.get("kind") == "ctvit" and "shape" in repeated:
            depth, column, row = repeated["shape"]
            repeated["shape"] = [depth, row, column] if spec.published_geometry else [depth, column, row]
        for name, value in repeated.items():
            kept = getattr(spec, name)
            if tuple(value) != tuple(kept):
                print(
                    f"note: {path / 'config.yaml'}: trained as if {name} were {value}, although the spec of its "
                    f"volumes says {list(kept)}; the value used in training is kept",
                    file=sys.stderr,
                )
                changed: dict[str, Any] = {name: tuple(value)}
                geometry = dataclasses.replace(geometry, **changed)
    config = validated(ModelConfig, values, str(path / "config.yaml"))
    return config, geometry


def _check_size(path: Path, config: ModelConfig, geometry: PreprocessingSpec) -> None:
    """Raise CheckpointError if the volume encoder has more parameters than the weights beside it have bytes, before memory
    is allocated for them. The encoder is built on the meta device, which the code of a plugin may not support."""
    weights = path / "model.safetensors"
    if isinstance(config.volume, SlicesConfig) or not weights.is_file():
        return
    parameters = 0
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        parameters = sum(part.numel() for part in build_volume_encoder(config.volume, geometry).parameters())
    if parameters > weights.stat().st_size:
        raise CheckpointError(
            f"{path / 'config.yaml'}: describes a volume encoder of {parameters / 1e6:,.0f} million parameters, more than "
            f"{weights.name} beside it can hold; copy the folder again from its source"
        )


def _labels_of(path: Path) -> LabelSet:
    if (path / LABELS).is_file():
        return load_labels(path / LABELS)
    print(
        f"note: {path}: written by an earlier version without a label set; {LABELS_BEFORE} is assumed",
        file=sys.stderr,
    )
    return load_labels(installed_file(LABELS_BEFORE, "labels"))


def read_trained_on(path: Path) -> TrainedOn:
    """The training data of the model in a folder."""
    if (path / TRAINED_ON).is_file():
        return validated(TrainedOn, read_mapping(path / TRAINED_ON), str(path / TRAINED_ON))
    lines = card_text(path).splitlines()
    supervision = next((line.partition(":")[2].strip() for line in lines if line.startswith("supervision:")), "")
    return TrainedOn(supervision=supervision)


def card_text(path: Path) -> str:
    """The text of the model card in a folder, "" if there is none; bytes that are not UTF-8 are replaced."""
    card = path / CARD
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def file_hash(path: Path) -> str:
    """The first 12 hex digits of a file's SHA-256."""
    return sha256(path)[:HASH]


def _vision_of(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The 2-D model (``vision``) of a slice encoder, built from the folder alone; empty for other encoders."""
    if not isinstance(config.volume, SlicesConfig):
        return {}
    shape = path / "vision_config.json"
    if not shape.is_file():
        raise CheckpointError(f"{path}: vision_config.json is missing; copy the folder again from its source")
    return {"vision": vision_model_of(read_settings(shape), shape)}


def local_folder(source: str) -> Path:
    """The folder that ``source`` names: a local one, or a snapshot of a hub repository. Raises CheckpointError."""
    patterns = [
        SUMMARY,
        CHECKSUMS,
        "classifier.safetensors",
        "tokenizer/*",
        "heads/*",
        "*.yaml",
        "*.json",
        "*.md",
        "model.safetensors",
    ]
    return model_folder(source, patterns, "preprocessing.yaml")
