"""Retrieval between reports and volumes. The result states the pool, its size and what counts as a hit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DEPTHS = (1, 5, 10, 50, 100)
LABEL_DEPTHS = (1, 5, 10, 50)


def evaluate_retrieval(
    scans: np.ndarray, volumes: np.ndarray, reports: np.ndarray | None, labels: np.ndarray | None
) -> dict[str, Any]:
    """Retrieval from report to volume, volume to report and volume to volume: recall@k and median rank of the correct
    scan, and similarity of the labels of query and retrieved scans.

    ``scans`` (n,) ids; ``volumes`` (n, dim) unit vectors; ``reports`` likewise, NaN where a volume has none; ``labels``
    (n, L) of 0, 1, NaN.
    """
    result: dict[str, Any] = {}
    every = f"all {len(volumes)} volumes of {len(np.unique(scans))} scans, every reconstruction its own entry"
    if reports is not None:
        reported = np.isfinite(reports).all(axis=1)
        first = np.zeros(len(scans), dtype=bool)
        first[np.unique(scans, return_index=True)[1]] = True
        chosen = first & reported
        distinct = len(np.unique(reports[chosen], axis=0))
        worded = f"{int(chosen.sum())} reports, one per scan, of which {distinct} differ"
        if chosen.any():
            result["report_to_volume"] = {
                **retrieval(reports[chosen], volumes, scans[chosen], scans),
                **_by_labels((reports, chosen), (volumes, np.ones_like(chosen)), labels, scans),
                "queries_are": worded, "pool_is": every, "duplicates": "any reconstruction of the report's scan is a hit; ties count against the model",
            }  # fmt: skip
            result["volume_to_report"] = {
                **retrieval(volumes[reported], reports[chosen], scans[reported], scans[chosen]),
                **_by_labels((volumes, reported), (reports, chosen), labels, scans),
                "queries_are": "every volume with a report", "pool_is": worded, "duplicates": "equal reports of other scans are ties, and ties count against the model",
            }  # fmt: skip
    _, scan, count = np.unique(scans, return_inverse=True, return_counts=True)
    twin = count[scan] > 1
    everything = np.ones(len(scans), dtype=bool)
    result["volume_to_volume"] = {
        **(retrieval(volumes[twin], volumes, scans[twin], scans, itself=np.flatnonzero(twin)) if twin.any() else {}),
        **_by_labels((volumes, everything), (volumes, everything), labels, scans),
        "queries_are": "recall and rank: volumes whose scan has another reconstruction, which is the correct match; map and jaccard: every volume",
        "pool": len(volumes), "pool_is": every, "duplicates": "the query itself is not in its pool; for map and jaccard no reconstruction of its scan is",
    }  # fmt: skip
    return result


def retrieval(
    queries: np.ndarray, pool: np.ndarray, target: np.ndarray, identity: np.ndarray, *, itself: np.ndarray | None = None
) -> dict[str, Any]:
    """Recall@k and median rank of the best correct match.

    ``queries`` (n, d), ``pool`` (m, d) unit vectors; a pool entry is correct if its ``identity`` (m,) is the query's
    ``target`` (n,): all reconstructions of a scan are correct matches for its report. Ties count against the model.
    ``itself`` (n,): index of the query in the pool, which is excluded.
    """
    similarity = queries @ pool.T
    right = target[:, None] == identity[None, :]
    if itself is not None:
        similarity[np.arange(len(queries)), itself] = -np.inf
        right[np.arange(len(queries)), itself] = False
    best = np.where(right, similarity, -np.inf).max(axis=1)
    rank = 1 + ((similarity >= best[:, None]) & ~right).sum(axis=1)
    size = len(pool) - (itself is not None)
    depths = [k for k in DEPTHS if k <= len(pool)]
    return {
        **{f"recall@{k}": float(np.mean(rank <= k)) for k in depths},
        "median_rank": float(np.median(rank)),
        "queries": len(queries),
        "pool": len(pool),
        "chance_recall@10": float(min(1.0, 10 * right.sum(axis=1).mean() / size)),
    }


def precision_by_labels(
    queries: np.ndarray,
    pool: np.ndarray,
    query_labels: np.ndarray,
    pool_labels: np.ndarray,
    query_scans: np.ndarray,
    pool_scans: np.ndarray,
    depths: tuple[int, ...] = LABEL_DEPTHS,
) -> dict[str, Any]:
    """Precision@k and MAP@k by shared labels, and the mean Jaccard index of labels among the first k, over scans other than
    the query's.

    queries (n, d), pool (m, d) unit vectors, labels (., L) of 0, 1, NaN (unknown counts as absent), scans (.,). An
    entry is relevant if its labels overlap with the query's by half or more (Jaccard; two scans without any label are
    relevant to each other). ``precision@k``: the fraction of the first k that is relevant (ConVIRT, Zhang et al. 2022,
    section 4.3); ``chance_precision``: that of the whole pool; average precision as in TREC, over the first k.
    ``jaccard@k`` is what CT-CLIP's script calls MAP@k; its pool includes the query itself, and otherwise only volumes
    with a finding.
    """
    query_positive, positive = query_labels == 1, pool_labels == 1
    deepest = min(max(depths), len(pool))
    kept = [k for k in depths if k <= deepest]
    precise, overlap, share = ({k: 0.0 for k in kept} for _ in range(3))
    chance = 0.0
    for query in range(len(queries)):
        similarity = pool @ queries[query]
        own = pool_scans == query_scans[query]
        similarity[own] = -np.inf
        chance += _relevant(positive[~own], query_positive[query])[0].mean() if not own.all() else 0.0
        order = np.argsort(-similarity, kind="stable")[:deepest]
        order = order[np.isfinite(similarity[order])]
        hits, jaccard = _relevant(positive[order], query_positive[query])
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        for k in kept:
            relevant = hits[:k].sum()
            share[k] += float(hits[:k].mean()) if len(hits) else 0.0
            precise[k] += float((precision[:k] * hits[:k]).sum() / relevant) if relevant else 0.0
            overlap[k] += float(jaccard[:k].mean()) if len(jaccard) else 0.0
    return {
        **{f"map@{k}": total / len(queries) for k, total in precise.items()},
        **{f"precision@{k}": total / len(queries) for k, total in share.items()},
        "chance_precision": chance / len(queries),
        **{f"jaccard@{k}": total / len(queries) for k, total in overlap.items()},
        "relevant": "Jaccard index of the labels at least 0.5, scans other than the query's own",
    }


def _relevant(labels: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive labels (m, L) bool of the entries and (L,) of a query -> which entries (m,) are relevant, and their
    Jaccard index (m,)."""
    shared = (labels & asked).sum(axis=1)
    union = labels.sum(axis=1) + asked.sum() - shared
    jaccard = np.where(union > 0, shared / np.maximum(union, 1), 1.0)
    return jaccard >= 0.5, jaccard


