"""Build the model of a run, start it from another model, and write it as a model folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from ctclip import distributed
from ctclip.config import Config, ModelConfig
from ctclip.config_files import dump_config, read_mapping
from ctclip.data.dataset import StoredVolumes
from ctclip.data.label_table import read_label_table
from ctclip.errors import ConfigError, DataError
from ctclip.heads.folder import write_prompt_head
from ctclip.labels import FILE as LABELS
from ctclip.labels import LabelSet, labels_of_columns, labels_that_are, load_labels, store_labels
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.folder import (
    TRAINED_ON,
    TrainedOn,
    load_model,
    local_folder,
    read_architecture,
    save_model,
    write_architecture,
)
from ctclip.models.lora import merged_state
from ctclip.models.start import freeze, take_weights
from ctclip.models.tokenizers import load_tokenizer, train_tokenizer
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import PromptSet, load_prompts
from ctclip.schema import validated
from ctclip.training.cohort import Cohort
from ctclip.versions import revision

ARCHITECTURE = "architecture"
PROMPTS = "prompts.yaml"
NEUTRAL_PROMPTS = "generic"


def run_labels(config: Config, store: VolumeStore) -> LabelSet | None:
    """The label set of a run: that of the configuration, else that of its label table, else that of the store. Raises
    DataError if the store lacks any of its columns."""
    if config.data.label_table is not None and config.labels is None:
        table = read_label_table(Path(config.data.label_table), store)
        return labels_that_are(Path(config.data.label_table).stem, [str(name) for name in table.columns])
    kept = store_labels(store)
    if config.labels is None:
        return kept
    chosen = load_labels(config.labels)
    columns = chosen.columns(store.cohort.columns)
    absent = [name for name in chosen.names if name not in columns]
    if absent and config.reads_labels:
        own = f"; its own label set is {kept.name!r}" if kept is not None else ""
        raise DataError(f"{store.path}: has no column for {absent[0]!r} of the label set {chosen.name!r}{own}")
    return chosen


def run_prompts(config: Config, labels: LabelSet | None) -> PromptSet:
    """The prompt set of a run: that of the configuration, else that of the label set, else templates for any name."""
    name = config.prompts or (labels.prompts if labels is not None else None) or NEUTRAL_PROMPTS
    return load_prompts(name)


def prompted_names(prompts: PromptSet, labels: LabelSet | None) -> tuple[str, ...]:
    """The findings to score: the names of the label set, else those listed in the prompt set."""
    return labels.names if labels is not None else prompts.names()


def build_run_model(
    config: Config, output: Path, data: StoredVolumes, labels: LabelSet | None, *, resumed: bool
) -> tuple[DualEncoder, str]:
    """The model of a run, and a description of its initial weights. A run ``resumed`` from a checkpoint is built from
    its own folder and does not need the pretrained folders. A run stopped before its first checkpoint starts with the
    same weights again. A collective operation."""
    kept = output / ARCHITECTURE
    if distributed.broadcast_json(resumed and (kept / "config.yaml").is_file()):
        model, begins = read_architecture(kept, lambda own: _as_configured(own, config.model), data.spec).model, ""
    elif config.model.init is not None:
        model, begins = _from_folder(config.model, data.spec)
    else:
        model, begins = build_model(config.model, data.spec, _tokenizer(config, output, data)), ""
    freeze(model, config.training.freeze)
    distributed.on_main(lambda: write_architecture(kept, model, labels or _no_labels()))
    return model, begins


def _from_folder(config: ModelConfig, spec: PreprocessingSpec) -> tuple[DualEncoder, str]:
    """A model that starts from the weights of ``config.init`` and uses its architecture for the selected sides."""
    where = str(config.init)
    path = local_folder(where)
    source = load_model(path)
    if config.init_sides == "volume":
        raise_if_needs_tokenizer(config)
        model = build_model(_merged(source.model.config, config), spec)
    else:
        model = read_architecture(path, lambda own: _merged(own, config), spec).model
    taken = take_weights(model, merged_state(source.model), config.init_sides, where)
    return model, taken.describe(where)


def raise_if_needs_tokenizer(config: ModelConfig) -> None:
    """Raise ConfigError if only the volume encoder is taken from ``init`` and the text encoder has no tokenizer of its
    own."""
    if config.text.pretrained is None:
        raise ConfigError(
            "model.init_sides=volume: name the text encoder in model.text.pretrained, or take both sides of model.init"
        )


def _merged(own: ModelConfig, asked: ModelConfig) -> ModelConfig:
    """The architecture of a folder, with those settings of a run that do not change the shapes of weights."""
    both = asked.init_sides == "both"
    tuning = {
        name: getattr(asked.volume, name)
        for name in ("activation_checkpointing", "tuning", "lora_rank", "lora_projection")
    }
    volume = own.volume.model_copy(update=tuning) if asked.init_sides != "text" else asked.volume
    adapted = {name: getattr(asked.text, name) for name in ("tuning", "lora_rank")}
    text = own.text.model_copy(update=adapted) if asked.init_sides != "volume" else asked.text
    base = own if both else asked
    return base.model_copy(update={"volume": volume, "text": text, "init": asked.init, "init_sides": asked.init_sides})


def _as_configured(own: ModelConfig, asked: ModelConfig) -> ModelConfig:
    """The configuration in the run folder, with the settings that a resumed run may change."""
    volume = own.volume.model_copy(update={"activation_checkpointing": asked.volume.activation_checkpointing})
    return own.model_copy(update={"volume": volume})


def _tokenizer(config: Config, output: Path, data: StoredVolumes) -> Any:
    """The tokenizer of the pretrained encoder, or one learned from the training reports and saved in the run folder."""
    if config.model.text.pretrained is not None:
        return load_tokenizer(config.model.text.pretrained)
    folder = output / "tokenizer"

    def learn() -> None:
        if not (folder / "tokenizer.json").is_file():
            texts = np.unique([report.text() for report in data.reports])
            train_tokenizer(texts.tolist(), config.model.text.vocabulary).save_pretrained(folder)

    distributed.on_main(learn)
    return load_tokenizer(folder)


def describe_training(config: Config, data: StoredVolumes, cohort: Cohort, labels: LabelSet | None) -> TrainedOn:
    """The training data of the run's model, including earlier starts."""
    store = data.store
    sources = data.table["label_source"].astype(str).tolist() if "label_source" in data.table else []
    return TrainedOn(
        supervision="label-supervised" if config.reads_labels else "reports only",
        cohort=store.path.resolve().name,
        volumes=len(cohort.seen),
        patients=len(cohort.patients),
        label_source="; ".join(sorted(set(sources) - {""})) if config.reads_labels else "",
        synthetic=all(source.startswith(SYNTHETIC) for source in sources) if sources else None,
        body_part=labels.body_part if labels is not None else "any",
        spacing=store.spec.spacing,
        sections=config.data.sections,
        init=config.model.init or "",
    )


