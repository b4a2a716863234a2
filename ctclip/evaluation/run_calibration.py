"""The work of `ctclip calibrate`: read, fit, write."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ctclip.errors import EvaluationError
from ctclip.evaluation.adapted import refuse_adapted
from ctclip.evaluation.calibration import Calibration, Method, fit_calibration
from ctclip.evaluation.protocol import unnamed_protocol
from ctclip.evaluation.tables import MARGIN, label_file, provenance, read_labels, read_predictions
from ctclip.preprocessing.outputs import check_file, claimed_file, file_holds
from ctclip.preprocessing.store import VolumeStore


def run_calibration(
    predictions: Path,
    model: Path,
    path: Path,
    *,
    model_hash: str,
    labels: Path | None = None,
    store: Path | None = None,
    method: Method = "platt",
) -> Calibration:
    """Fit a calibration to the predictions of a calibration split and save it in ``path``, beside the model's head."""
    check_file(path, file_holds(b'"lines"'))
    table, names = read_predictions(predictions)
    refuse_adapted(table, predictions, "a calibration")
    if provenance(table, "model") != model_hash:
        raise EvaluationError(
            f"{predictions}: not predictions of the model {model} ({model_hash}); run `ctclip zero-shot` with that model"
        )
    margins = [f"{MARGIN}{name}" for name in names]
    absent = [name for name in margins if name not in table.columns]
    if absent:
        raise EvaluationError(
            f"{predictions}: column {absent[0]!r} is missing; the predictions of `ctclip zero-shot` have margins"
        )
    source = label_file(labels, store)
    declared = unnamed_protocol(table, names, labels, store)
    truth = declared.merged(read_labels(source, declared.columns())).reindex(columns=names)
    without = table["volume"][~table["volume"].isin(truth.index)]
    if len(without):
        raise EvaluationError(
            f"{source}: has no labels for {len(without)} predicted volumes, the first {without.iloc[0]!r}"
        )
    truth = truth.loc[table["volume"]]
    fitted = fit_calibration(
        truth.to_numpy(dtype=float), table[margins].to_numpy(dtype=float), names, method=method,
        fitted_on=_fitted_on(table, predictions, store), model=model_hash, prompts=provenance(table, "prompts"), patients=table["patient"],
    )  # fmt: skip
    with claimed_file(path):
        fitted.save(path)
    return fitted


def _fitted_on(table: pd.DataFrame, predictions: Path, store: Path | None) -> str:
    """Describe the volumes, patients and split; warn about training or test splits."""
    words = f"{len(table)} volumes of {table['patient'].nunique()} patients"
    if store is None:
        return f"{words}, {predictions}"
    cohort = VolumeStore(store).cohort.set_index("volume")
    splits = sorted(set(cohort["split"].reindex(table["volume"]).dropna().astype(str)))
    if splits != ["calibration"]:
        print(
            f"warning: {predictions}: volumes of the split {', '.join(splits) or 'of another store'}, not of a calibration "
            f"split that neither trains nor tests; `ctclip preprocess --calibration-fraction 0.05` holds one out"
        )
    return f"{words}, split {', '.join(splits) or 'unknown'}"