def compose(
    query: np.ndarray, plus: Sequence[np.ndarray] = (), minus: Sequence[np.ndarray] = (), weight: float = 1.0
) -> np.ndarray:
    """Move a scan's unit vector (..., dim) towards some texts and away from others (unit vectors (..., dim)) and
    normalise it: ALIGN's search by image and text (Jia et al. 2021, section 5.3)."""
    moved = query + weight * (sum(plus) - sum(minus))
    return np.asarray(moved / np.linalg.norm(moved, axis=-1, keepdims=True))


def composed_retrieval(
    volumes: np.ndarray,
    scans: np.ndarray,
    labels: np.ndarray,
    directions: np.ndarray,
    *,
    weight: float = 1.0,
    depth: int = 10,
) -> dict[str, Any]:
    """Search for scans with one more finding, by ``scan + weight * direction of the finding``, and by the scan alone
    as a control.

    ``volumes`` (n, dim) unit vectors; ``scans`` (n,); ``labels`` (n, L) of 0, 1, NaN; ``directions`` (L, dim) unit
    vectors, from the text that excludes a finding to the text that states it. A query is made for each scan and each
    finding that it is known to lack, if the pool has a scan with exactly the query's findings plus this one.
    ``found@k``: whether such a scan is among the first k scans; ``precision@k``: the fraction of them with the finding;
    ``by_itself``: the same without the text.
    """
    first = np.sort(np.unique(scans, return_index=True)[1])
    vectors, positive = volumes[first], labels[first] == 1
    absent = labels[first] == 0
    keys = [row.tobytes() for row in positive]
    figures = {name: [0.0, 0.0] for name in ("found", "precision")}
    asked = 0
    itself = vectors @ vectors.T
    for label, direction in enumerate(directions):
        wanted = positive.copy()
        wanted[:, label] = True
        pool = {key for key, has in zip(keys, positive[:, label], strict=True) if has}
        queries = [row for row in np.flatnonzero(absent[:, label]) if wanted[row].tobytes() in pool]
        if not queries:
            continue
        moved = compose(vectors[queries], [direction[None]], weight=weight) @ vectors.T
        for place, row in enumerate(queries):
            asked += 1
            for column, similarity in enumerate((moved[place], itself[row])):
                similarity = similarity.copy()
                similarity[row] = -np.inf
                nearest = np.argsort(-similarity, kind="stable")[:depth]
                figures["found"][column] += any(keys[one] == wanted[row].tobytes() for one in nearest)
                figures["precision"][column] += float(positive[nearest, label].mean())
    named = {f"{name}@{depth}": values[0] / max(asked, 1) for name, values in figures.items()}
    alone = {f"{name}@{depth}": values[1] / max(asked, 1) for name, values in figures.items()}
    return {**named, "by_itself": alone, "queries": asked, "pool": len(first)}


def _by_labels(
    queries: tuple[np.ndarray, np.ndarray],
    pool: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray | None,
    scans: np.ndarray,
) -> dict[str, Any]:
    """``precision_by_labels`` of queries against a pool, each given as (vectors, selected rows)."""
    if labels is None:
        return {}
    (query_vectors, asked), (pool_vectors, offered) = queries, pool
    return precision_by_labels(
        query_vectors[asked], pool_vectors[offered], labels[asked], labels[offered], scans[asked], scans[offered]
    )