SYNTHETIC = "synthetic"


def write_trained_on(output: Path, facts: TrainedOn) -> None:
    """Write the training data to the run folder, for model folders exported from it."""
    write_text(output / TRAINED_ON, yaml.safe_dump(facts.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def keep_prompts(output: Path, prompts: PromptSet) -> None:
    """Save the prompt set in the run folder, because the user's file may be removed or be relative to another
    directory."""
    write_text(output / PROMPTS, dump_config(prompts))


def save_run_model(folder: Path, config: Config, run: Path, model: DualEncoder, state: dict[str, torch.Tensor]) -> bool:
    """Write a model folder from a checkpoint's state (names under ``state/model.``) and the run folder. A folder that
    already has these weights is kept, with its added heads and calibrations. Returns whether it was written."""
    prefix = "state/model."
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    trained_on = validated(TrainedOn, read_mapping(run / TRAINED_ON), str(run / TRAINED_ON))
    labels = load_labels(run / ARCHITECTURE / LABELS)
    _check_state(tensors, expected, run)
    if _has_weights(folder, tensors):
        return False
    known = None if labels.name == NO_LABELS else labels
    # Runs of earlier versions saved no prompts.
    prompts = load_prompts(run / PROMPTS) if (run / PROMPTS).is_file() else run_prompts(config, known)
    names = prompted_names(prompts, known)
    save_model(
        folder, model, labels, trained_on=trained_on, card=_card(config, trained_on), state=tensors,
        write_more=lambda partial: write_prompt_head(partial, prompts, names) if names else None,
    )  # fmt: skip
    return True


def _has_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a model folder has exactly these weights; False if it is damaged."""
    try:
        kept = load_file(folder / "model.safetensors")
        same = kept.keys() == tensors.keys() and all(torch.equal(kept[name], tensors[name].cpu()) for name in kept)
    except (OSError, SafetensorError, RuntimeError):
        # RuntimeError: of another number format.
        return False
    return same and (folder / "config.yaml").is_file()


def _check_state(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size], run: Path) -> None:
    """Check that the tensors are those of this model, because the model folder could not be loaded otherwise."""
    wrong = sorted(set(expected) ^ set(tensors))
    if not wrong:
        # Parameters sharded by ZeRO 3 have no shape of their own.
        wrong = [name for name, shape in expected.items() if shape.numel() and tensors[name].shape != shape]
    if wrong:
        raise ConfigError(f"{run}: the checkpoint does not fit the run's architecture ({wrong[0]}); take another one")


NO_LABELS = "none"


def _no_labels() -> LabelSet:
    """The label set of a run without labels."""
    return labels_of_columns(NO_LABELS, ["any finding"])


def _card(config: Config, facts: TrainedOn) -> str:
    return (
        f"# {config.name}\n\nsupervision: {facts.supervision}{f', labels: {facts.label_source}' if facts.label_source else ''}\n\n"
        f"Trained on {facts.volumes} volumes of {config.data.train_split!r}, spec {config.preprocessing!r}, seed {config.seed}, "
        f"code {revision()}. The configuration of the run is in the run's config.yaml. Not a medical device.\n"
    )


def warn(message: str) -> None:
    """Print one line to stderr, from one rank."""
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)
