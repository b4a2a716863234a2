"""Retrieval against loops over queries and pool."""

from __future__ import annotations

import numpy as np
import pytest

from ctclip.evaluation.retrieval import (
    compose,
    composed_retrieval,
    evaluate_retrieval,
    precision_by_labels,
    retrieval,
)
from ctclip.evaluation.run_report import _retrieval


def test_retrieval_counts_ties_against_us_and_any_reconstruction_as_a_hit() -> None:
    pool = np.eye(4)
    scans = np.array(["a", "a", "b", "c"])
    queries = np.array([[0, 1.0, 0, 0], [1, 1, 1, 1.0]])
    result = retrieval(queries, pool, np.array(["a", "b"]), scans)
    assert result["recall@1"] == 0.5
    assert result["median_rank"] == 2.5
    assert (result["queries"], result["pool"]) == (2, 4)
    assert result["chance_recall@10"] == 1
    assert set(result) == {"recall@1", "median_rank", "queries", "pool", "chance_recall@10"}


def test_retrieval_is_the_brute_force_one_in_all_three_directions() -> None:
    random = np.random.default_rng(0)
    volumes, reports = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in random.normal(size=(2, 30, 5)))
    labels = (random.random((30, 3)) < 0.5).astype(float)
    scans = np.repeat([f"s{i:02d}" for i in range(15)], 2)
    reports[1::2] = reports[::2]  # reconstructions share their scan's report
    reports[[6, 7]] = reports[[2, 3]]  # two scans with the same report text
    result = evaluate_retrieval(scans, volumes, reports, labels)
    first = list(range(0, 30, 2))
    directions = {
        "report_to_volume": ([(i, reports[i]) for i in first], [(j, volumes[j]) for j in range(30)]),
        "volume_to_report": ([(i, volumes[i]) for i in range(30)], [(j, reports[j]) for j in first]),
        "volume_to_volume": ([(i, volumes[i]) for i in range(30)], [(j, volumes[j]) for j in range(30)]),
    }
    assert set(result) == set(directions)
    for name, (queries, pool) in directions.items():
        ranks, precise, overlap = [], {k: [] for k in (1, 5, 10)}, {k: [] for k in (1, 5, 10)}
        for i, query in queries:
            others = [(j, v) for j, v in pool if not (name == "volume_to_volume" and i == j)]
            best = max(v @ query for j, v in others if scans[j] == scans[i])
            ranks.append(1 + sum(v @ query >= best - 1e-15 for j, v in others if scans[j] != scans[i]))
            unlike = sorted((pair for pair in pool if scans[pair[0]] != scans[i]), key=lambda pair: -(pair[1] @ query))
            mine = set(np.flatnonzero(labels[i]))
            jaccard = []
            for j, _ in unlike:
                theirs = set(np.flatnonzero(labels[j]))
                jaccard.append(len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0)
            for k in (1, 5, 10):
                hits = [value >= 0.5 for value in jaccard[:k]]
                precisions = [sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit]
                precise[k].append(sum(precisions) / len(precisions) if precisions else 0.0)
                overlap[k].append(np.mean(jaccard[:k]))
        for k in (1, 5, 10):
            assert result[name][f"recall@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]), abs=1e-12)
            assert result[name][f"map@{k}"] == pytest.approx(np.mean(precise[k]), abs=1e-12)
            assert result[name][f"jaccard@{k}"] == pytest.approx(np.mean(overlap[k]), abs=1e-12)
        assert result[name]["median_rank"] == np.median(ranks)
        assert result[name]["pool"] == len(pool)
        assert result[name]["duplicates"]
    assert "of which 14 differ" in result["volume_to_report"]["pool_is"]
    table = {line[0]: line[1:] for line in _retrieval(result)["table"]}
    assert table["chance precision"] == [f"{each['chance_precision']:.3f}" for each in result.values()]
    assert table["pool"] == ["30", "15", "30"]
    assert table["median rank"] == [f"{each['median_rank']:g}" for each in result.values()]


def test_chance_is_the_share_of_right_answers_among_ten() -> None:
    random = np.random.default_rng(0)
    pool = random.normal(size=(100, 3))
    scans = np.repeat(np.arange(50), 2)
    assert retrieval(pool, pool, scans, scans)["chance_recall@10"] == pytest.approx(10 * 2 / 100)
    twins = retrieval(pool, pool, scans, scans, itself=np.arange(100))
    assert twins["chance_recall@10"] == pytest.approx(10 * 1 / 99)
    assert [key for key in twins if "@" in key][:5] == [f"recall@{depth}" for depth in (1, 5, 10, 50, 100)]
    labels = np.ones((100, 1))
    by_labels = precision_by_labels(pool, pool, labels, labels, scans, scans)
    assert [key for key in by_labels if "map" in key] == [f"map@{depth}" for depth in (1, 5, 10, 50)]
    assert "recall@100" not in retrieval(pool, pool[:99], scans, scans[:99])


def test_a_query_is_not_its_own_answer_and_a_missing_answer_is_no_hit() -> None:
    pool = np.array([[1.0, 0], [0.6, 0.8], [0.9, 0.1]])
    scans = np.array(["a", "a", "b"])
    itself = retrieval(pool[:1], pool, scans[:1], scans, itself=np.array([0]))
    assert itself["recall@1"] == 0
    assert itself["median_rank"] == 2
    nothing = retrieval(pool[:1], pool, np.array(["x"]), scans)
    assert nothing["recall@1"] == 0
    assert nothing["median_rank"] == 4


def test_average_precision_by_labels_by_hand() -> None:
    """A pool ordered by similarity to the query: relevant, not, relevant; unknown labels count as absent."""
    query, pool = np.array([[1.0, 0]]), np.array([[0.9, 0], [0.8, 0], [0.7, 0], [0.99, 0]])
    labels = np.array([[1.0, 1, np.nan]])
    others = np.array([[1.0, np.nan, 0], [0, 0, 1], [1, 1, 1], [1, 1, 0]])
    result = precision_by_labels(
        query, pool, labels, others, np.array(["q"]), np.array(["a", "b", "c", "q"]), depths=(1, 3, 4)
    )
    assert result["map@1"] == 1
    assert result["map@3"] == result["map@4"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["jaccard@1"] == pytest.approx(0.5)
    assert result["jaccard@3"] == pytest.approx((0.5 + 0 + 2 / 3) / 3)
    assert "at least 0.5" in result["relevant"]
    first = precision_by_labels(
        query, pool, labels, others, np.array(["q"]), np.array(["a", "b", "c", "q"]), depths=(1,)
    )
    assert first["map@1"] == 1  # the query's own scan, which is nearest, is excluded
    none = precision_by_labels(query, pool[:1], np.zeros((1, 3)), np.zeros((1, 3)), np.array(["q"]), np.array(["a"]))
    assert none["map@1"] == none["jaccard@1"] == 1
    assert "map@5" not in none
    alone = precision_by_labels(query, pool[:1], labels, others[:1], np.array(["q"]), np.array(["q"]), depths=(1,))
    assert alone["map@1"] == alone["jaccard@1"] == 0
    unlike = precision_by_labels(
        query, pool[:1], labels, np.array([[0.0, 0, 1]]), np.array(["q"]), np.array(["a"]), depths=(1,)
    )
    assert unlike["map@1"] == unlike["jaccard@1"] == 0


def test_what_is_missing_is_left_out() -> None:
    vectors = np.eye(3)
    scans = np.array(["a", "b", "c"])
    assert set(evaluate_retrieval(scans, vectors, None, None)) == {"volume_to_volume"}
    unwritten = evaluate_retrieval(scans, vectors, np.full((3, 3), np.nan), None)
    assert set(unwritten) == {"volume_to_volume"}
    assert "recall@1" not in unwritten["volume_to_volume"]
    reports = np.eye(3)
    reports[1] = np.nan
    partly = evaluate_retrieval(scans, vectors, reports, np.zeros((3, 1)))
    assert partly["report_to_volume"]["queries"] == 2
    assert partly["volume_to_report"]["pool"] == 2
    assert partly["report_to_volume"]["recall@1"] == partly["volume_to_report"]["recall@1"] == 1
    assert partly["report_to_volume"]["map@1"] == 1
    assert "2 reports, one per scan, of which 2 differ" in partly["report_to_volume"]["queries_are"]


def test_precision_at_k_is_the_share_that_shares_half_of_the_labels() -> None:
    """Four scans on a line; by hand: of the first query's two nearest one is relevant, and one of the three others."""
    vectors = np.array([[1.0, 0.0], [0.99, 0.14], [0.9, 0.44], [0.0, 1.0]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.array([[1.0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 1]])
    scans = np.arange(4)
    result = precision_by_labels(vectors, vectors, labels, labels, scans, scans, depths=(1, 2))
    # Jaccard of the pairs: 01 1/2, 02 0, 03 1/3, 12 0, 13 0, 23 1/2. Nearest two of 0: 1, 2; of 1: 0, 2; of 2: 1, 0; of 3: 2, 1.
    assert result["precision@2"] == pytest.approx((1 / 2 + 1 / 2 + 0 + 1 / 2) / 4)
    assert result["precision@1"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert result["chance_precision"] == pytest.approx(4 / 12)


def test_composition_finds_the_scan_with_one_finding_more() -> None:
    """Axis 0 is common to all scans, axes 1 and 2 are findings: adding a finding leads to the scan that also has it."""
    labels = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1], [0, 0], [0, 0]])
    vectors = np.column_stack([np.full(6, 1.0), 2 * labels, [0, 0, 0, 0, 0.1, 0.2]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0]])
    result = composed_retrieval(vectors, np.arange(6), labels, directions, depth=1)
    assert result["found@1"] == result["precision@1"] == 1
    assert result["by_itself"]["found@1"] < 0.5
    # For finding 0 scans 0, 4, 5 (scan 1 is theirs with it) and 2 (scan 3); for finding 1 likewise.
    assert result["queries"] == 8
    moved = compose(vectors[0], [directions[0]], [directions[1]], weight=0.5)
    expected = vectors[0] + 0.5 * (directions[0] - directions[1])
    assert np.allclose(moved, expected / np.linalg.norm(expected))
    assert np.allclose(compose(vectors[0]), vectors[0])
