"""The work of `ctclip evaluate`: read, score, write."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip.errors import EvaluationError
from ctclip.evaluation.adapted import refuse_adapted
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.controls import histogram_aurocs, histograms
from ctclip.evaluation.evaluate import evaluate, plain
from ctclip.evaluation.figures import Focus
from ctclip.evaluation.metrics import mean_defined
from ctclip.evaluation.paired import paired_test
from ctclip.evaluation.protocol import Protocol, Thresholds, align, load_protocol, unnamed_protocol
from ctclip.evaluation.retrieval import evaluate_retrieval
from ctclip.evaluation.run_report import Example, Pictures, write_report
from ctclip.evaluation.tables import MARGIN, label_file, provenance, read_embeddings, read_labels, read_predictions
from ctclip.labels import labels_of_columns, store_labels
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.outputs import check_folder, check_run, claimed_folder, made_by_us
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore
from ctclip.versions import versions

# Files that mark an evaluation; the figures beside them belong to it.
FILES = ("metrics.json", "metrics.csv", "report.html")

EXAMPLES = 4
SECTIONS = ("findings", "impression")
MATRIX = 48


def run_evaluation(
    predictions: Path,
    output: Path,
    protocol: str | None = None,
    *,
    labels: Path | None = None,
    store: Path | None = None,
    run: Path | None = None,
    against: Path | None = None,
    calibration: Path | None = None,
    thresholds: Thresholds | None = None,
    bootstrap: int | None = None,
    seed: int = 0,
    force: bool = False,
    focus: Callable[[str], Focus | None] | None = None,
) -> dict[str, Any]:
    """Score a prediction file; see the command for the arguments. ``focus``: a function that returns, for the id of an
    example, the finding that its slices should show. Returns the content of ``metrics.json``.

    Raises PreprocessingError if ``output`` holds other files, another process writes there, or it holds an evaluation
    of other predictions and ``force`` is not given.
    """
    check_folder(output, is_evaluation, "output of `ctclip evaluate`")
    table, names = read_predictions(predictions)
    refuse_adapted(table, predictions, "test figures")
    key = _digest(predictions)
    check_run(output, "evaluate", key, FILES, is_evaluation, force=force)
    declared = load_protocol(protocol) if protocol is not None else unnamed_protocol(table, names, labels, store)
    if thresholds is not None:
        declared = declared.model_copy(update={"thresholds": thresholds})
    _scores_all(declared, names, predictions)
    truth = declared.merged(read_labels(label_file(labels, store), declared.columns()))
    fitted = Calibration.load(calibration) if calibration is not None else None
    if fitted is not None:
        table = _calibrated(table, names, fitted, predictions)
    result = evaluate(table, truth, declared, calibration=fitted, resamples=bootstrap, seed=seed)
    result |= {
        name: provenance(table, name) for name in ("model", "supervision", "trained_on", "spec", "prompts", "labels")
    }
    # From here on, keep only the rows that the protocol scores.
    scored, known, scores = align(table, truth, declared)
    opened = VolumeStore(store) if store is not None else None
    if opened is not None:
        _same_spec(opened, scored, predictions)
        result |= plain(split_coverage(opened, scored, declared))
        result["controls"] |= histogram_control(opened, scored, declared)
    embeddings = _embeddings(predictions.with_name("embeddings.parquet"), scored)
    if embeddings is not None:
        volumes, reports = embeddings["volume_embedding"], embeddings.get("report_embedding")
        result["retrieval"] = plain(evaluate_retrieval(scored["scan"].to_numpy(dtype=str), volumes, reports, known))
    if against is not None:
        other, others = read_predictions(against)
        _scores_all(declared, others, against)
        result["paired"] = {
            "against": str(against),
            **plain(paired_test(table, other, truth, declared, resamples=bootstrap, seed=seed)),
        }
    result = plain(result | {"versions": versions()})
    examples = _examples(opened, scored, known, declared, focus) if opened is not None else []
    pictures = Pictures(examples, _matrix(scored, embeddings), (scores, known))
    with claimed_folder(output, "evaluate", key, FILES, is_evaluation, force=force):
        write_text(output / "metrics.json", json.dumps(result, indent=2, allow_nan=False))
        with written_beside(output / "metrics.csv") as partial:
            write_csv(partial, _metrics_table(result["zero_shot"]), index_label="abnormality")
        write_report(output, f"Zero-shot evaluation: {declared.name}", result, run=run, pictures=pictures)
    return result


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def is_evaluation(folder: Path) -> bool:
    """Whether an evaluation may be written to a folder: it holds an evaluation, other tables of ctclip, or a demo."""
    return made_by_us(folder, {"metrics.json": b'"protocol"', "demo.json": b'"size"'})


def split_coverage(store: VolumeStore, volumes: pd.DataFrame, protocol: Protocol) -> dict[str, Any]:
    """``split``: the number of volumes in the splits of the scored volumes that were not scored, and how many of those
    are in the store. Counts scans if the protocol scores one volume per scan. Empty if the volumes belong to no
    split."""
    unit = "scan" if protocol.volumes == "one-per-scan" else "volume"
    cohort = store.cohort
    splits = sorted(cohort["split"][cohort["volume"].isin(volumes["volume"])].dropna().astype(str).unique())
    if not splits:
        return {}
    whole = cohort[cohort["split"].astype(str).isin(splits)]
    missing = whole[~whole[unit].isin(volumes[unit])]
    stored = missing[missing["volume"].isin(store.volumes)]
    count = {"expected": whole[unit].nunique(), "missing": missing[unit].nunique(), "in_store": stored[unit].nunique()}
    return {"split": {"names": splits, "unit": unit, **count}}


def _metrics_table(zero: dict[str, Any]) -> pd.DataFrame:
    """One row per abnormality and one with the means; each metric with the limits of its interval."""
    rows = {}
    for name, entry in zero["auroc"].items():
        row = {"auroc": entry["value"], "auroc_lower": entry["lower"], "auroc_upper": entry["upper"]}
        for metric, (low, high) in entry["intervals"].items():
            row |= {metric: entry[metric], f"{metric}_lower": low, f"{metric}_upper": high}
        rows[name] = row | {key: entry[key] for key in ("threshold", "positives", "n")}
    mean_low, mean_high = zero["mean_auroc_interval"]
    mean = {"auroc": zero["mean_auroc"], "auroc_lower": mean_low, "auroc_upper": mean_high}
    for metric, entry in zero["means"].items():
        mean |= {
            metric: entry["value"],
            f"{metric}_lower": entry["interval"][0],
            f"{metric}_upper": entry["interval"][1],
        }
    rows[f"mean of {zero['labels_defined']}"] = mean
    return pd.DataFrame(rows).T


def _same_spec(store: VolumeStore, table: pd.DataFrame, path: Path) -> None:
    if provenance(table, "spec") not in ("", store.spec.hash):
        raise EvaluationError(
            f"{path}: was predicted from volumes of spec {provenance(table, 'spec')}, but the store {store.path} holds "
            f"{store.spec.hash}; "
            f"give the store of those volumes"
        )


def _scores_all(protocol: Protocol, names: list[str], path: Path) -> None:
    absent = [name for name in protocol.predicted() if name not in names]
    if absent:
        raise EvaluationError(f"{path}: no scores for {absent[0]!r}, which protocol {protocol.name!r} asks for")


def _calibrated(table: pd.DataFrame, names: list[str], fitted: Calibration, path: Path) -> pd.DataFrame:
    """Compute probabilities from margins, whether the predictions were made before or after the calibration. The
    margins are not changed, because they rank the volumes."""
    for what, fitted_to in (("model", fitted.model), ("prompts", fitted.prompts)):
        predicted_by = provenance(table, what)
        if predicted_by and fitted_to and predicted_by != fitted_to:
            raise EvaluationError(
                f"{path}: predicted with {what} {predicted_by}, but the calibration was fitted to {what} {fitted_to}: use that model's own calibration, or "
                f"run `ctclip calibrate` again"
            )
    if not fitted.patients:
        print(
            f"warning: {path}: the calibration does not state which patients it was fitted on (a folder from a hub "
            f"never does), so it cannot be checked whether some of them are in this test set",
            file=sys.stderr,
        )
    fitted_on = fitted.saw(table["patient"].unique())
    if fitted_on:
        raise EvaluationError(
            f"{path}: {len(fitted_on)} of its patients, the first {fitted_on[0]!r}, are among those the calibration was fitted on; "
            f"thresholds must not come from the test set"
        )
    slope, intercept = fitted.of(names)
    margins = [f"{MARGIN}{name}" for name in names]
    if any(name not in table.columns for name in margins):
        raise EvaluationError(f"{path}: has no margins to calibrate; `ctclip zero-shot` writes them")
    return table.assign(
        **dict(zip(names, 1 / (1 + np.exp(-(table[margins].to_numpy() * slope + intercept))).T, strict=True))
    )


def histogram_control(store: VolumeStore, table: pd.DataFrame, protocol: Protocol) -> dict[str, Any]:
    """A supervised classifier on HU histograms, fitted to the stored volumes that were not predicted."""
    cohort = store.cohort.set_index("volume")
    predicted = [name for name in table["volume"] if name in cohort.index]
    patients = set(cohort.loc[predicted, "patient"])
    # Fit on one reconstruction per scan, and on no volume of a held-out patient.
    others = cohort.loc[[name for name in store.volumes if name in cohort.index]]
    others = others[~others["patient"].isin(patients)].groupby("scan").head(1)
    columns = list(protocol.labels)
    if len(others) < 20 or any(name not in cohort.columns for name in columns):
        return {}
    labels = others[columns].to_numpy(dtype=float, na_value=np.nan)
    kept = ~np.isnan(labels).any(axis=1)
    names = [*others.index[kept], *predicted]
    counted = histograms(store.read(name) for name in track(names, len(names), "histogram control"))
    truth = cohort.loc[predicted, columns].to_numpy(dtype=float, na_value=np.nan)
    split = int(kept.sum())
    values = histogram_aurocs(counted[:split], labels[kept], counted[split:], truth)
    return {
        "histogram_mean_auroc": mean_defined(values),
        "histogram_auroc": dict(zip(columns, values.tolist(), strict=True)),
    }


def _embeddings(path: Path, table: pd.DataFrame) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    arrays = read_embeddings(path)
    if not np.isfinite(arrays.get("volume_embedding", np.array(np.nan))).all():
        raise EvaluationError(f"{path}: a volume has no embedding; run `ctclip zero-shot` again")
    row = {name: index for index, name in enumerate(arrays["volume"])}
    if not set(table["volume"]) <= set(row):
        raise EvaluationError(
            f"{path}: does not hold the same volumes as the predictions beside it; run `ctclip zero-shot` again"
        )
    order = [row[name] for name in table["volume"]]
    return {name: values[order] for name, values in arrays.items()}


def _matrix(table: pd.DataFrame, embeddings: dict[str, np.ndarray] | None) -> np.ndarray | None:
    if embeddings is None or "report_embedding" not in embeddings:
        return None
    reports, volumes = embeddings["report_embedding"], embeddings["volume_embedding"]
    first = np.sort(np.unique(table["scan"].to_numpy(dtype=str), return_index=True)[1])
    chosen = [index for index in first if np.isfinite(reports[index]).all()][:MATRIX]
    return reports[chosen] @ volumes[chosen].T


def _examples(
    store: VolumeStore,
    table: pd.DataFrame,
    known: np.ndarray,
    protocol: Protocol,
    focus: Callable[[str], Focus | None] | None,
) -> list[Example]:
    """Choose a few volumes that together show as many different findings as possible, those with most findings
    first."""
    cohort = store.cohort.set_index("volume")
    order = np.argsort(-np.nan_to_num(known).sum(axis=1), kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, EXAMPLES).astype(int)] if len(order) >= EXAMPLES else order
    examples = []
    windows = (store_labels(store) or labels_of_columns("windows", ["any"])).windows
    for index in chosen:
        row = table.iloc[index]
        name = str(row["volume"])
        if name not in cohort.index:
            continue
        texts = {part: str(cohort.at[name, part]).strip() for part in SECTIONS if part in cohort.columns}
        report = "\n".join(f"{part.upper()}. {text or 'Not given.'}" for part, text in texts.items())
        labels = [int(value) if np.isfinite(value) else None for value in known[index]]
        detections = [(label, float(row[label]), truth) for label, truth in zip(protocol.labels, labels, strict=True)]
        detections.sort(key=lambda entry: -entry[1])
        hu = store.read(name).transpose(0, 2, 1) if store.spec.published_geometry else store.read(name)
        place = focus(name) if focus is not None else None
        examples.append(Example(name, hu, store.spec.spacing, report, detections, windows, place))
    return examples
