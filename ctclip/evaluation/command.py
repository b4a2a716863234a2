"""What `ctclip evaluate` does: read, score, write ``metrics.json``, ``metrics.csv`` and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip.errors import EvaluationError
from ctclip.evaluation.controls import histogram_aurocs, histograms
from ctclip.evaluation.evaluate import evaluate, evaluate_retrieval, plain
from ctclip.evaluation.metrics import mean_defined
from ctclip.evaluation.protocol import Protocol, load_protocol
from ctclip.evaluation.run_report import Example, write_report
from ctclip.evaluation.tables import read_labels, read_predictions
from ctclip.versions import versions
from preprocessing.files import write_text, written_beside
from preprocessing.progress import track
from preprocessing.store import VolumeStore

EXAMPLES = 4
MATRIX = 48


def run_evaluation(
    predictions: Path,
    output: Path,
    protocol: str,
    *,
    labels: Path | None = None,
    store: Path | None = None,
    run: Path | None = None,
    bootstrap: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score a prediction file; see the command for the arguments. Returns what ``metrics.json`` holds."""
    declared = load_protocol(protocol)
    table, names = read_predictions(predictions)
    absent = [name for name in declared.labels if name not in names]
    if absent:
        raise EvaluationError(f"{predictions}: no scores for {absent[0]!r}, which protocol {declared.name!r} asks for")
    if labels is None and store is None:
        raise EvaluationError("give --labels, or --store whose cohort table has them")
    source = labels if labels is not None else Path(str(store)) / "cohort.parquet"
    truth = read_labels(source, list(declared.labels))
    result = evaluate(table, truth, declared, resamples=bootstrap, seed=seed)
    known = truth.reindex(table["volume"]).to_numpy(dtype=float)
    opened = VolumeStore(store) if store is not None else None
    if opened is not None:
        result["controls"] |= _histogram_control(opened, table, declared)
    embeddings = _embeddings(predictions.with_name("embeddings.npz"), table)
    if embeddings is not None:
        result["retrieval"] = evaluate_retrieval(table, embeddings, known)
    result["versions"] = versions()
    write_text(output / "metrics.json", json.dumps(plain(result), indent=2))
    with written_beside(output / "metrics.csv") as partial:
        pd.DataFrame(result["zero_shot"]["auroc"]).T.to_csv(partial, index_label="abnormality")
    examples = _examples(opened, table, known, declared) if opened is not None else []
    matrix = _matrix(table, embeddings)
    write_report(output, f"Zero-shot evaluation: {declared.name}", result, run=run, examples=examples, matrix=matrix)
    return result


def _histogram_control(store: VolumeStore, table: pd.DataFrame, protocol: Protocol) -> dict[str, Any]:
    """A supervised classifier on HU histograms: fitted on the stored volumes that were not predicted."""
    cohort = store.cohort.set_index("volume")
    held = [name for name in table["volume"] if name in cohort.index]
    patients = set(cohort.loc[held, "patient"])
    # One reconstruction a scan to fit on, and no volume of a held-out patient.
    others = cohort.loc[[name for name in store.volumes if name in cohort.index]]
    others = others[~others["patient"].isin(patients)].groupby("scan").head(1)
    columns = list(protocol.labels)
    if len(others) < 20 or any(name not in cohort.columns for name in columns):
        return {}
    seen = others[columns].to_numpy(dtype=float, na_value=np.nan)
    kept = ~np.isnan(seen).any(axis=1)
    names = [*others.index[kept], *held]
    counted = histograms(store.read(name) for name in track(names, len(names), "histogram control"))
    truth = cohort.loc[held, columns].to_numpy(dtype=float, na_value=np.nan)
    split = int(kept.sum())
    values = histogram_aurocs(counted[:split], seen[kept], counted[split:], truth)
    return {
        "histogram_mean_auroc": mean_defined(values),
        "histogram_auroc": dict(zip(columns, values.tolist(), strict=True)),
    }


def _embeddings(path: Path, table: pd.DataFrame) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    if list(found.get("volume", [])) != list(table["volume"]):
        raise EvaluationError(
            f"{path}: holds other volumes than the predictions beside it; run `ctclip zero-shot` again"
        )
    return found


def _matrix(table: pd.DataFrame, embeddings: dict[str, np.ndarray] | None) -> np.ndarray | None:
    if embeddings is None or "report_embeddings" not in embeddings:
        return None
    reports, volumes = embeddings["report_embeddings"], embeddings["volume_embeddings"]
    first = np.sort(np.unique(table["scan"].to_numpy(dtype=str), return_index=True)[1])
    chosen = [index for index in first if np.isfinite(reports[index]).all()][:MATRIX]
    return reports[chosen] @ volumes[chosen].T


def _examples(store: VolumeStore, table: pd.DataFrame, known: np.ndarray, protocol: Protocol) -> list[Example]:
    """A few volumes with as many different findings as there are, most first."""
    cohort = store.cohort.set_index("volume")
    order = np.argsort(-np.nan_to_num(known).sum(axis=1), kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, EXAMPLES).astype(int)] if len(order) >= EXAMPLES else order
    examples = []
    for index in chosen:
        row = table.iloc[index]
        name = str(row["volume"])
        if name not in cohort.index:
            continue
        report = f"FINDINGS. {cohort.at[name, 'findings']!s}\nIMPRESSION. {str(cohort.at[name, 'impression']) or 'Not given.'}"
        labels = [int(value) if np.isfinite(value) else None for value in known[index]]
        found = [(label, float(row[label]), truth) for label, truth in zip(protocol.labels, labels, strict=True)]
        found.sort(key=lambda entry: -entry[1])
        examples.append(Example(str(name), store.read(name), store.spec.spacing, report, found))
    return examples
