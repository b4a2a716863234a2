"""`ctclip calibrate`: turn scores into calibrated probabilities."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Kind(StrEnum):
    platt = "platt"
    temperature = "temperature"


def calibrate(
    predictions: Path = typer.Argument(..., help="The predictions of `ctclip zero-shot` for the calibration split."),
    model: Path = typer.Option(
        ..., "--model", "-m", help="The model folder; calibration.json is written beside its head."
    ),
    labels: Path = typer.Option(None, help="A CSV of labels or a cohort table. Default: the labels in the store."),
    store: Path = typer.Option(None, help="The store that the predicted volumes come from."),
    head: str = typer.Option("prompts", help="The head that computed the predictions."),
    method: Kind = typer.Option(
        Kind.platt, help="platt: slope and offset for each label; temperature: one slope for all labels."
    ),
) -> None:
    """Fit calibrated probabilities and decision thresholds on a calibration split and save them with the model.

    `ctclip zero-shot --model M --store store --split calibration --output calibration`

    `ctclip calibrate calibration/predictions.csv --model M --store store`
    """
    from ctclip.errors import EvaluationError
    from ctclip.evaluation.run_calibration import run_calibration
    from ctclip.heads.folder import calibration_file
    from ctclip.models.folder import load_model

    loaded = load_model(str(model))
    path = calibration_file(model, head)
    replaced = path.exists()
    fitted = run_calibration(
        predictions, model, path, labels=labels, store=store, method=method.value, model_hash=loaded.hash
    )
    if not fitted.lines:
        raise EvaluationError(f"{predictions}: no label could be calibrated")
    print(f"{fitted.method} calibration of {len(fitted.lines)} abnormalities on {fitted.fitted_on}")
    for name, reason in fitted.uncalibrated.items():
        print(f"not calibrated: {name} ({reason}); it keeps its uncalibrated softmax")
    if replaced:
        print("note: replaced the previous calibration of the head")
    print(f"kept: {path}")
