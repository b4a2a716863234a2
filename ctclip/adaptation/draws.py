"""Which labels are seen: a share of the patients (ConVIRT, Zhang et al. 2022, section 4.1), or so many examples a label.

A draw is the label matrix with NaN where a label is not seen, so that whatever is fitted takes a draw like any labels.
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

    Patients are drawn again until every label that has both classes among all patients has both in the draw; raises
    DataError where that does not come about.
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
        f"{percent:g} % of the patients are {count} of {len(people)}, which have one class only of "
        f"{names[int(np.flatnonzero(missing)[0])]!r}: give a larger share, or --shots"
    )


def shot_draw(labels: np.ndarray, patients: np.ndarray, shots: int, names: Sequence[str], seed: int) -> np.ndarray:
    """labels (n, L), patients (n,) -> for each label those of ``shots`` positive and as many negative patients, one volume
    a patient, each label's drawn by itself. Labels of one class only are not drawn. Raises DataError where a label has fewer."""
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
                    f"{shots} shots of {name!r} were asked for: there are {len(first)} {kind} training patients "
                    f"(counted once, the positive ones first); give fewer shots"
                )
            drawn[first[:shots], label] = value
            taken |= set(patients[first[:shots]])
    return drawn


def _both(labels: np.ndarray) -> np.ndarray:
    """(L,) bool: labels that have positives and negatives."""
    return np.asarray((labels == 1).any(axis=0) & (labels == 0).any(axis=0))
