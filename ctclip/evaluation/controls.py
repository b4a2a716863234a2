"""Two controls that show whether a result is meaningful: a histogram classifier, and shuffled labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ctclip.evaluation.metrics import auroc, mean_defined

LOWEST, HIGHEST = -1100, 3100
# Lower edges of the bins in HU: 20 HU wide for lung and soft tissue, wider for bone, one bin for metal.
BINS = np.array([LOWEST, *range(-1000, 300, 20), *range(300, 1000, 60), 1000])


def histograms(volumes: Iterable[np.ndarray]) -> np.ndarray:
    """Fraction of voxels in each HU bin: int16 volumes -> (volumes, bins). Positions are not used."""
    shares = []
    for hu in volumes:
        count = np.bincount(np.clip(hu, LOWEST, HIGHEST).ravel() - LOWEST, minlength=HIGHEST - LOWEST + 1)
        shares.append(np.add.reduceat(count, BINS - LOWEST) / hu.size)
    return np.stack(shares)


def histogram_aurocs(
    train: np.ndarray, train_labels: np.ndarray, valid: np.ndarray, valid_labels: np.ndarray
) -> np.ndarray:
    """AUROC of each label on held-out volumes for a supervised classifier that sees only the HU histogram.

    The classifier is a logistic regression or gradient boosting, whichever is better in cross-validation on the
    training volumes. NaN for a label with fewer than five positive or negative training volumes.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted_to, held_out = np.sqrt(train), np.sqrt(valid)
    values = []
    for label in range(train_labels.shape[1]):
        target, truth = train_labels[:, label], valid_labels[:, label]
        if min(target.sum(), (1 - target).sum()) < 5:
            values.append(np.nan)
            continue
        candidates: list[Any] = [
            make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=500)),
            HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=8, learning_rate=0.1),
        ]
        fits = [cross_val_score(c, fitted_to, target, cv=3, scoring="roc_auc").mean() for c in candidates]
        best = candidates[int(np.argmax(fits))].fit(fitted_to, target)
        values.append(auroc(truth, best.predict_proba(held_out)[:, 1]))
    return np.array(values)


def shuffled_aurocs(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, *, times: int = 20, seed: int = 0
) -> np.ndarray:
    """Mean AUROC against the labels of other patients, once for each of ``times`` permutations of the patients.

    ``labels``, ``scores`` (n, L), NaN labels are ignored; ``groups`` (n,): patients. Each volume gets the labels of the
    first volume of the patient that its own patient is exchanged with.
    """
    names, member = np.unique(groups, return_inverse=True)
    first = np.array([np.flatnonzero(member == index)[0] for index in range(len(names))])
    random = np.random.default_rng(seed)
    means = []
    for _ in range(times):
        exchanged = labels[first[random.permutation(len(names))]][member]
        means.append(mean_defined([_auroc_of_known(exchanged[:, i], scores[:, i]) for i in range(labels.shape[1])]))
    return np.array(means)


def _auroc_of_known(labels: np.ndarray, scores: np.ndarray) -> float:
    known = ~np.isnan(labels)
    return auroc(labels[known], scores[known])
