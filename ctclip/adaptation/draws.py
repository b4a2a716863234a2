"""Draw training labels: a percentage of the patients (ConVIRT, Zhang et al. 2022, section 4.1), or a number of patients
per label.

A draw is the label matrix with NaN for labels that are not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctclip.errors import DataError

TRIES = 2000


def fraction_draw(
    labels: np.ndarray, patients: np.ndarray, percent: float, names: Sequence[str], seed: int
) -> np.ndarray:
    """labels (n, L) of 0, 1, NaN; patients (n,) -> the labels of ``percent`` % of the patients, all volumes of each.

    The draw is repeated until it has both classes of every label that has both among all patients. Raises DataError if
    that does not happen.
    """
    people = np.unique(patients)
    count = max(1, round(len(people) * percent / 100))
    needed = _both(labels)
    random = np.random.default_rng([seed, 3, round(1000 * percent)])
    missing = needed
    for _ in range(TRIES):
        chosen = np.isin(patients, random.choice(people, count, replace=False))
        missing = needed & ~_both(labels[chosen])
        if not missing.any():
            return np.where(chosen[:, None], labels, np.nan)
    raise DataError(
        f"{percent:g} % of the patients ({count} of {len(people)}) have only one class of "
        f"{names[int(np.flatnonzero(missing)[0])]!r}: give a larger percentage, or --shots"
    )


def shot_draw(labels: np.ndarray, patients: np.ndarray, shots: int, names: Sequence[str], seed: int) -> np.ndarray:
    """labels (n, L), patients (n,) -> the labels of ``shots`` positive and ``shots`` negative patients for each label,
    with one volume per patient, drawn separately for each label. Labels with only one class are left out. Raises
    DataError if there are too few."""
    drawn = np.full(labels.shape, np.nan)
    for label, name in enumerate(names):
        if not _both(labels[:, [label]])[0]:
            continue
        random = np.random.default_rng([seed, 5, shots, label])
        taken: set[str] = set()
        for value in (1, 0):
            rows = random.permutation(np.flatnonzero(labels[:, label] == value))
            first = [
                row
                for row in rows[np.sort(np.unique(patients[rows], return_index=True)[1])]
                if patients[row] not in taken
            ]
            if len(first) < shots:
                kind = "positive" if value else "negative"
                raise DataError(
                    f"{name!r} has {len(first)} {kind} training patients, fewer than the {shots} shots asked for "
                    f"(a patient counts once, as positive if possible); give fewer shots"
                )
            drawn[first[:shots], label] = value
            taken |= set(patients[first[:shots]])
    return drawn


def _both(labels: np.ndarray) -> np.ndarray:
    """(L,) bool: labels that have positives and negatives."""
    return np.asarray((labels == 1).any(axis=0) & (labels == 0).any(axis=0))
