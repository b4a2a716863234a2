"""Detect reports that do not belong to their volume, by a likelihood ratio of embeddings and without labels.

The embeddings of volumes and reports are modelled as jointly normal, with canonical correlations (Hotelling 1936)
estimated from the pairs of other patients. The score of a pair is log p(report | volume) - log p(report), calibrated
together with the similarity that the model was trained on, with pairs that are known to be wrong: below 0, the report fits
another volume as well as this one. The model is fitted twice, the second time without the worst pairs of the first fit,
like a filtering network trained on cleaner data (Fang et al. 2023, "Data filtering networks").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FOLDS = 10
# Fraction of the pairs of the first fit that the second fit leaves out.
DOUBTED = 0.15
# Maximum number of axes of volumes and of reports, for matches and for sides. More than a tenth of the number of pairs
# would fit noise.
MOST_AXES, MOST_AXES_OF_SIDES = 64, 24
FEWEST_PAIRS = 50
# Number of volumes compared with all reports at a time, which bounds memory.
TOGETHER = 512
# Quantiles of the scores of wrong pairs at which both distributions are compared.
PLACES = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Joint:
    """Volumes and reports as pairs of correlated standard normals: the mean (dim,) and axes (dim, k) of each, and the
    correlations (k,)."""

    means: tuple[np.ndarray, np.ndarray]
    axes: tuple[np.ndarray, np.ndarray]
    correlations: np.ndarray

    @classmethod
    def fit(cls, volumes: np.ndarray, reports: np.ndarray, *, centred: bool = False) -> Joint:
        """volumes (n, d), reports (n, e). ``centred``: the means are known to be 0."""
        whitened, means, axes = [], [], []
        most = max(2, min(MOST_AXES_OF_SIDES if centred else MOST_AXES, len(volumes) // 10))
        for side in (volumes, reports):
            mean = np.zeros(side.shape[1]) if centred else side.mean(axis=0)
            values, vectors = np.linalg.eigh((side - mean).T @ (side - mean) / len(side))
            kept = np.flatnonzero(values > 1e-6 * max(values[-1], 1e-300))[-most:]
            axis = vectors[:, kept] / np.sqrt(values[kept])
            whitened.append((side - mean) @ axis)
            means.append(mean)
            axes.append(axis)
        left, correlations, right = np.linalg.svd(whitened[0].T @ whitened[1] / len(volumes), full_matrices=False)
        count = len(correlations)
        # Subtract from the squared canonical correlations what chance alone contributes.
        squares = np.clip((correlations**2 - count / len(volumes)) / (1 - min(0.9, count / len(volumes))), 0, 0.98)
        used = squares > 0
        return cls(
            (means[0], means[1]),
            (axes[0] @ left[:, used], axes[1] @ right.T[:, used]),
            np.sqrt(squares[used]),
        )

    def log_ratio(self, volumes: np.ndarray, reports: np.ndarray) -> np.ndarray:
        """log p(volume, report) - log p(volume) p(report): (n,)."""
        x, y, r = *self._scores(volumes, reports), self.correlations
        terms = -0.5 * np.log1p(-(r**2)) + (r * x * y - r**2 * (x**2 + y**2) / 2) / (1 - r**2)
        return np.asarray(terms.sum(axis=1))

    def log_odds_of_sign(self, volumes: np.ndarray, reports: np.ndarray) -> np.ndarray:
        """log p(volume, report) - log p(volume, -report): (n,)."""
        x, y, r = *self._scores(volumes, reports), self.correlations
        return np.asarray((2 * r * x * y / (1 - r**2)).sum(axis=1))

    def _scores(self, volumes: np.ndarray, reports: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (volumes - self.means[0]) @ self.axes[0], (reports - self.means[1]) @ self.axes[1]


def match_scores(
    volumes: np.ndarray, reports: np.ndarray, patients: np.ndarray, *, scale: float, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Log odds (n,) that a report belongs to its volume rather than to another, estimated from the pairs of other
    patients and the model's own similarity, and the estimated fraction of swapped pairs.

    ``volumes``, ``reports`` (n, d): embeddings; ``patients`` (n,); ``scale``: the model's inverse temperature.
    """
    scores, wrong, partner = _cross_fitted(volumes, reports, patients, seed, centred=False)
    both = (scores, wrong), contrasts(volumes, reports, partner, scale)
    right, others = _calibrated([kind[0] for kind in both], [kind[1] for kind in both], symmetric=False)
    return right, share_wrong(right, others)


