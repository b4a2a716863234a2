"""Methods that train: a recipe from `configs/adapt`, an initial model, and the training engine of `ctclip train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip import distributed
from ctclip.adaptation.examples import Labelled, labelled_volumes, with_both_classes
from ctclip.adaptation.protocol import Draw, Setting
from ctclip.config import Config, ModelConfig
from ctclip.config_files import find_config, load_config, read_mapping
from ctclip.data.label_table import read_label_table
from ctclip.errors import ConfigError, DataError
from ctclip.evaluation.adapted import FILE, Adaptation
from ctclip.heads.folder import FOLDER, PROMPTS, write_prompt_head
from ctclip.models.folder import (
    card_text,
    file_hash,
    load_model,
    local_folder,
    read_architecture,
    read_trained_on,
    save_model,
)
from ctclip.models.lora import merged_state
from ctclip.models.start import volume_layers
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from ctclip.training.records import check_run_folder

DRAW = "labels_seen.csv"
FEWEST_STEPS = 60


@dataclass(frozen=True)
class Recipe:
    """``method``: a file in ``configs/adapt``, unless ``config`` replaces it; ``labels``: a label table; ``setting``:
    how many labels to use."""

    method: str
    model: str
    store: Path
    labels: Path | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    setting: Setting = Setting("fraction", 100.0)  # noqa: RUF009 (frozen)
    split: str = "train"
    seed: int = 0
    merge: bool = False


def run_recipe(recipe: Recipe, output: Path, *, force: bool = False) -> Path:
    """Train with the recipe and return the model folder; a second call resumes. Every rank calls it.

    Raises CtclipError or PreprocessingError before training starts.
    """
    # Imported here, because the launcher's environment must be set before DeepSpeed is imported.
    from ctclip.training.loop import train

    path = local_folder(recipe.model)
    config, patients = configured(recipe, path, output)
    folder = train(config, output, force=force)
    # The process group no longer exists here.
    if distributed.launched_rank() == 0:
        _finish(recipe, path, folder, patients)
    return folder


def configured(recipe: Recipe, path: Path, output: Path) -> tuple[Config, list[str]]:
    """The configuration of a recipe that starts from the model folder ``path``, and the patients with labels or reports
    to learn from. The draw of labels is written to ``output``."""
    store = VolumeStore(recipe.store)
    spec = PreprocessingSpec.load(path / "preprocessing.yaml")
    if store.spec.hash != spec.hash:
        raise DataError(
            f"{store.path}: prepared with spec {store.spec.name!r} ({store.spec.hash}), the model {path} needs {spec.name!r} "
            f"({spec.hash}); run `ctclip preprocess --spec {path}/preprocessing.yaml`, or continue with `ctclip train` and "
            f"model.init, which lists the weights that do not fit"
        )
    own = read_label_table(recipe.labels, store) if recipe.labels is not None else None
    given: dict[str, Any] = {
        "data.store": str(recipe.store), "data.train_split": recipe.split, "model.init": str(path), "seed": recipe.seed,
        "preprocessing": str(path / "preprocessing.yaml"),
    }  # fmt: skip
    prompts = path / FOLDER / PROMPTS / "prompts.yaml"
    if prompts.is_file():
        given["prompts"] = str(prompts)
    source = find_config(recipe.config or recipe.method, "adapt")
    reads = _config(source, given, recipe.overrides).reads_labels
    if not reads:
        if recipe.labels is not None or recipe.setting != Setting("fraction", 100.0):
            raise ConfigError(f"--method {recipe.method} reads no labels: leave out --labels, --shots and --percent")
        table = store.cohort[store.cohort["split"] == recipe.split]
        return _config(source, given, recipe.overrides), sorted(set(table["patient"].astype(str)))
    labelled = labelled_volumes(store, recipe.split, own)
    with_both_classes(labelled, recipe.labels or store.path)
    draw = Draw(recipe.setting, recipe.seed, recipe.setting.draw(labelled, recipe.seed))
    if recipe.labels is not None or recipe.setting != Setting("fraction", 100.0):
        given["data.label_table"] = str(output / DRAW)
        # The other ranks read the file after the rank that writes it has reached the barrier.
        if distributed.launched_rank() == 0:
            _write_draw(output, labelled, draw)
    config = _config(source, given, recipe.overrides)
    changes = _fitted_to(config, int(draw.used.sum()), path, recipe)
    return _config(source, given | changes, recipe.overrides), sorted(set(labelled.patients[draw.used]))


def _config(source: Path, given: dict[str, Any], overrides: Sequence[str]) -> Config:
    return load_config(str(source), tuple(overrides), given)


def _fitted_to(config: Config, volumes: int, path: Path, recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that depend on the number of volumes and on the layers of the model: with few volumes there
    are enough epochs for ``FEWEST_STEPS`` steps; `last-layers` freezes all layers but the last."""
    asked = {override.partition("=")[0] for override in recipe.overrides}
    changes: dict[str, Any] = {}
    batch = config.training.batch
    if volumes < batch and "training.batch" not in asked:
        # The batch size divides among one, two or four ranks.
        batch = volumes // 4 * 4 or 2
        changes["training.batch"] = batch
    steps = config.training.epochs * max(1, volumes // batch)
    if steps < FEWEST_STEPS and "training.epochs" not in asked:
        changes["training.epochs"] = FEWEST_STEPS / max(1, volumes // batch)
    if recipe.method == "last-layers" and config.training.freeze.volume == "none":
        layers = len(volume_layers(read_architecture(path).model))
        if layers < 2:
            raise ConfigError(
                f"--method last-layers: the volume encoder of {path} has only one layer; use --method vocabfine"
            )
        changes["training.freeze.volume"] = f"0-{layers - 2}"
    return changes


def _write_draw(output: Path, labelled: Labelled, draw: Draw) -> None:
    """Write the labels used to the run folder. A resumed run writes the same file again."""
    check_run_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    volumes = labelled.table.loc[draw.used, "volume"]
    values = pd.DataFrame(draw.labels[draw.used], columns=list(labelled.names), index=volumes).astype("Int8")
    if not (output / "run.json").is_file():
        # This file marks the folder as a run; training overwrites it.
        write_text(output / "run.json", '{"revision": ""}')
    with written_beside(output / DRAW) as partial:
        write_csv(partial, values, index_label="volume")


def _finish(recipe: Recipe, path: Path, folder: Path, patients: Sequence[str]) -> None:
    """Record the patients that the model was adapted to, and merge adapters if requested."""
    if recipe.merge:
        merge_adapters(folder)
    record = folder / FILE
    if record.is_file() and Adaptation.load(record).method == recipe.method:
        return
    words = f"{len(patients)} patients, split {recipe.split}, {recipe.setting}"
    Adaptation.to(recipe.method, words, file_hash(path / "model.safetensors"), patients).save(record)


def merge_adapters(folder: Path) -> None:
    """Merge the low-rank adapters of a model folder into its weights, which does not change its scores. Other folders
    are left alone."""
    loaded = load_model(folder)
    tunings = loaded.model.config.volume.tuning, loaded.model.config.text.tuning
    if "lora" not in tunings:
        return
    plain = read_architecture(folder, _without_adapters).model
    plain.load_state_dict(merged_state(loaded.model))
    prompts = read_mapping(folder / FOLDER / PROMPTS / "prompts.yaml") if (folder / FOLDER / PROMPTS).is_dir() else None
    names = read_mapping(folder / FOLDER / PROMPTS / "head.yaml")["names"] if prompts is not None else []
    save_model(
        folder, plain, loaded.labels, trained_on=read_trained_on(folder), card=card_text(folder),
        write_more=(lambda partial: write_prompt_head(partial, load_prompts(prompts), names)) if prompts is not None else None,
    )  # fmt: skip


def _without_adapters(config: ModelConfig) -> ModelConfig:
    sides = {
        side: getattr(config, side).model_copy(
            update={"tuning": "full"} | ({"lora_projection": False} if side == "volume" else {})
        )
        for side in ("volume", "text")
        if getattr(config, side).tuning == "lora"
    }
    return config.model_copy(update=sides)
