"""Scores of drafted reports: against scikit-learn, the libraries themselves, and counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from ctclip.cli import main
from ctclip.evaluation.metrics import bootstrap_weights
from ctclip.evaluation.report_metrics import Counts, WordOverlap, finding_scores, label_f1
from ctclip.evaluation.run_reports import run_reports
from ctclip.labels import load_labels
from ctclip.preprocessing.cohorts.table import cohort_table
from ctclip.preprocessing.store import VolumeStore
from tests.unit.small import spec_of


def test_f1_is_scikit_learns_and_a_resample_is_a_weighted_sum() -> None:
    random = np.random.default_rng(0)
    truth, drafted = (random.random((40, 5)) < 0.4).astype(float), (random.random((40, 5)) < 0.5).astype(float)
    counts = Counts.of(truth, drafted)
    one = finding_scores(counts, np.ones((1, 40)))
    each = f1_score(truth, drafted, average=None)
    np.testing.assert_allclose(label_f1(counts), each)
    assert one["macro_f1"][0] == pytest.approx(each.mean())
    assert one["micro_f1"][0] == pytest.approx(f1_score(truth, drafted, average="micro"))
    weights = bootstrap_weights(np.arange(40), 3, seed=1)
    for row, many in zip(weights, finding_scores(counts, weights)["macro_f1"], strict=True):
        chosen = np.repeat(np.arange(40), row.astype(int))
        assert many == pytest.approx(f1_score(truth[chosen], drafted[chosen], average="macro"))


def test_labels_that_no_reference_states_and_those_in_doubt_are_left_out() -> None:
    truth = np.array([[1.0, 0, np.nan], [0, 0, 1]])
    drafted = np.array([[1.0, 1, 1], [0, 0, 1]])
    scores = finding_scores(Counts.of(truth, drafted), np.ones((1, 2)))
    assert scores["macro_f1"][0] == 1
    assert scores["micro_f1"][0] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert np.isnan(label_f1(Counts.of(truth, drafted))[1])


@pytest.mark.parametrize(
    ("drafted", "crg"),
    [
        ([[1, 0, 0, 0], [0, 0, 0, 0]], 1.0),  # perfect
        ([[0, 0, 0, 0], [0, 0, 0, 0]], 1 / 3),  # r = 3.5, s = -3.5: 3.5 / (7 + 3.5)
        ([[1, 1, 0, 0], [0, 0, 0, 0]], 3.5 / (7 - 2.5)),
    ],
)
def test_crg_by_hand(drafted: list[list[int]], crg: float) -> None:
    truth = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    assert finding_scores(Counts.of(truth, np.array(drafted)), np.ones((1, 2)))["crg"][0] == pytest.approx(crg)


def test_words_in_common_are_the_libraries() -> None:
    drafts = ["The heart is enlarged and a nodule is seen.", "No pleural effusion is seen in the chest."]
    references = ["The heart is enlarged. A nodule is seen.", "There is no pleural effusion in the chest."]
    scores = WordOverlap(drafts, references).scores(np.array([[1.0, 1], [2, 0]]))
    expected = sacrebleu.corpus_bleu(drafts, [references], lowercase=True).score / 100
    assert scores["bleu_4"][0] == pytest.approx(expected)
    twice = sacrebleu.corpus_bleu([drafts[0]] * 2, [[references[0]] * 2], lowercase=True).score / 100
    assert scores["bleu_4"][1] == pytest.approx(twice)
    rouge = RougeScorer(["rougeL"])
    each = [rouge.score(r, d)["rougeL"].fmeasure for r, d in zip(references, drafts, strict=True)]
    assert scores["rouge_l"].tolist() == pytest.approx([np.mean(each), each[0]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reports = [
        "A nodule is seen in the left upper lobe. There is a right pleural effusion.",
        "No nodule is seen. There is cardiomegaly.",
        "A nodule is seen in the right lower lobe. Pleural effusions are seen on both sides.",
        "",
        "No nodule is seen. Emphysema is seen.",
        "No nodule is seen. Emphysema is seen.",
        "A nodule is seen.",
    ]
    records = [
        {"volume": f"v{n}", "patient": f"p{n}", "scan": f"s{n}", "path": f"v{n}.nii.gz", "split": "valid" if n < 4 else "train",
         "findings": text, "impression": "Not given."}
        for n, text in enumerate(reports)
    ]  # fmt: skip
    opened = VolumeStore.create(tmp_path_factory.mktemp("reports") / "store", spec_of((4, 4, 4)))
    cohort_table(records).to_parquet(opened.path / "cohort.parquet")
    load_labels("ct_rate_18").save(opened.path / "labels.yaml")
    return opened.path


def write(path: Path, texts: dict[str, str], detected: str | None = None) -> Path:
    table = pd.DataFrame({"volume": list(texts), "findings": list(texts.values()), "impression": ""})
    (table if detected is None else table.assign(detected=detected)).to_csv(path, index=False)
    return path


DRAFTS = {
    "v0": "A nodule is seen in the right upper lobe. There is a right pleural effusion. Emphysema in the left lung.",
    "v1": "Cardiomegaly is seen.",
    "v2": "There is a left pleural effusion.",
    "v3": "A nodule is seen on the left.",
}


def test_drafts_are_scored_with_their_controls(store: Path, tmp_path: Path) -> None:
    drafts = write(tmp_path / "drafts.csv", DRAFTS, "Cardiomegaly; Lung nodule")
    nearest = write(tmp_path / "nearest.csv", dict.fromkeys(DRAFTS, "Cardiomegaly is seen."))
    result = run_reports(drafts, store, tmp_path / "out", against=[nearest], bootstrap=20)
    assert list(result["results"]) == ["drafts", "most common report", "detector's findings", "nearest"]
    assert (result["volumes"], result["without_report"], result["most_common_is_of"]) == (3, 1, 2)
    ours = result["results"]["drafts"]
    # Stated: nodule v0 v2, effusion v0 v2, cardiomegaly v1. Drafted: nodule v0, effusion v0 v2, cardiomegaly v1, emphysema v0.
    assert ours["label_f1"]["Lung nodule"] == pytest.approx(2 / 3)
    assert ours["scores"]["macro_f1"]["value"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert ours["scores"]["micro_f1"]["value"] == pytest.approx(8 / (8 + 1 + 1))
    sides = ours["sides"]
    # The nodule is on the other side; emphysema is not in the reference; one of two sides is right.
    assert (sides["named"], sides["compared"], sides["wrong"]) == (4, 3, 1)
    assert sides["of_named"]["value"] == pytest.approx(1 / 4)
    assert result["results"]["most common report"]["scores"]["macro_f1"]["value"] == 0
    detected = result["results"]["detector's findings"]["scores"]["macro_f1"]["value"]
    assert detected == pytest.approx((0.8 + 0 + 0.5) / 3)
    difference = result["results"]["nearest"]["difference"]["macro_f1"]
    assert difference["value"] == pytest.approx((2 / 3 + 1 + 1) / 3 - 0.5 / 3)
    assert json.loads((tmp_path / "out" / "report_metrics.json").read_text())["kind"] == "ctclip report evaluation"
    assert "macro F1" in (tmp_path / "out" / "reports.html").read_text()


def test_as_a_command(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    drafts = write(tmp_path / "drafts.csv", {**DRAFTS, "v1": ""})
    given = [
        "evaluate",
        "--reports",
        str(drafts),
        "--store",
        str(store),
        "-o",
        str(tmp_path / "out"),
        "--bootstrap",
        "10",
    ]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "most common report" in printed
    assert "1 drafts are empty" in printed
    assert main(given) == 0, "the same evaluation may be repeated"
    write(tmp_path / "drafts.csv", DRAFTS)
    assert main(given) == 2, "that of other drafts is kept"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (dict.fromkeys(DRAFTS, ""), "every draft is empty"),
        ({"v9": "A nodule."}, "volume 'v9' is not in the store"),
        ({"v3": "A nodule."}, "none of the drafted volumes has a report"),
        (
            {"v5": "A nodule.", "v6": "A nodule.", "v4": "A", "v0": "A", "v1": "B", "v2": "C", "v3": "D"},
            "every patient",
        ),
        (None, "needs --store"),
    ],
)
def test_bad_input_is_one_line(
    texts: dict[str, str] | None, message: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    drafts = write(tmp_path / "drafts.csv", texts or DRAFTS)
    words = ["evaluate", "--reports", str(drafts), "-o", str(tmp_path / "out")]
    assert main(words if texts is None else [*words, "--store", str(store)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()
