"""The synthetic cohort: drawn as described, reported as drawn, and reproducible from a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ctclip.errors import PhantomError
from ctclip.language import load_language
from ctclip.phantom import language, prevalence
from ctclip.phantom.canvas import Canvas, Grid, ball, tube
from ctclip.phantom.cohort import Options, _sidecar, make_cohort, plan
from ctclip.phantom.prevalence import CORRELATION, FINDINGS, PREVALENCE, draw_findings
from ctclip.phantom.scan import draw_case, make_scan
from ctclip.sentences import sentences


def test_partial_volume_keeps_the_amount() -> None:
    grid = Grid((40, 40, 40), (1.7, 1.3, 1.3), (-33.0, -26.0, -26.0))
    for shape, exact in (
        (ball((0.3, 0.2, 0.1), 12.0), 4 / 3 * np.pi * 12**3),
        (tube((-14, 0, 0), (14, 0, 0), 6.0), np.pi * 36 * 28 + 4 / 3 * np.pi * 216),
    ):
        canvas = Canvas(grid)
        canvas.draw([shape], 0.0)
        amount = float(((canvas.hu + 1000) / 1000).sum()) * np.prod(grid.spacing)
        assert abs(amount / exact - 1) < 0.03


def test_prevalence_and_co_occurrence_are_the_tables() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([[name in found for name in FINDINGS] for found in (draw_findings(random) for _ in range(6000))])
    for index, name in enumerate(FINDINGS):
        assert abs(drawn[:, index].mean() - PREVALENCE[name] / 100) < 0.025, name
    phi = np.corrcoef(drawn.T.astype(float))
    for (first, second), wanted in CORRELATION.items():
        assert abs(phi[FINDINGS.index(first), FINDINGS.index(second)] - wanted) < 0.09, (first, second)


def test_a_seed_draws_the_same_abnormalities_whatever_the_processor(monkeypatch) -> None:
    """LAPACK's eigenvectors have either sign and, for equal eigenvalues, any rotation; both differ between
    processors."""
    usual, random = np.linalg.eigh, np.random.default_rng(1)

    def elsewhere(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = usual(matrix)
        vectors = vectors * random.choice([-1, 1], len(values))
        equal = np.flatnonzero(np.abs(values - 1) < 1e-9)
        if len(equal) > 1:
            turn = np.linalg.qr(random.standard_normal((len(equal), len(equal))))[0]
            vectors[:, equal] = vectors[:, equal] @ turn
        return values, vectors

    here = prevalence._latent(0.15)[1]
    monkeypatch.setattr(np.linalg, "eigh", elsewhere)
    np.testing.assert_allclose(prevalence._latent.__wrapped__(0.15)[1], here, atol=1e-9)


def test_habitus_tells_no_abnormality() -> None:
    """They would if both were drawn from one stream: a classifier of body size would find lymph nodes."""
    cases = [draw_case(0, number, 0, 0.15)[:2] for number in range(3000)]
    habitus = np.array([[*dataclasses.astuple(patient)[1:]] for patient, _ in cases], dtype=float)
    women = np.array([patient.sex == "F" for patient, _ in cases], dtype=float)
    present = np.array([[name in found for name in FINDINGS] for _, found in cases], dtype=float)
    columns = np.column_stack([women, habitus])
    between = np.corrcoef(columns.T, present.T)[: columns.shape[1], columns.shape[1] :]
    # 234 correlations of standard error 0.018.
    assert np.abs(between).max() < 0.08
    assert between.std() == pytest.approx(1 / np.sqrt(len(cases)), rel=0.2)


def test_a_floor_raises_rare_ones_only() -> None:
    random = np.random.default_rng(0)
    drawn = np.array(
        [[name in found for name in FINDINGS] for found in (draw_findings(random, 0.2) for _ in range(3000))]
    )
    assert drawn.mean(axis=0).min() > 0.16
    assert abs(drawn[:, FINDINGS.index("Lung nodule")].mean() - 0.453) < 0.04


@pytest.mark.parametrize("finding", FINDINGS)
def test_each_finding_is_drawn_marked_and_named(finding: str) -> None:
    bit = np.uint32(1 << FINDINGS.index(finding))
    for patient in (1, 2):
        scan = make_scan(11, patient, scale=6.0, only=frozenset([finding]))
        made = scan.reconstructions[0]
        assert ((made.masks & bit) > 0).any()
        assert not (made.masks & ~bit).any()
        assert -1024 <= made.hu.min() < -900
        assert made.hu.max() <= 3071
        said = sentences(scan.report["Findings_EN"])
        positive = [s for s in said if _about(s, finding, 0)]
        assert positive
        assert not any(_about(s, finding, 2) for s in said)


def test_reports_agree_with_labels() -> None:
    for patient in range(40):
        scan = make_scan(3, patient, scale=10.0, rare_floor=0.2)
        for name, label in zip(FINDINGS, scan.labels, strict=True):
            said = sentences(scan.report["Findings_EN"])
            assert any(_about(s, name, 0) for s in said) == bool(label), name
            if label:
                assert not any(_about(s, name, 2) for s in said), name


def test_negations_are_worded_as_such() -> None:
    english = load_language("english")
    for positive, impression, negative in language.PHRASES.values():
        assert len(positive) >= 6
        assert len(impression) >= 4
        assert all(english.negates(text) for text in negative)


def test_where_a_finding_lies_is_how_it_looks() -> None:
    masked = lambda name, patient: _inside(make_scan(21, patient, scale=4.0, only=frozenset([name])), name)  # noqa: E731
    assert np.mean([np.median(masked("Pleural effusion", p)) for p in range(4)]) == pytest.approx(5, abs=40)
    assert np.mean([masked("Emphysema", p).mean() for p in range(4)]) < -890
    assert np.mean([np.quantile(masked("Coronary artery wall calcification", p), 0.9) for p in range(4)]) > 130
    assert np.mean([masked("Medical material", p).max() for p in range(4)]) > 1000


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(tmp_path) -> None:
    options = Options(volumes=6, seed=9, scale=12.0)
    digests = []
    for name, workers in (("one", 1), ("three", 3)):
        make_cohort(tmp_path / name, options, workers=workers)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        digests.append({str(p.relative_to(tmp_path / name)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert digests[0] == digests[1]
    # A cohort drawn before an option was added is continued with the option's default.
    path = tmp_path / "one" / "phantom.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "reconstructions"}))
    make_cohort(tmp_path / "one", options, workers=1)
    with pytest.raises(PhantomError, match="seed"):
        make_cohort(tmp_path / "one", Options(volumes=6, seed=10, scale=12.0), workers=1)
    for content in ("", "[]", "{}", '{"metadata": [1]}'):
        facts = _sidecar(tmp_path / "one", next(plan(options)))
        facts.write_text(content)
        with pytest.raises(PhantomError, match=f"{facts.name}: damaged; delete it"):
            make_cohort(tmp_path / "one", options, workers=1)


def test_it_lies_on_disk_as_ct_rate_does(cohort) -> None:
    dataset = cohort / "dataset"
    volumes = sorted(dataset.rglob("*.nii.gz"))
    assert len(volumes) == 24
    path = volumes[0]
    assert path.parent.name == path.name.rsplit("_", 1)[0]
    assert path.parent.parent.name == path.parent.name.rsplit("_", 1)[0]
    image = nib.load(path)
    assert image.get_data_dtype() == np.int16
    reports = pd.read_csv(dataset / "radiology_text_reports" / "train_reports.csv")
    assert list(reports.columns) == [
        "VolumeName",
        "ClinicalInformation_EN",
        "Technique_EN",
        "Findings_EN",
        "Impressions_EN",
    ]
    labels = pd.read_csv(dataset / "multi_abnormality_labels" / "train_predicted_labels.csv")
    assert list(labels.columns) == ["VolumeName", *FINDINGS]
    metadata = pd.read_csv(dataset / "metadata" / "train_metadata.csv").set_index("VolumeName")
    row = metadata.loc[path.name]
    assert json.loads(row["XYSpacing"]) == pytest.approx(image.header.get_zooms()[:2], rel=1e-4)
    assert (row["Columns"], row["Rows"], row["NumberofSlices"]) == image.shape
    splits = {name.split("_")[0] for name in (p.name for p in volumes)}
    assert splits == {"train", "valid"}


def test_reconstructions_share_a_report_and_patients_one_split() -> None:
    tasks = list(plan(Options(volumes=3000)))
    assert sum(task.reconstructions for task in tasks) == 3000
    assert {task.reconstructions for task in tasks} == {1, 2, 3}
    splits: dict[int, set[str]] = {}
    for task in tasks:
        splits.setdefault(task.patient_number, set()).add(task.split)
    assert all(len(found) == 1 for found in splits.values())


def test_one_reconstruction_a_scan_gives_as_many_scans_as_volumes() -> None:
    tasks = list(plan(Options(volumes=300, reconstructions=1)))
    assert len({(task.patient_number, task.scan_number) for task in tasks}) == 300
    assert {task.reconstructions for task in tasks} == {1}


def _inside(scan, name: str) -> np.ndarray:
    made = scan.reconstructions[0]
    return made.hu[(made.masks >> FINDINGS.index(name)) & 1 == 1].astype(float)


def _about(sentence: str, finding: str, kind: int) -> bool:
    """Whether a sentence is one of a finding's phrasings: 0 positive, 2 negative."""
    if kind == 0 and _about(sentence, finding, 2):
        return False  # "not" stands in the position of a severity
    patterns = [re.sub(r"\\{\w+\\}", ".+", re.escape(template)) for template in language.PHRASES[finding][kind]]
    return any(re.fullmatch(pattern, sentence, re.IGNORECASE) for pattern in patterns)
