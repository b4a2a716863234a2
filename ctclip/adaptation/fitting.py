"""`ctclip probe` and `ctclip adapt --method coop`: embed once, fit to draws of labels, test, and save the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ctclip.adaptation.coop import CoopConfig, fit_contexts, initial_contexts
from ctclip.adaptation.examples import Examples, Splits, embedded, read_labelled
from ctclip.adaptation.figures import label_curve
from ctclip.adaptation.keep import check_head_name, keep_head
from ctclip.adaptation.probe import fit_probe
from ctclip.adaptation.protocol import Draw, Setting, draws_of, measure, summary
from ctclip.adaptation.shrinkage import Towards, fit_towards
from ctclip.adaptation.zero_shot import own_prompts, zero_shot_auroc
from ctclip.evaluation.tables import write_predictions
from ctclip.heads.contexts import ContextHead
from ctclip.heads.head import Head
from ctclip.heads.linear import LinearHead
from ctclip.heads.prompts import pair_vectors
from ctclip.inference.run import run_key
from ctclip.inference.scans import StoredScans
from ctclip.models.encoded import Encoded
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.store import VolumeStore

CURVE, CACHE = "curve.png", "embeddings"
ALL = Setting("fraction", 100.0)
# Labels (n, L; NaN: not used) and a seed -> the head fitted to them.
Fit = Callable[[Examples, np.ndarray, int], Head]


@dataclass(frozen=True)
class Options:
    """``labels``: a label table, or None for the labels of the store; ``head``: name of the saved head; ``draws``:
    number of draws per setting; ``towards_prompts``: shrink a probe towards the model's prompts instead of towards
    0."""

    labels: Path | None = None
    splits: Splits = field(default_factory=Splits)
    head: str = "probe"
    draws: int = 3
    batch: int = 8
    seed: int = 0
    force: bool = False
    towards_prompts: bool = False


@dataclass(frozen=True)
class Result:
    """``summary``: one row per setting; ``labels``: one row per setting, draw and label; ``zero_shot``: mean AUROC of
    the prompts over the labels they cover, or None; ``folder``: that of the saved head."""

    summary: pd.DataFrame
    labels: pd.DataFrame
    zero_shot: float | None
    head: Head
    folder: Path


def run_probe(loaded: ModelFolder, store: Path, output: Path, settings: Sequence[Setting], options: Options) -> Result:
    """Fit linear probes for ``settings``, test them on held-out patients, and save the probe of all training labels.

    Raises DataError or PreprocessingError, and saves nothing, if labels, a draw or the output cannot be used.
    """

    def fit(train: Examples, seen: np.ndarray, draw: int) -> Head:
        if options.towards_prompts:
            towards = towards_prompts(loaded, train.names)
            probe = fit_towards(train.vectors, seen, train.patients, towards, seed=options.seed + draw)
        else:
            probe = fit_probe(train.vectors, seen, train.patients, seed=options.seed + draw)
        weight, bias = (torch.from_numpy(part).float() for part in (probe.weight, probe.bias))
        return LinearHead(loaded.model, train.names, weight, bias)

    return _run("probe", LinearHead.kind, fit, loaded, store, output, settings, ALL, options)


def run_coop(
    loaded: ModelFolder, store: Path, output: Path, setting: Setting, config: CoopConfig, options: Options
) -> Result:
    """Learn prompts for ``setting``, test them on held-out patients, and save those of the first draw. Raises as
    ``run_probe`` does."""

    def fit(train: Examples, seen: np.ndarray, draw: int) -> Head:
        return learned_prompts(loaded, train, seen, config, options.seed + draw)

    return _run("coop", ContextHead.kind, fit, loaded, store, output, [setting], setting, options)


def learned_prompts(
    loaded: ModelFolder, train: Examples, seen: np.ndarray, config: CoopConfig, seed: int
) -> ContextHead:
    """Prompts learned from the labels ``seen`` (n, L; NaN: not used) of the training volumes, near the model's own."""
    prompts, asked = own_prompts(loaded), prompt_names(loaded, train.names)
    contexts = initial_contexts(loaded.model, asked, prompts, config, seed)
    # Written prompts are their own prior; random vectors use the model's prompts as prior.
    written = towards_prompts(loaded, train.names).directions if config.vectors else None
    learned = fit_contexts(
        loaded.model,
        contexts,
        train.vectors,
        seen,
        train.patients,
        config,
        prompts.ensemble,
        written=written,
        seed=seed,
    )
    return ContextHead(loaded.model, train.names, learned, prompts.ensemble)


