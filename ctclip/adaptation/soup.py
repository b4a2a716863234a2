"""Model soups (Wortsman et al. 2022): the mean of the weights of models of one recipe, if it is better on held-out
patients."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctclip.adaptation.examples import embedded, labelled_volumes
from ctclip.adaptation.protocol import aurocs
from ctclip.adaptation.zero_shot import own_prompts, zero_shot_scores
from ctclip.errors import CheckpointError, DataError
from ctclip.evaluation.adapted import FILE, Adaptation
from ctclip.evaluation.metrics import mean_defined
from ctclip.heads.folder import write_prompt_head
from ctclip.inference.ensemble import check_different
from ctclip.models.folder import ModelFolder, check_output, load_model, save_model
from ctclip.preprocessing.store import VolumeStore


@dataclass(frozen=True)
class Soup:
    """``alone``: mean zero-shot AUROC of each model; ``members``: the models in the best mean; ``auroc``: that of the
    mean; ``folder``: the model folder written, or None if no mean is better than the best model."""

    alone: dict[str, float]
    members: list[str]
    auroc: float
    folder: Path | None


def model_of(path: Path) -> Path:
    """The model folder of a run, or the folder itself if it is one."""
    return path / "model" if (path / "model" / "config.yaml").is_file() else path


def make_soup(
    sources: Sequence[Path], store: Path, split: str, output: Path, *, batch: int = 8, cache: Path | None = None
) -> Soup:
    """The greedy soup: models are added in the order of their AUROC on ``split``, unless they make the mean worse. The
    mean is written as a model folder if it is better than every model. Raises CheckpointError for models of different
    recipes, DataError for an ``output`` that is one of them, and for a model that is given twice."""
    if len(sources) < 2:
        raise DataError("give at least two runs or model folders to average")
    check_output(output)
    if any(model_of(path).resolve() == output.resolve() for path in sources):
        raise DataError(f"{output}: is one of the models to average; give another --output")
    folders = [load_model(model_of(path)) for path in sources]
    names = [str(path) for path in sources]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        check_same_recipe(folders[0], folder, names[0], name)
    opened = VolumeStore(store)
    _check_unseen(folders, names, opened, split)
    check_different(folders)
    where = cache or output.parent / f".{output.name}.embeddings"
    states = {name: _state(folder) for name, folder in zip(names, folders, strict=True)}
    scores = {name: score(folder, opened, split, where, batch) for name, folder in zip(names, folders, strict=True)}
    order = sorted(names, key=lambda name: -scores[name])
    members, best = order[:1], scores[order[0]]
    for name in order[1:]:
        mean = mean_state([states[member] for member in (*members, name)])
        value = score(_with(folders[0], mean), opened, split, where, batch)
        if value >= best:
            members, best = [*members, name], value
    if len(members) < 2 or best <= max(scores.values()):
        return Soup(scores, members, best, None)
    mean = mean_state([states[member] for member in members])
    return Soup(scores, members, best, _save(output, folders, names, members, mean, opened, split, best))


def check_same_recipe(ours: ModelFolder, theirs: ModelFolder, our_name: str, name: str) -> None:
    """Raise CheckpointError unless two models have the same architecture, spec, tokenizer and label set, so that their
    weights can be averaged."""
    differing = None
    if ours.model.config != theirs.model.config:
        differing = "architecture"
    elif ours.spec.hash != theirs.spec.hash:
        differing = "preprocessing spec"
    elif ours.labels.identity != theirs.labels.identity:
        differing = "label set"
    elif ours.model.text_encoder.tokenizer.get_vocab() != theirs.model.text_encoder.tokenizer.get_vocab():
        differing = "tokenizer"
    if differing is not None:
        raise CheckpointError(f"{name}: differs from {our_name} in its {differing}; average only runs of one recipe")


def mean_state(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor. Integer tensors (counters) are taken from the first model."""
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            mean[name] = torch.stack([state[name].double() for state in states]).mean(dim=0).to(first.dtype)
        else:
            mean[name] = first
    return mean


def score(loaded: ModelFolder, store: VolumeStore, split: str, cache: Path, batch: int) -> float:
    """Mean zero-shot AUROC of a model's own prompts on a split."""
    held, _ = embedded(loaded, store, labelled_volumes(store, split, None), cache, batch)
    scores = zero_shot_scores(loaded, held)
    value = mean_defined(aurocs(held, scores)) if scores is not None else float("nan")
    if not np.isfinite(value):
        raise DataError(
            f"{loaded.path}: its prompts cover no label with both classes in split {split!r} of {store.path}"
        )
    return value


def _with(folder: ModelFolder, state: dict[str, Tensor]) -> ModelFolder:
    """The same model with other weights."""
    fresh = load_model(folder.path)
    fresh.model.load_state_dict(state)
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()[:12]
    return dataclasses.replace(fresh, hash=digest)


def _state(folder: ModelFolder) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in folder.model.state_dict().items()}


def _check_unseen(folders: Sequence[ModelFolder], names: Sequence[str], store: VolumeStore, split: str) -> None:
    """Raise DataError if a model was adapted to patients of the split used for selection."""
    patients = sorted(set(store.cohort.loc[store.cohort["split"] == split, "patient"].astype(str)))
    for name, folder in zip(names, folders, strict=True):
        for record in _records(folder):
            if seen := record.saw(patients):
                raise DataError(
                    f"{name}: was adapted to {len(seen)} patients of split {split!r}, the first {seen[0]!r}; use another --split"
                )


def _records(folder: ModelFolder) -> list[Adaptation]:
    return [Adaptation.load(folder.path / FILE)] if (folder.path / FILE).is_file() else []


def _save(
    output: Path, folders: Sequence[ModelFolder], names: Sequence[str], members: Sequence[str], state: dict[str, Tensor],
    store: VolumeStore, split: str, auroc: float,
) -> Path:  # fmt: skip
    """Write the soup as a model folder, with a record of the patients of its members."""
    chosen = [folder for name, folder in zip(names, folders, strict=True) if name in members]
    supervisions = list(dict.fromkeys(folder.trained_on.supervision for folder in chosen))
    supervision = "label-supervised" if "label-supervised" in supervisions else " + ".join(supervisions)
    trained_on = chosen[0].trained_on.model_copy(update={"supervision": supervision})
    listed = ", ".join(f"{folder.hash}" for folder in chosen)
    card = (
        f"# Soup of {len(chosen)} models\n\nsupervision: {supervision}\n\nThe mean of the weights of {listed}, chosen by the "
        f"labels of split {split!r} of {store.path.name} (mean zero-shot AUROC {auroc:.4f}). Not a medical device.\n"
    )
    prompts, labels = own_prompts(folders[0]), folders[0].labels
    model = _with(folders[0], state).model
    records = [record for folder in chosen for record in _records(folder)]

    def write_more(folder: Path) -> None:
        write_prompt_head(folder, prompts, labels.names)
        # Written before the folder is moved to its final place, so that every model has a record of its patients.
        if records:
            people = sorted(set(store.cohort["patient"].astype(str)))
            seen = {person for record in records for person in record.saw(people)}
            Adaptation.to("soup", f"{len(seen)} patients", folders[0].hash, seen).save(folder / FILE)

    save_model(output, model, labels, trained_on=trained_on, card=card, write_more=write_more)
    return output
