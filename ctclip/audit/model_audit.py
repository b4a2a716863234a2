"""Audit of a model: concepts associated with errors, accuracy in each group, and what embeddings reveal about the
scanner."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ctclip.audit.associations import FEWEST_PATIENTS, differences, false_discovery, normal_scores
from ctclip.audit.data_audit import SIGNIFICANT, Sheet
from ctclip.audit.groups import group_columns
from ctclip.evaluation.intervals import percentile_interval
from ctclip.evaluation.metrics import bootstrap_weights, weighted_ranking

RESAMPLES = 300
PROBE_FOLDS = 5
ERRORS = ("concept", "kind", "difference", "lower", "upper", "p", "adjusted_p", "significant", "patients")
FAIRNESS = (
    "group",
    "value",
    "patients",
    "mean_auroc",
    "lower",
    "upper",
    "difference",
    "difference_lower",
    "difference_upper",
)
SHORTCUTS = ("group", "values", "volumes", "embeddings", "histogram", "chance")


def errors(labels: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Cross-entropy (n,) of each volume in nats, averaged over its known labels, beyond that of volumes with the same labels.

    ``labels`` (n, L) hold 0, 1 and NaN; ``margins`` (n, L). The margins of each label are first fitted to its labels by
    logistic regression (Platt 1999), so that an uncalibrated label does not dominate the others. The rarer class of a label
    has larger errors, so that anything associated with many findings would seem associated with errors: the mean error
    of both classes is therefore set to the label's mean. NaN for a volume without a known label.
    """
    from sklearn.linear_model import LogisticRegression

    losses = np.full(labels.shape, np.nan)
    for column in range(labels.shape[1]):
        known = ~np.isnan(labels[:, column])
        truth = labels[known, column]
        if len(np.unique(truth)) < 2:
            continue
        scores = margins[known, column : column + 1]
        spread = scores.std() or 1.0
        logits = LogisticRegression(C=1e3).fit(scores / spread, truth).decision_function(scores / spread)
        loss = np.logaddexp(0, logits) - truth * logits
        of_class = np.array([loss[truth == value].mean() for value in (0, 1)])
        losses[known, column] = loss - of_class[truth.astype(int)] + loss.mean()
    counted = ~np.isnan(losses)
    total = np.where(counted, losses, 0).sum(axis=1)
    return np.divide(total, counted.sum(axis=1), out=np.full(len(labels), np.nan), where=counted.any(axis=1))


def audit_errors(sheet: Sheet, loss: np.ndarray) -> pd.DataFrame:
    """The difference in error (n,) between volumes whose concept score is above the median, or that have a value of the
    metadata, and the others (``ERRORS``); the strongest evidence first, with p values adjusted for all comparisons."""
    whole = sheet.with_metadata()
    patients = whole.table["patient"].to_numpy(dtype=str)
    ranked = normal_scores(loss[:, None])
    rows = []
    for column, (name, kind) in enumerate(zip(whole.names, whole.kinds, strict=True)):
        values = whole.values[:, column]
        known = ~np.isnan(values) & ~np.isnan(loss)
        if not known.any():
            continue
        is_indicator = column >= len(sheet.names)
        member = values > (0.5 if is_indicator else np.median(values[known]))
        (result,) = differences(ranked[known], member[known], patients[known])
        if result is not None:
            rows.append((name, kind, result.value, result.lower, result.upper, result.p, np.nan, 0, f"{result.patients[0]} and {result.patients[1]}"))  # fmt: skip
    table = pd.DataFrame(rows, columns=list(ERRORS))
    table["adjusted_p"] = false_discovery(table["p"].to_numpy())
    table["significant"] = (table["adjusted_p"] < SIGNIFICANT).astype(int)
    return table.iloc[np.lexsort((-table["difference"].abs(), table["p"]))].reset_index(drop=True)


def fairness(
    table: pd.DataFrame, labels: np.ndarray, margins: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Mean AUROC over labels in each group, and its difference from all other patients, with 95 % intervals by
    bootstrap over patients (``FAIRNESS``). ``labels`` and ``margins`` (n, L). The mean is over labels whose AUROC is
    defined in both."""
    patients = table["patient"].to_numpy(dtype=str)
    weights = np.concatenate([np.ones((1, len(table))), bootstrap_weights(patients, resamples, seed)])
    rows = []
    for group, values in group_columns(table).items():
        for value in np.unique(values[values != ""]):
            sides = [values == value, (values != value) & (values != "")]
            counts = [len(np.unique(patients[side])) for side in sides]
            if min(counts) < 2 * FEWEST_PATIENTS:
                continue
            areas = [_areas(labels[side], margins[side], weights[:, side]) for side in sides]
            shared = np.isfinite(areas[0][0]) & np.isfinite(areas[1][0])
            if not shared.any():
                continue
            own, others = (np.nanmean(area[:, shared], axis=1) for area in areas)
            difference = own - others
            one, two = percentile_interval(own[0], own[1:]), percentile_interval(difference[0], difference[1:])
            rows.append(
                (group, str(value), counts[0], own[0], one.lower, one.upper, difference[0], two.lower, two.upper)
            )
    frame = pd.DataFrame(rows, columns=list(FAIRNESS))
    return frame.sort_values("difference", ignore_index=True)


def shortcuts(table: pd.DataFrame, volumes: np.ndarray, histograms: np.ndarray, *, seed: int = 0) -> pd.DataFrame:
    """Balanced accuracy, on held-out patients, of predicting scanner, kernel, hospital and similar groups from
    embeddings (n, dim) and from HU histograms (n, bins) (``SHORTCUTS``). If embeddings predict a group much better than
    histograms, the model has learned it."""
    rows = []
    patients = table["patient"].to_numpy(dtype=str)
    for group, values in group_columns(table).items():
        known = values != ""
        if group == "split" or len(np.unique(patients[known])) < 2 * PROBE_FOLDS:
            continue
        accuracies = [
            _probe_accuracy(side[known], values[known], patients[known], seed) for side in (volumes, histograms)
        ]
        count = len(np.unique(values[known]))
        rows.append((group, count, int(known.sum()), *accuracies, 1 / count))
    frame = pd.DataFrame(rows, columns=list(SHORTCUTS))
    return frame.sort_values("embeddings", ascending=False, ignore_index=True)


def _areas(labels: np.ndarray, margins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC (resamples, L); NaN where undefined."""
    columns = []
    for column in range(labels.shape[1]):
        known = ~np.isnan(labels[:, column])
        if len(np.unique(labels[known, column])) < 2:
            columns.append(np.full(len(weights), np.nan))
            continue
        columns.append(weighted_ranking(labels[known, column], margins[known, column], weights[:, known])["auroc"])
    return np.stack(columns, axis=1)


def _probe_accuracy(inputs: np.ndarray, values: np.ndarray, patients: np.ndarray, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=300))
    folds = GroupKFold(PROBE_FOLDS, shuffle=True, random_state=seed)
    return float(balanced_accuracy_score(values, cross_val_predict(probe, inputs, values, groups=patients, cv=folds)))
