"""Retrieval between reports and volumes; the pool and what counts as a hit are part of the result."""

from __future__ import annotations

from typing import Any

import numpy as np

DEPTHS = (1, 5, 10, 50, 100)


def retrieval(queries: np.ndarray, pool: np.ndarray, wanted: np.ndarray, identity: np.ndarray) -> dict[str, Any]:
    """Recall@k and median rank of the best right answer.

    queries (n, d), pool (m, d) unit vectors; a pool entry is right if its ``identity`` (m,) is the query's
    ``wanted`` (n,): all reconstructions of a scan are right answers to its report. Ties count against us.
    """
    similarity = queries @ pool.T
    right = wanted[:, None] == identity[None, :]
    best = np.where(right, similarity, -np.inf).max(axis=1)
    rank = 1 + ((similarity >= best[:, None]) & ~right).sum(axis=1)
    depths = [k for k in DEPTHS if k <= len(pool)]
    return {
        **{f"recall@{k}": float(np.mean(rank <= k)) for k in depths},
        "median_rank": float(np.median(rank)),
        "queries": len(queries),
        "pool": len(pool),
        "chance_recall@10": float(min(1.0, 10 / len(pool))),
        "duplicates": "any reconstruction of the right scan is a hit; ties count against the model",
    }


def precision_by_labels(embeddings: np.ndarray, labels: np.ndarray, scans: np.ndarray, depth: int = 10) -> float:
    """MAP@depth of volume-to-volume retrieval: a neighbour is relevant in so far as it shares labels (Jaccard >= 0.5).

    Reconstructions of the query's own scan are not in its pool.
    """
    similarity = embeddings @ embeddings.T
    similarity[scans[:, None] == scans[None, :]] = -np.inf
    positive = labels == 1
    shared = (positive[:, None, :] & positive[None, :, :]).sum(axis=-1)
    union = (positive[:, None, :] | positive[None, :, :]).sum(axis=-1)
    relevant = np.where(union > 0, shared / np.maximum(union, 1), 1.0) >= 0.5
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :depth]
    hits = np.take_along_axis(relevant, order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return float(np.mean((precision * hits).sum(axis=1) / np.maximum(1, hits.sum(axis=1))))
