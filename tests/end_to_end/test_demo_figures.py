"""The figures of the default demo on held-out patients, read from the output of `make demo` (or from the folder in
CTCLIP_DEMO)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ctclip.phantom.prevalence import FINDINGS

DEMO = Path(os.environ.get("CTCLIP_DEMO", Path(__file__).parents[2] / "runs" / "demo"))


@pytest.fixture(scope="module")
def metrics() -> dict:
    path = DEMO / "metrics.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: `make demo` makes it, in half an hour on 2 cores")
    return json.loads(path.read_text())


def test_it_learned_from_reports_alone_what_histograms_do_not_tell(metrics: dict) -> None:
    zero, controls = metrics["zero_shot"], metrics["controls"]
    card = (DEMO / "train" / "model" / "model_card.md").read_text()
    assert "supervision: reports only" in card
    assert zero["mean_auroc"] >= 0.75
    low, _ = zero["mean_auroc_interval"]
    assert low > controls["histogram_mean_auroc"] + 0.02, "a classifier of HU histograms, which does read labels"
    assert abs(controls["shuffled_mean_auroc"] - 0.5) < 0.05


def test_its_figures_are_whole(metrics: dict) -> None:
    assert set(metrics["zero_shot"]["auroc"]) == set(FINDINGS)
    for entry in metrics["zero_shot"]["auroc"].values():
        assert entry["lower"] <= entry["value"] <= entry["upper"]
        assert entry["positives"] > 0
    assert {"recall@1", "recall@5", "recall@10", "pool"} <= set(metrics["retrieval"]["report_to_volume"])
    assert metrics["seconds"]["total"] == pytest.approx(sum(v for k, v in metrics["seconds"].items() if k != "total"))
    assert {"torch", "deepspeed", "transformers", "monai"} <= set(metrics["versions"])
    for name in ("report.html", "predictions.csv"):
        assert (DEMO / name).stat().st_size > 1000
