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


def precision_by_labels(
    embeddings: np.ndarray, labels: np.ndarray, scans: np.ndarray, depths: tuple[int, ...] = (5, 10, 50)
) -> dict[str, Any]:
    """MAP@k of volume-to-volume retrieval: a neighbour is relevant if its labels overlap with the query's by half or
    more (Jaccard; two volumes without any label are relevant to each other).

    embeddings (n, d) unit vectors, labels (n, L) of 0, 1, NaN (unknown counts as absent), scans (n,). Reconstructions
    of the query's own scan are not in its pool. Average precision as in TREC, over the first k.
    """
    positive = labels == 1
    count = positive.sum(axis=1)
    deepest = min(max(depths), len(scans))
    totals = {k: 0.0 for k in depths if k <= deepest}
    for query in range(len(scans)):
        similarity = embeddings @ embeddings[query]
        similarity[scans == scans[query]] = -np.inf
        order = np.argsort(-similarity, kind="stable")[:deepest]
        order = order[np.isfinite(similarity[order])]
        shared = (positive[order] & positive[query]).sum(axis=1)
        union = count[order] + count[query] - shared
        hits = np.where(union > 0, shared / np.maximum(union, 1), 1.0) >= 0.5
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        for k in totals:
            found = hits[:k].sum()
            totals[k] += float((precision[:k] * hits[:k]).sum() / found) if found else 0.0
    return {
        **{f"map@{k}": total / len(scans) for k, total in totals.items()},
        "relevant": "Jaccard of labels at least 0.5",
        "pool": len(scans),
        "duplicates": "reconstructions of the query's own scan are left out of its pool",
    }
