"""Ensembles of models with the same label set: probabilities are averaged, as in CheXzero (Tiu et al. 2022)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip import distributed
from ctclip.errors import DataError
from ctclip.evaluation.adapted import COLUMN
from ctclip.evaluation.tables import IDENTITY, MARGIN, VALUE, provenance, read_predictions, write_predictions
from ctclip.heads.head import Head
from ctclip.inference.run import Summary, detect, is_output, run_key
from ctclip.inference.scans import Scans
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.outputs import claimed_folder

EDGE = 1e-7


def check_same_names(names: Sequence[Sequence[str]], models: Sequence[str]) -> None:
    """Raise DataError unless all models score the same findings."""
    for model, these in zip(models[1:], names[1:], strict=True):
        if set(these) != set(names[0]):
            lacking = sorted(set(names[0]) ^ set(these))[0]
            raise DataError(
                f"{model}: scores different findings than {models[0]} ({lacking!r} is in only one of them); average "
                f"models with the same label set"
            )


def check_different(folders: Sequence[ModelFolder]) -> None:
    """Raise DataError if two model folders hold the same weights, which would count twice in a mean."""
    first: dict[str, Path] = {}
    for folder in folders:
        if (same := first.setdefault(folder.hash, folder.path)) is not folder.path:
            raise DataError(f"{folder.path}: holds the same weights as {same}; give each model once")


def detect_together(
    folders: Sequence[ModelFolder], heads: Sequence[Head], scans: Sequence[Scans], output: Path, *,
    batch: int = 8, reports: bool = False, suffix: str = ".csv", force: bool = False,
) -> Summary:  # fmt: skip
    """Run ``detect`` with each model into a subfolder of ``output``, and write the mean of their tables to ``output``.

    Raises the errors of ``detect``, and DataError if the models score different findings, or if two are the same.
    """
    check_same_names([head.names for head in heads], [str(folder.path) for folder in folders])
    check_different(folders)
    key = run_key(
        [[folder.hash, folder.model.precision] for folder in folders],
        [head.identity() for head in heads],
        scans[0].origin(),
    )
    table = output / f"predictions{suffix}"
    with contextlib.ExitStack() as held:
        claim = claimed_folder(output, "zero-shot", key, (table.name,), is_output, force=force)
        distributed.on_main(lambda: held.enter_context(claim))
        parts = [
            detect(*one, output / f"model_{number}", batch=batch, reports=reports, suffix=suffix, force=force)
            for number, one in enumerate(zip(folders, heads, scans, strict=True), start=1)
        ]
        distributed.on_main(lambda: average_predictions([part.predictions for part in parts], table))
    refused = {name: reason for part in parts for name, reason in part.refused.items()}
    return Summary(table, parts[0].embeddings, parts[0].volumes, refused)


def average_predictions(parts: Sequence[Path], output: Path) -> pd.DataFrame:
    """The mean of prediction tables of the same volumes and findings, written to ``output``.

    Probabilities are averaged, and the margin is the logit of the mean, so that both agree. ``adapted_on`` is set if
    any model was adapted to the volume's patient. Raises DataError if the tables do not match.
    """
    tables = [read_predictions(part) for part in parts]
    (first, names), others = tables[0], tables[1:]
    check_same_names([names, *(these for _, these in others)], [str(part) for part in parts])
    aligned = [first]
    for path, (table, _) in zip(parts[1:], others, strict=True):
        if set(table["volume"]) != set(first["volume"]):
            raise DataError(f"{path}: holds other volumes than {parts[0]}; predict the same scans with each model")
        aligned.append(table.set_index("volume").loc[first["volume"]].reset_index())
    mean = np.mean([table[names].to_numpy(dtype=float) for table in aligned], axis=0)
    bounded = np.clip(mean, EDGE, 1 - EDGE)
    result = first.loc[:, list(IDENTITY)].copy()
    result[names] = mean
    result[[f"{MARGIN}{name}" for name in names]] = np.log(bounded / (1 - bounded))
    graded = [str(name) for name in first.columns if str(name).startswith(VALUE) and all(name in t for t in aligned)]
    for name in graded:
        result[name] = np.mean([table[name].to_numpy(dtype=float) for table in aligned], axis=0)
    result = result.assign(**_joined(aligned))
    if any(COLUMN in table for table in aligned):
        seen = [table[COLUMN].to_numpy(dtype=int) for table in aligned if COLUMN in table]
        result[COLUMN] = np.max(seen, axis=0)
    result["warnings"] = first.get("warnings", "")
    write_predictions(output, result)
    return result


def _joined(tables: Sequence[pd.DataFrame]) -> dict[str, str]:
    """The joint provenance of the tables: one value if all agree, else all values. Labels used by one model count as
    used by the ensemble."""
    joined = {}
    for name in ("model", "supervision", "trained_on", "spec", "prompts", "labels"):
        values = list(dict.fromkeys(provenance(table, name) for table in tables))
        joined[name] = values[0] if len(values) == 1 else " + ".join(values)
    supervisions = [provenance(table, "supervision") for table in tables]
    if "label-supervised" in supervisions:
        joined["supervision"] = "label-supervised"
    return joined
