"""Scores of drafted reports: findings as read by a report reader, and word overlap.

All scores are computed from counts per report, so that a resample of patients is a weighted sum.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# N-grams of BLEU-4 (Papineni et al. 2002).
ORDER = 4
FINDINGS = ("macro_f1", "micro_f1", "crg")
WORDS = ("bleu_4", "rouge_l", "meteor")


@dataclass(frozen=True)
class Counts:
    """Counts for each report and label (n, L) float64, 0 if the reference is uncertain: true and false positives,
    false negatives, and whether the reference was read (1 or 0)."""

    true_positive: np.ndarray
    false_positive: np.ndarray
    false_negative: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, reference: np.ndarray, drafted: np.ndarray) -> Counts:
        """``reference`` (n, L) of 0, 1 and NaN (ignored); ``drafted`` (n, L) of 0 and 1."""
        known = ~np.isnan(reference)
        positive, called = (reference == 1) & known, (drafted == 1) & known
        parts = (positive & called, ~positive & called, positive & ~called, known)
        return cls(*(part.astype(float) for part in parts))


def finding_scores(counts: Counts, weights: np.ndarray) -> dict[str, np.ndarray]:
    """``FINDINGS`` under each row of weights (R, n): each (R,).

    Macro F1 is over the labels that at least one reference states; the F1 of a label that no draft states is 0. CRG
    (Hamamci et al. 2025, arXiv 2505.17167): with A findings stated in T places for one, r = (T - A) / 2A and s = r TP -
    r FN - FP, CRG = r A / (2 r A - s); it is 1 for perfect drafts, 0.5 for uninformative drafts and 1/3 if all findings
    are missed.
    """
    hits, wrong, missed = (
        weights @ part for part in (counts.true_positive, counts.false_positive, counts.false_negative)
    )
    stated = hits + missed
    each = _ratio(2 * hits, 2 * hits + wrong + missed)
    scored = stated > 0
    macro = _ratio((each * scored).sum(axis=1), scored.sum(axis=1).astype(float), np.nan)
    tp, fp, fn = (part.sum(axis=1) for part in (hits, wrong, missed))
    places = (weights @ counts.known).sum(axis=1)
    r = _ratio(places - (tp + fn), 2 * (tp + fn), np.nan)
    best = r * (tp + fn)
    crg = _ratio(best, 2 * best - (r * tp - r * fn - fp), np.nan)
    return {"macro_f1": macro, "micro_f1": _ratio(2 * tp, 2 * tp + fp + fn, np.nan), "crg": crg}


def label_f1(counts: Counts) -> np.ndarray:
    """F1 of each label (L,); NaN for a label that no reference states."""
    hits, wrong, missed = (
        part.sum(axis=0) for part in (counts.true_positive, counts.false_positive, counts.false_negative)
    )
    return np.where(hits + missed > 0, _ratio(2 * hits, 2 * hits + wrong + missed), np.nan)


class WordOverlap:
    """BLEU-4 of the corpus (sacrebleu, in lower case), mean ROUGE-L F1 (rouge-score) and mean METEOR (NLTK, if its WordNet is
    installed)."""

    def __init__(self, drafts: Sequence[str], references: Sequence[str]) -> None:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU

        bleu, rouge = BLEU(lowercase=True, effective_order=True), RougeScorer(["rougeL"])
        scores = [bleu.sentence_score(draft, [reference]) for draft, reference in zip(drafts, references, strict=True)]
        self.counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in scores], dtype=float)
        self.rouge = np.array([
            rouge.score(reference, draft)["rougeL"].fmeasure for draft, reference in zip(drafts, references, strict=True)
        ])  # fmt: skip
        self.meteor = meteor(drafts, references)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """``WORDS`` under each row of weights (R, n): each (R,); METEOR NaN if it cannot be computed."""
        total = weights.sum(axis=1)
        means = {
            name: np.full(len(weights), np.nan) if values is None else weights @ values / total
            for name, values in (("rouge_l", self.rouge), ("meteor", self.meteor))
        }
        return {"bleu_4": np.array([self._bleu(row) for row in weights @ self.counts]), **means}

    @staticmethod
    def _bleu(row: np.ndarray) -> float:
        from sacrebleu.metrics import BLEU

        correct, total = row[:ORDER].tolist(), row[ORDER : 2 * ORDER].tolist()
        score = BLEU.compute_bleu(correct, total, int(row[-2]), int(row[-1]), smooth_method="none")
        return float(score.score) / 100


def has_word_metrics() -> bool:
    """Whether the libraries of the extra ``reports`` are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("sacrebleu", "rouge_score"))


def meteor(drafts: Sequence[str], references: Sequence[str]) -> np.ndarray | None:
    """METEOR (Banerjee & Lavie 2005) of each draft, (n,); None without NLTK's WordNet, which NLTK does not install
    itself."""
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None
    pairs = zip(drafts, references, strict=True)
    return np.array(
        [single_meteor_score(reference.lower().split(), draft.lower().split()) for draft, reference in pairs]
    )


def _ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), empty), where=np.asarray(whole) > 0)
