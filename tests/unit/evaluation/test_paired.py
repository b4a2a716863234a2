"""The paired test compared with an enumeration of all exchanges, and its false-positive rate."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from ctclip.errors import EvaluationError
from ctclip.evaluation.paired import exchange_shares, paired_test
from ctclip.evaluation.protocol import Protocol


def predictions(scores: np.ndarray, patients: list[str], *, turned: bool = False) -> pd.DataFrame:
    """A prediction table whose margins are the scores; its probabilities may contradict them."""
    names = [f"v{index}" for index in range(len(scores))]
    table = pd.DataFrame({"volume": names, "patient": patients, "scan": names})
    for index, label in enumerate("AB"):
        table[f"margin:{label}"] = scores[:, index]
        table[label] = 1 / (1 + np.exp(scores[:, index] * (1 if turned else -1)))
    return table


def truth_of(labels: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(labels, columns=list("AB"), index=[f"v{index}" for index in range(len(labels))])


PROTOCOL = Protocol(name="p", describes="", labels=("A", "B"), bootstrap=200)


def test_shares_are_what_exchanging_a_patients_ranks_does() -> None:
    random = np.random.default_rng(0)
    labels = np.array([1.0, 1, 0, 0, 1, 0, 0, 1, 0])
    member = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5])
    first, second = random.normal(size=(2, 9)).round(1)
    shares = exchange_shares(labels, first, second, member, 6)
    ranks = np.stack([rankdata(first), rankdata(second)])
    for signs in itertools.product((1, -1), repeat=6):
        swapped = np.array(signs)[member] < 0
        ours, theirs = np.where(swapped, ranks[::-1], ranks)
        expected = roc_auc_score(labels, ours) - roc_auc_score(labels, theirs)
        assert np.dot(signs, shares) == pytest.approx(expected, abs=1e-12)


def test_p_is_the_share_of_exchanges_that_differ_as_much() -> None:
    """Six patients, all 64 exchanges of one label and of the mean, each by scikit-learn."""
    random = np.random.default_rng(4)
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 0], [1, 1], [0, np.nan], [0, 0], [1, 0]], dtype=float)
    patients = ["a", "a", "b", "c", "d", "d", "e", "f"]
    member = np.unique(patients, return_inverse=True)[1]
    sides = [random.normal(size=(8, 2)) for _ in range(2)]
    result = paired_test(
        predictions(sides[0], patients),
        predictions(sides[1], patients, turned=True),
        truth_of(labels),
        PROTOCOL,
        resamples=20000,
    )
    known = [~np.isnan(labels[:, label]) for label in (0, 1)]
    ranks = [[rankdata(side[known[label], label]) for side in sides] for label in (0, 1)]
    differences = []
    for signs in itertools.product((1, -1), repeat=6):
        pair = []
        for label in (0, 1):
            swapped = np.array(signs)[member][known[label]] < 0
            ours, theirs = np.where(swapped, ranks[label][::-1], ranks[label])
            truth = labels[known[label], label]
            pair.append(roc_auc_score(truth, ours) - roc_auc_score(truth, theirs))
        differences.append(pair)
    table = np.array(differences)
    columns = {"A": table[:, 0], "B": table[:, 1], "mean": table.mean(axis=1)}
    for name, values in columns.items():
        entry = result["mean"] if name == "mean" else result["labels"][name]
        assert entry["difference"] == pytest.approx(values[0], abs=1e-12)
        assert entry["p"] == pytest.approx(np.mean(np.abs(values) >= abs(values[0]) - 1e-12), abs=0.012)
        assert entry["first"] - entry["second"] == pytest.approx(entry["difference"])
    assert result["labels"]["A"]["first"] == pytest.approx(roc_auc_score(labels[:, 0], sides[0][:, 0]))
    assert result["labels"]["A"]["second"] == pytest.approx(roc_auc_score(labels[:, 0], sides[1][:, 0]))
    assert not result["labels"]["A"]["interval_trusted"]


def cohort(
    seed: int, *, skill: tuple[float, float], positive: int = 20, negative: int = 60
) -> tuple[pd.DataFrame, ...]:
    random = np.random.default_rng(seed)
    count = positive + negative
    member = np.repeat(np.arange(count), random.integers(1, 4, count))
    labels = np.stack([member < positive, random.permutation(count)[member] < positive], axis=1).astype(float)
    own = random.normal(size=(count, 2))[member]
    tables = [predictions(value * labels + own + random.normal(size=(count, 2))[member], [f"p{m}" for m in member]) for value in skill]  # fmt: skip
    return (*tables, truth_of(labels))


def test_a_better_model_is_seen_and_a_copy_is_not() -> None:
    ours, theirs, truth = cohort(0, skill=(2.5, 0.3))
    result = paired_test(ours, theirs.sample(frac=1, random_state=0), truth, PROTOCOL, resamples=400)
    assert result["mean"]["lower"] > 0
    assert result["mean"]["upper"] < 1
    assert result["mean"]["p"] == pytest.approx(1 / 401)
    assert result["labels"]["A"]["interval_trusted"]
    assert (result["resamples"], result["unit"]) == (400, "patient")
    back = paired_test(theirs, ours, truth, PROTOCOL, resamples=400)
    assert back["mean"]["upper"] < 0
    assert back["mean"]["difference"] == pytest.approx(-result["mean"]["difference"])
    same = paired_test(ours, ours, truth, PROTOCOL, resamples=50)
    assert (same["mean"]["difference"], same["mean"]["p"]) == (0, 1)
    assert paired_test(ours, theirs, truth, PROTOCOL)["resamples"] == 200
    with pytest.raises(EvaluationError, match=r"different volumes .10 are in only one of them, such as 'v0'"):
        paired_test(ours, theirs.iloc[10:], truth, PROTOCOL)


def test_an_undefined_label_leaves_the_mean_to_the_others() -> None:
    ours, theirs, truth = cohort(1, skill=(2.5, 0.3))
    result = paired_test(ours, theirs, truth.assign(B=0.0), PROTOCOL, resamples=100)
    assert np.isnan(result["labels"]["B"]["p"])
    assert result["mean"] == {key: value for key, value in result["labels"]["A"].items() if key != "interval_trusted"}
    nothing = paired_test(ours, theirs, truth.assign(A=0.0, B=1.0), PROTOCOL, resamples=100)
    assert np.isnan(nothing["mean"]["p"])


def test_one_patient_gives_no_interval() -> None:
    table = predictions(np.array([[0.1, 0.4], [0.5, 0.2], [0.7, 0.1]]), ["p"] * 3)
    result = paired_test(table, table, truth_of(np.array([[0, 1], [1, 0], [1, 0]], float)), PROTOCOL, resamples=20)
    assert result["mean"]["p"] == 1
    assert np.isnan([result["mean"]["lower"], result["mean"]["upper"]]).all()


def test_false_alarms_are_at_their_nominal_rate() -> None:
    """Two equally good models; 3 to 7 % of p at or below 0.05 (table: ``python -m tests.benchmarks.coverage``)."""
    random = np.random.default_rng(0)
    alarms = []
    for _ in range(500):
        member = np.repeat(np.arange(70), random.integers(1, 4, 70))
        labels = (member < 10).astype(float)
        own = random.normal(size=(2, 70))[:, member] + 0.3 * random.normal(size=(2, len(member)))
        shares = exchange_shares(labels, labels + own[0], labels + own[1], member, 70)
        exchanged = np.abs((random.integers(0, 2, (199, 70)) * 2 - 1) @ shares)
        alarms.append((1 + np.sum(exchanged >= abs(shares.sum()) - 1e-12)) / 200 <= 0.05)
    assert 0.03 <= np.mean(alarms) <= 0.07
