"""Scans unlike the training scans: distances compared with SciPy and scikit-learn, the false-alarm rate, files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from ctclip.drift.facts import Source, fact_names, scan_facts
from ctclip.drift.summary import FILE, Described, Normal, TrainingSummary
from ctclip.errors import CheckpointError
from ctclip.phantom.scan import make_scan
from ctclip.preprocessing.geometry import resample
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import Volume

SPEC = PreprocessingSpec.load("phantom")
SIZES = {**{group: len(names) for group, names in fact_names().items()}, "embedding": 16}


def scans(count: int, seed: int, *, shift: float = 0.0, spacing: float = 4.0) -> list[Described]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        groups = {name: random.normal(0, 1, size) + shift * (name == "noise") for name, size in SIZES.items()}
        made.append(Described(groups, Source((spacing * random.uniform(0.8, 1.2), 1.0, 1.0), (70, 300, 300))))
    return made


@pytest.fixture(scope="module")
def summary() -> TrainingSummary:
    made = TrainingSummary.fit(scans(200, 0), scans(300, 1), model="weights")
    assert made is not None
    return made


def test_the_distance_is_mahalanobis_with_ledoit_and_wolfs_covariance() -> None:
    random = np.random.default_rng(0)
    vectors, one = random.normal(3, 2, (60, 8)) @ random.normal(0, 1, (8, 8)), random.normal(3, 5, 8)
    spread = vectors.std(axis=0)
    inverse = np.linalg.inv(LedoitWolf().fit(vectors / spread).covariance_)
    expected = mahalanobis(one / spread, vectors.mean(axis=0) / spread, inverse) / math.sqrt(8)
    assert Normal.fit(vectors).distance(one) == pytest.approx(expected, rel=1e-6)


def test_one_scan_in_a_hundred_of_the_same_kind_is_called_far(summary: TrainingSummary) -> None:
    far = sum(summary.judge(one).far for one in scans(3000, 2))
    # 3 of 301 held-out scans are above the limit; the share of new ones has a beta distribution around that.
    assert summary.rate == 0.01
    assert 0.001 < far / 3000 < 0.025


def test_folds_keep_the_rate_too() -> None:
    made = TrainingSummary.fit(scans(300, 0), [], model="weights")
    assert made is not None
    assert 0.001 < sum(made.judge(one).far for one in scans(2000, 2)) / 2000 < 0.025


def test_what_is_unlike_is_named(summary: TrainingSummary) -> None:
    verdict = summary.judge(scans(1, 3, shift=30.0)[0])
    assert verdict.far
    assert "noise" in verdict.reasons[0]
    verdict = summary.judge(scans(1, 3, spacing=9.0)[0])
    assert verdict.far
    assert verdict.reasons[0].startswith("slice spacing 8.98 mm")
    assert "training: 3.2 to 4.79" in verdict.warning()


def test_a_scan_whose_source_is_unknown_is_judged_by_the_rest(summary: TrainingSummary) -> None:
    one = Described(scans(1, 4)[0].groups, None)
    assert not summary.judge(one).far


def test_few_patients_give_no_summary_or_a_larger_rate() -> None:
    assert TrainingSummary.fit(scans(19, 0), [], model="weights") is None
    assert TrainingSummary.fit(scans(50, 0), scans(10, 1), model="weights") is None
    made = TrainingSummary.fit(scans(40, 0), [], model="weights")
    assert made is not None
    assert made.rate == 1 / 41


def test_a_summary_is_read_as_it_was_written(summary: TrainingSummary, tmp_path: Path) -> None:
    assert TrainingSummary.load(tmp_path) is None
    summary.save(tmp_path)
    read = TrainingSummary.load(tmp_path)
    assert read is not None
    for one in scans(5, 5, shift=4.0):
        assert read.judge(one).ratio == pytest.approx(summary.judge(one).ratio, rel=1e-4)
    assert (read.model, read.patients, read.held_out) == ("weights", 200, 300)


def test_a_damaged_summary_is_one_line(summary: TrainingSummary, tmp_path: Path) -> None:
    summary.save(tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="ctclip summarise"):
        TrainingSummary.load(tmp_path)


def test_numbers_of_a_summary_that_no_scan_can_be_compared_with(summary: TrainingSummary, tmp_path: Path) -> None:
    wrong = (
        {"scales": dict.fromkeys(summary.scales, 0.0)}, {"limit": 0.0}, {"source": np.ones((1, 2, 6))}, {"source": np.zeros((2, 6))},
    )  # fmt: skip
    for change in wrong:
        replace(summary, **change).save(tmp_path)
        with pytest.raises(CheckpointError, match="ctclip summarise"):
            TrainingSummary.load(tmp_path)


def test_a_flipped_bit_in_a_summary_is_noticed(summary: TrainingSummary, tmp_path: Path) -> None:
    summary.save(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: .*ctclip summarise"):
        TrainingSummary.load(tmp_path)


def test_notes_of_a_store_tell_the_source() -> None:
    notes = {"source_spacing": "3.00 x 2.95 x 2.95", "source_shape": "86 x 128 x 128"}
    source = Source.of_notes(notes)
    assert source == Source((3.0, 2.95, 2.95), (86, 128, 128))
    assert source.facts[3] == 258
    assert Source.of_notes({}) is None


def test_facts_of_a_phantom() -> None:
    made = make_scan(0, 1).reconstructions[0]
    spacing = made.acquisition.grid.spacing
    volume = Volume(made.hu, np.diag([*spacing, 1.0]), "phantom")
    voxels = resample(volume, SPEC, "voxels")
    facts = scan_facts(voxels, SPEC)
    assert {name: len(values) for name, values in facts.items()} == {k: len(v) for k, v in fact_names().items()}
    assert (facts["densities"] ** 2).sum() == pytest.approx(1)
    hu = resample(volume, SPEC, "hu")
    names = fact_names()["densities"]
    share = facts["densities"][names.index("share of voxels from 30 to 70 HU")] ** 2
    assert share == pytest.approx(((hu >= 30) & (hu < 70)).mean(), abs=0.005)
    layout = dict(zip(fact_names()["layout"], facts["layout"], strict=True))
    assert layout["lung in part 4 of 6 from right to left"] < layout["lung in part 2 of 6 from right to left"]
    blank = voxels.copy()
    blank[: len(blank) // 2] = -1
    halved = dict(zip(fact_names()["layout"], scan_facts(blank, SPEC)["layout"], strict=True))
    assert (
        halved["soft tissue in part 2 of 8 from feet to head"]
        == 0
        < layout["soft tissue in part 2 of 8 from feet to head"]
    )
    noisy = np.clip(voxels + np.random.default_rng(0).normal(0, 0.05, voxels.shape).astype(np.float32), -1, 1)
    assert (scan_facts(noisy, SPEC)["noise"] > facts["noise"] + 0.3).all()