def side_scores(
    asymmetry: np.ndarray, sides: np.ndarray, patients: np.ndarray, *, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Log odds (n,) that a report belongs to its volume rather than to the volume's mirror image, and the estimated
    fraction of pairs with left and right exchanged.

    ``asymmetry`` (n, d): embedding of each volume minus that of its mirror image; ``sides`` (n, e): what the report
    states about the left minus what it states about the right (``sides.signed_sentences``). Give only pairs whose
    report names a side.
    """
    scores, wrong, _ = _cross_fitted(asymmetry, sides, patients, seed, centred=True)
    return _calibrated([scores], [wrong], symmetric=True)[0], share_wrong(scores, wrong)


def contrasts(
    volumes: np.ndarray, reports: np.ndarray, partner: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The sum (n,) of both log softmaxes of the contrastive loss for each volume and its own report, and for each volume and
    the report of its ``partner`` (n,)."""
    from scipy.special import logsumexp

    of_volumes, of_reports = np.empty(len(volumes)), np.full(len(volumes), -np.inf)
    for first in range(0, len(volumes), TOGETHER):
        part = slice(first, first + TOGETHER)
        similarity = scale * volumes[part] @ reports.T
        of_volumes[part] = logsumexp(similarity, axis=1)
        of_reports = np.logaddexp(of_reports, logsumexp(similarity, axis=0))
    own, other = (
        2 * scale * np.sum(volumes * reports[row], axis=1) - of_volumes - of_reports[row]
        for row in (np.arange(len(volumes)), partner)
    )
    return own, other


def pair_scores(match: np.ndarray, side: np.ndarray, swapped: float, exchanged: float) -> np.ndarray:
    """Log odds (n,) that a pair is right rather than swapped or with exchanged sides. ``swapped`` and ``exchanged`` are
    the fractions of such pairs: if sides are rarely exchanged, evidence from the sides must not hide a swapped pair.
    ``side`` (n,) is NaN if the report names no side; then only ``match`` is used."""
    of_sides = np.where(np.isnan(side), -np.inf, np.log(exchanged) - side)
    return np.asarray(-np.logaddexp(np.log(swapped) - match, of_sides))


def exchanged_alone(exchanged: float, swapped: float, pairs: int) -> float:
    """Correct the estimated fraction of exchanged sides for swapped pairs, of which half seem to be exchanged too. Returns at
    least the fraction that one of the ``pairs`` is."""
    return max(exchanged - swapped / 2, 1 / pairs)


def share_wrong(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Estimate the fraction of wrong pairs among those with ``scores`` (n,), given the scores of pairs that are known
    to be ``wrong``.

    A larger fraction would imply more low scores than there are (Scott 2015, "A rate of convergence for mixture
    proportion estimation"): the smallest ratio of the two cumulative distributions, taken at several quantiles, is an
    upper bound.
    """
    below = [float((scores < limit).mean()) + 1 / len(scores) for limit in np.quantile(wrong, PLACES)]
    return float(min(1.0, *(share / place for share, place in zip(below, PLACES, strict=True))))


def _cross_fitted(
    volumes: np.ndarray, reports: np.ndarray, patients: np.ndarray, seed: int, *, centred: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cross-fitted scores (n,) of the pairs, and of as many wrong pairs: with the report of another pair of the fold, or
    mirrored; and the number (n,) of that other pair."""
    names, member = np.unique(patients, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[member]
    volumes, reports = volumes.astype(float), reports.astype(float)
    scores, wrong = np.zeros(len(volumes)), np.zeros(len(volumes))
    partner = np.arange(len(volumes))
    for number in range(FOLDS):
        own = np.flatnonzero(fold == number)
        partner[own] = np.roll(own, len(own) // 2)
    kept = np.ones(len(volumes), bool)
    for _ in range(2):
        for number in range(FOLDS):
            own = np.flatnonzero(fold == number)
            fitted = kept & (fold != number)
            joint = Joint.fit(volumes[fitted], reports[fitted], centred=centred)
            if centred:
                scores[own] = joint.log_odds_of_sign(volumes[own], reports[own])
                wrong[own] = -scores[own]
            else:
                scores[own] = joint.log_ratio(volumes[own], reports[own])
                wrong[own] = joint.log_ratio(volumes[own], reports[partner[own]])
        kept = scores >= np.quantile(scores, DOUBTED)
    return scores, wrong, partner


def _calibrated(
    scores: Sequence[np.ndarray], wrong: Sequence[np.ndarray], *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Calibrate one or more scores (n,) to log odds (n,) of pairs and of wrong pairs by logistic regression (Platt 1999),
    because a normal distribution fitted to few pairs is overconfident, most of all for outlying pairs. A score with a
    negative weight is left out."""
    from sklearn.linear_model import LogisticRegression

    both = [np.concatenate(kind) for kind in zip(scores, wrong, strict=True)]
    inputs = np.column_stack([np.sign(values) * np.log1p(np.abs(values)) for values in both])
    if not symmetric:
        inputs = (inputs - inputs.mean(axis=0)) / np.maximum(inputs.std(axis=0), 1e-12)
    truth = np.repeat([1, 0], len(inputs) // 2)
    for _ in range(len(both)):
        line = LogisticRegression(C=1e3, fit_intercept=not symmetric).fit(inputs, truth)
        inputs = np.where(line.coef_[0] > 0, inputs, 0.0)
    odds = inputs @ np.maximum(line.coef_[0], 0) + (float(line.intercept_[0]) if not symmetric else 0.0)
    return odds[: len(odds) // 2], odds[len(odds) // 2 :]


def worse_share(scores: np.ndarray) -> np.ndarray:
    """Fraction (n,) of pairs with a lower score, ties counted half: 0 for the worst, near 1 for the best."""
    from scipy.stats import rankdata

    return np.asarray((rankdata(scores) - 0.5) / len(scores))
