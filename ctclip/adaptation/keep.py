"""Save heads that were fitted to labels, with a record of the patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ctclip.adaptation.examples import Examples, Splits
from ctclip.errors import DataError
from ctclip.evaluation.adapted import FILE, Adaptation
from ctclip.heads.folder import FOLDER, NAME, list_heads, save_head
from ctclip.heads.head import Head
from ctclip.models.folder import CARD, ModelFolder, card_text, check_addition
from ctclip.preprocessing.files import in_turn, write_text


def check_head_name(loaded: ModelFolder, name: str, kind: str) -> None:
    """Raise DataError unless a head of ``kind`` may be saved as ``name``: the name is new, or belongs to such a head
    fitted here. Raise CheckpointError if the model folder is not writable."""
    if not NAME.fullmatch(name):
        raise DataError(f"{name!r} is not a valid name for a head: use letters, digits, - and _")
    for folder in (loaded.path, loaded.path / FOLDER):
        if folder.exists():
            check_addition(folder, "the head")
    there = {one.name: one for one in list_heads(loaded.path)}
    fitted_here = (loaded.path / FOLDER / name / FILE).is_file()
    if name in there and (there[name].kind != kind or not fitted_here):
        raise DataError(f"{loaded.path}: has a head {name!r} of its own ({there[name].kind}); choose another --head")


def keep_head(
    name: str,
    head: Head,
    method: str,
    loaded: ModelFolder,
    train: Examples,
    splits: Splits,
    used: np.ndarray | None = None,
) -> Path:
    """Save a fitted head with its model and return its folder. ``used`` (n,) bool: the training volumes with labels
    that were used; None: all."""
    head.adaptation = record(method, loaded, train, splits, used)
    words = f"{head.supervision}, {method}, fitted to labels of {head.adaptation.fitted_on}"
    return add_head(loaded.path, name, head, words)


def add_head(model: Path, name: str, head: Head, words: str) -> Path:
    """Save a head in a model folder and list it in the model card; return the head's folder. A lock serialises commands
    that add heads to the same model at the same time."""
    with in_turn(model):
        folder = save_head(model, name, head)
        _say_in_card(model, name, words)
    return folder


def _say_in_card(model: Path, name: str, words: str) -> None:
    """Add a line about a head to the model card, replacing an earlier one."""
    begin = f"Head {name}: "
    lines = card_text(model).splitlines() or ["# ctclip model"]
    kept = [line for line in lines if not line.startswith(begin)]
    write_text(model / CARD, "\n".join([*kept, f"{begin}{words}."]) + "\n")


def record(
    method: str, loaded: ModelFolder, train: Examples, splits: Splits, used: np.ndarray | None = None
) -> Adaptation:
    """The record of the fit. ``used`` (n,) bool: the volumes whose labels were used; None: all."""
    patients = train.patients if used is None else train.patients[used]
    words = f"{len(patients)} volumes of {len(np.unique(patients))} patients, split {splits.train}"
    return Adaptation.to(method, words, loaded.hash, patients)