def towards_prompts(loaded: ModelFolder, names: Sequence[str]) -> Towards:
    """The directions of the model's own prompts for labels ``names``."""
    positive, negative = pair_vectors(loaded.model, own_prompts(loaded), prompt_names(loaded, names))
    return Towards((positive - negative).float().cpu().numpy(), float(loaded.model.similarity.scale().detach()))


def prompt_names(loaded: ModelFolder, names: Sequence[str]) -> list[str]:
    """The names of labels in the prompts: those of the model's label set, if it has the label."""
    return [loaded.labels.resolve(name) or name for name in names]


def check_output(folder: Path, command: str) -> None:
    """Raise PreprocessingError unless ``command`` may write its tables to ``folder``."""
    check_folder(folder, is_output, f"output of `ctclip {command}`")


def is_output(folder: Path) -> bool:
    """Whether a folder was written by this command, even if it holds only embeddings."""
    return made_by_us(folder) or {path.name for path in folder.iterdir()} == {CACHE}


def score_vectors(head: Head, vectors: np.ndarray) -> np.ndarray:
    """Unit vectors (n, dim) of volumes -> scores (n, names) of a head that reads embeddings alone."""
    embedding = torch.from_numpy(vectors).float().to(head.model.device)
    nothing = embedding.new_zeros(len(embedding), 0, 0)
    encoded = Encoded(nothing, (0, 0, 0), embedding.new_zeros(len(embedding), 0), np.eye(4), embedding=embedding)
    with torch.inference_mode():
        return head.score(encoded).float().cpu().numpy()


def _run(
    method: str,
    kind: str,
    fit: Fit,
    loaded: ModelFolder,
    store: Path,
    output: Path,
    settings: Sequence[Setting],
    kept: Setting,
    options: Options,
) -> Result:
    """Fit to every draw of ``settings``, test, and save the first head of ``kept``."""
    tables = (f"{method}.csv", f"{method}_labels.csv", CURVE)
    check_output(output, method)
    check_head_name(loaded, options.head, kind)
    opened = VolumeStore(store)
    StoredScans(opened, None, loaded.spec, loaded.path)  # of the model's spec, or refused
    labelled, held = read_labelled(opened, options.splits, options.labels, loaded.labels.names)
    draws = draws_of(settings, labelled, options.draws)
    last = next((draw for draw in draws if draw.setting == kept), None) or Draw(kept, 0, kept.draw(labelled, 0))
    train, there = embedded(loaded, opened, labelled, output / CACHE, options.batch)
    test, _ = embedded(loaded, opened, held, output / CACHE, options.batch)
    draws, last = [replace(draw, labels=draw.labels[there]) for draw in draws], replace(last, labels=last.labels[there])
    heads: dict[tuple[str, int], Head] = {}

    def fitted(draw: Draw) -> Head:
        key = str(draw.setting), draw.number
        if key not in heads:
            heads[key] = fit(train, draw.labels, draw.number)
        return heads[key]

    by_label = measure(draws, train, test, lambda draw: score_vectors(fitted(draw), test.vectors))
    head = fitted(last)
    zero_shot, result = zero_shot_auroc(loaded, test), summary(by_label)
    key = run_key(
        loaded.hash, str(store.resolve()), str(replace(options, force=False)), [str(setting) for setting in settings]
    )
    with claimed_folder(output, method, key, tables, is_output, force=options.force):
        write_predictions(output / tables[0], result)
        write_predictions(output / tables[1], by_label)
        label_curve(output / CURVE, method, result, zero_shot)
        folder = keep_head(options.head, head, method, loaded, train, options.splits, last.used)
    return Result(result, by_label, zero_shot, head, folder)
