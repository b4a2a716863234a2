"""Inference as a user types it: detection that resumes, embeddings, an index, prompts, calibration, a page that compares two
runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ctclip
from ctclip.cli import main
from ctclip.errors import DataError, PromptError
from ctclip.evaluation.tables import read_embeddings
from ctclip.heads.folder import load_head
from ctclip.heads.head import Head
from ctclip.heads.prompts import PromptHead
from ctclip.inference.run import detect
from ctclip.inference.scans import ScanFiles, StoredScans
from ctclip.models.folder import ModelFolder, load_model
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts

from .conftest import run


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model, because a calibration is stored in it."""
    return Path(shutil.copytree(trained / "model", tmp_path_factory.mktemp("calibrated") / "model"))


def typed(*arguments: object) -> int:
    """Exit code of a command, run in this process."""
    return main([str(argument) for argument in arguments])


def loaded_head(loaded: ModelFolder) -> Head:
    return load_head(loaded.path, "prompts", loaded.model)


def scans_of(cohort: Path, count: int) -> list[Path]:
    return sorted((cohort / "dataset").rglob("*.nii.gz"))[:count]


def test_detection_goes_on_where_it_was_interrupted(model: Path, store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ctclip.inference.run.PART_BATCHES", 1)
    loaded = load_model(model)
    head = loaded_head(loaded)
    scans = StoredScans(VolumeStore(store), None, loaded.spec, model)
    whole = detect(loaded, head, scans, tmp_path / "whole", batch=4).table()
    asked: list[int] = []
    honest = StoredScans.voxels

    def interrupted(self: StoredScans, index: int):
        asked.append(index)
        if len(asked) == 14:
            raise KeyboardInterrupt
        return honest(self, index)

    monkeypatch.setattr(StoredScans, "voxels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect(loaded, head, scans, tmp_path / "again", batch=4)
    assert not (tmp_path / "again" / "predictions.csv").exists()
    before = len(asked)
    found = detect(loaded, head, scans, tmp_path / "again", batch=4)
    assert len(asked) - before < len(scans.table)
    pd.testing.assert_frame_equal(found.table(), whole)
    assert not (tmp_path / "again" / "parts").exists()


def test_what_an_interrupted_run_left_is_not_taken_for_other_scans(
    model: Path, cohort: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("ctclip.inference.run.PART_BATCHES", 1)
    first, second, third = scans_of(cohort, 3)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, contents in zip(folders, ((first, second), (third, second)), strict=True):
        folder.mkdir()
        for name, path in zip(("x.nii.gz", "y.nii.gz"), contents, strict=True):
            (folder / name).write_bytes(path.read_bytes())
    loaded = load_model(model)
    head = loaded_head(loaded)
    honest = ScanFiles.voxels

    def interrupted(self: ScanFiles, index: int):
        if index == 1:
            raise KeyboardInterrupt
        return honest(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(ScanFiles, "voxels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detect(loaded, head, ScanFiles([folders[0]], loaded.spec), tmp_path / "out", batch=1)
    assert list((tmp_path / "out" / "parts").rglob("*.parquet")), "the first of them was done"
    found = detect(loaded, head, ScanFiles([folders[1]], loaded.spec), tmp_path / "out", batch=1).table()
    alone = detect(loaded, head, ScanFiles([third], loaded.spec), tmp_path / "alone").table()
    assert list(found["volume"]) == ["x", "y"]
    assert found["Emphysema"][0] == pytest.approx(alone["Emphysema"][0], abs=1e-6)


def test_memory_does_not_grow_with_the_number_of_scans(model: Path, tmp_path: Path) -> None:
    class Many:
        def __init__(self, count: int) -> None:
            names = [f"v{index:04d}" for index in range(count)]
            self.table = pd.DataFrame({"volume": names, "patient": names, "scan": names})

        def origin(self) -> str:
            return ""

        def voxels(self, index: int) -> tuple[np.ndarray, str]:
            return np.full((64, 80, 112), index % 7 / 7, dtype=np.float32), ""

    def resident() -> float:
        return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024

    loaded = load_model(model)
    head = loaded_head(loaded)
    # Enough that all volumes that are read ahead have been in memory once.
    detect(loaded, head, Many(64), tmp_path / "few")
    before = resident()
    found = detect(loaded, head, Many(224), tmp_path / "many")
    assert found.volumes == 224
    # The voxels of the 160 further volumes are 367 MB.
    assert resident() - before < 120


@pytest.mark.integration
def test_two_processes_find_what_one_finds(model: Path, store: Path, tmp_path: Path) -> None:
    arguments = ("zero-shot", "--model", model, "--store", store, "--embed-reports", "--output")
    assert typed(*arguments, tmp_path / "1") == 0
    done = run(*arguments, tmp_path / "2", "--processes", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        pd.read_csv(tmp_path / str(count) / "predictions.csv").set_index("volume").sort_index() for count in (1, 2)
    )
    order = list(pd.read_csv(tmp_path / "2" / "predictions.csv")["volume"])
    assert order == sorted(order), "the shares of two processes are joined in the order of the scans"
    assert list(one.index) == list(two.index)
    assert np.allclose(one["Emphysema"], two["Emphysema"], atol=1e-5)
    vectors = read_embeddings(tmp_path / "2" / "embeddings.parquet")
    assert set(vectors) == {"volume", "volume_embedding", "report_embedding"}


def test_several_scans_a_pattern_and_a_refused_one(model: Path, cohort: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in scans_of(cohort, 3):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "zz_broken.nii.gz").write_bytes(b"not a scan")
    code = typed(
        "zero-shot", "--model", model, f"{folder}/*.nii.gz", "--format", "parquet", "--output", tmp_path / "out"
    )
    assert code == 3
    said = capsys.readouterr().out
    assert "zz_broken.nii.gz" in said
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert len(table) == 3
    for column in ("model", "spec", "prompts"):
        assert table[column].nunique() == 1
    assert set(table["supervision"]) == {"reports only"}
    with pytest.raises(DataError, match="no file matches"):
        ScanFiles([tmp_path / "nothing*.nii"], load_model(model).spec)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either scans or --store"),
        (["x.nii.gz", "--split", "valid"], "--split needs --store"),
        (["x.nii.gz"], "x.nii.gz"),
        (["x*.nii.gz"], "no file matches this pattern"),
        (["x.nii.gz", "--prompts", "nothing"], "report_style"),
    ],
)
def test_what_cannot_be_detected_is_said_in_one_line(model: Path, tmp_path: Path, capsys, monkeypatch, arguments, said) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert typed("zero-shot", "--model", model, *arguments, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_a_dicom_folder_and_a_folder_of_them(model: Path, shared: Path, tmp_path: Path, capsys) -> None:
    series = ["lungdx_A0002_siemens_B40f_8mm_30", "ts_abd_contrast_siemens_20"]
    one = typed("zero-shot", "--model", model, shared / "ct" / "dicom" / series[0], "--output", tmp_path / "one")
    assert one == 0
    for name in series:
        (tmp_path / "study" / name).mkdir(parents=True)
        for path in (shared / "ct" / "dicom" / name).iterdir():
            (tmp_path / "study" / name / path.name).symlink_to(path)
    assert typed("zero-shot", "--model", model, tmp_path / "study", "--output", tmp_path / "two") == 0
    assert list(pd.read_csv(tmp_path / "two" / "predictions.csv")["volume"]) == series
    capsys.readouterr()
    assert typed("zero-shot", "--model", model, shared / "ct" / "dicom" / series[0], "--expect", "chest", "--hu", "trust-file", "--output", tmp_path / "one", "--force") == 0  # fmt: skip


def test_a_notebook_gets_a_result_that_shows_itself(model: Path, cohort: Path) -> None:
    loaded = ctclip.load(str(model))
    scan = scans_of(cohort, 1)[0]
    found = loaded.detect(scan)
    assert len(found.probabilities) == 18
    assert found.ranked()[0][1] == max(found.probabilities.values())
    assert "Cardiomegaly" in str(found)
    assert "<table>" in found._repr_html_()
    assert list(found.frame().columns) == ["probability", "lower", "upper", "margin", "threshold"]
    assert "not calibrated" in str(found)
    assert list(loaded.detect(scan, ["pneumothorax"]).probabilities) == ["pneumothorax"]
    vector = loaded.encode_text(["No pleural effusion."])
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)


def test_graded_prompts_give_a_size(model: Path, cohort: Path, tmp_path: Path, capsys) -> None:
    prompts = tmp_path / "graded.yaml"
    prompts.write_text(
        "name: graded\nabnormalities:\n  Lung nodule:\n    positive: {findings: [There is a nodule.]}\n"
        "    negative: {findings: [No nodule is seen.]}\n"
        "graded:\n  Nodule diameter:\n    templates: ['A {value} mm lung nodule is present.']\n    values: [4, 8, 16, 30]\n"
    )
    assert (
        typed("zero-shot", "--model", model, scans_of(cohort, 1)[0], "--prompts", prompts, "--output", tmp_path / "out")
        == 0
    )
    assert "Nodule diameter [mm], if present" in capsys.readouterr().out
    value = pd.read_csv(tmp_path / "out" / "predictions.csv")["value:Nodule diameter [mm]"][0]
    assert 4 <= value <= 30
    prompts.write_text(prompts.read_text().replace("{value} mm lung", "lung"))
    with pytest.raises(PromptError, match=r"has no \{value\}"):
        load_prompts(prompts)
    prompts.write_text(
        "name: x\ntemplates:\n  positive: {findings: [It is there.]}\n  negative: {findings: ['No {x}.']}\n"
    )
    with pytest.raises(PromptError, match=r"has no \{x\}"):
        load_prompts(prompts)
    (tmp_path / "blank.yaml").write_text("")
    with pytest.raises(PromptError, match=r"blank\.yaml: the prompt set is empty"):
        load_prompts(tmp_path / "blank.yaml")
    (tmp_path / "empty.yaml").write_text("name: nothing\n")
    with pytest.raises(PromptError, match="prompt set is empty"):
        load_prompts(tmp_path / "empty.yaml")


def test_sections_weigh_alike_where_the_prompt_set_says_so(model: Path) -> None:
    loaded = load_model(model).model
    pair = {
        "positive": {
            "findings": ["Emphysema is seen.", "There is emphysema.", "Both lungs."],
            "impression": ["Emphysema."],
        },
        "negative": {"findings": ["No emphysema."]},
    }
    base = {"name": "x", "ensemble": "logits", "abnormalities": {"Emphysema": pair}}
    vectors = loaded.encode_text([*pair["positive"]["findings"], *pair["positive"]["impression"]])
    by_phrasing = PromptHead(loaded, load_prompts(base)).positive[0]
    by_section = PromptHead(loaded, load_prompts({**base, "average": "section"})).positive[0]
    assert np.allclose(by_phrasing, vectors.mean(dim=0).detach(), atol=1e-6)
    assert np.allclose(by_section, (vectors[:3].mean(dim=0) + vectors[3]).detach() / 2, atol=1e-6)


def test_embed_index_and_similar(model: Path, store: Path, cohort: Path, tmp_path: Path, capsys) -> None:
    assert typed("embed", "--model", model, "--store", store, "--output", tmp_path / "v.parquet") == 0
    assert typed("embed", "--model", model, "--store", store, "--output", tmp_path / "v.npy") == 0
    vectors = read_embeddings(tmp_path / "v.parquet")
    assert np.array_equal(vectors["volume_embedding"], np.load(tmp_path / "v.npy"))
    assert np.allclose(np.linalg.norm(vectors["volume_embedding"], axis=1), 1, atol=1e-5)
    reports = next((cohort / "dataset").rglob("*reports*.csv"))
    assert typed("embed", "--model", model, "--reports", reports, "--output", tmp_path / "r.parquet") == 0
    assert len(read_embeddings(tmp_path / "r.parquet")["report_embedding"]) == len(pd.read_csv(reports))
    assert typed("index", "--model", model, "--store", store, "--output", tmp_path / "index") == 0
    capsys.readouterr()
    scan = scans_of(cohort, 1)[0]
    # The index states which model made it.
    assert typed("similar", scan, "--index", tmp_path / "index", "-k", 3, "-o", tmp_path / "s.csv") == 0
    hits = pd.read_csv(tmp_path / "s.csv")
    nearest = hits[hits["nearest"] == "scan"]
    assert nearest["volume"].iloc[0].rsplit("_", 1)[0] == scan.name.removesuffix(".nii.gz").rsplit("_", 1)[0]
    assert nearest["scan"].is_unique
    facts = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**facts, "path": "/nowhere"}))
    assert typed("similar", "--text", "Effusion.", "--index", tmp_path / "index") == 2
    assert "give its folder with --model" in capsys.readouterr().err
    (tmp_path / "index" / "index.json").write_text(json.dumps({**facts, "model": "other"}))
    assert typed("similar", "--text", "Effusion.", "--model", model, "--index", tmp_path / "index") == 2
    assert "run `ctclip index` again" in capsys.readouterr().err


def test_lint_warns_of_sides_that_coincide(model: Path, tmp_path: Path, capsys) -> None:
    prompts = tmp_path / "same.yaml"
    prompts.write_text(
        "name: same\nabnormalities:\n  Emphysema:\n    positive: {findings: [Emphysema.]}\n    negative: {findings: [Emphysema.]}\n"
    )
    assert typed("prompts", "lint", prompts, "--model", model) == 3
    assert "hardly distinguishes" in capsys.readouterr().out
    assert typed("prompts", "list") == 0
    assert "report_style" in capsys.readouterr().out


def test_calibration_is_kept_with_the_model_and_used(
    model: Path, store: Path, cohort: Path, tmp_path: Path, capsys
) -> None:
    loaded = load_model(model)
    assert typed("zero-shot", "--model", model, "--store", store, "--output", tmp_path / "before") == 0
    # Labels that correlate with the margins, so that calibration reverses no finding.
    table = pd.read_csv(tmp_path / "before" / "predictions.csv")
    names = list(load_prompts("report_style").names())
    noisy = table[[f"margin:{name}" for name in names]].rank() + np.random.default_rng(0).normal(0, 6, (len(table), 18))
    labels = (noisy > noisy.median()).astype(int).set_axis(names, axis=1)
    labels.insert(0, "volume", table["volume"])
    labels.to_csv(tmp_path / "labels.csv", index=False)
    kept = model / "heads" / "prompts" / "calibration.json"
    try:
        code = typed(
            "calibrate", tmp_path / "before" / "predictions.csv", "--model", model, "--labels", tmp_path / "labels.csv"
        )
        assert code == 0
        assert typed("zero-shot", "--model", model, "--store", store, "--output", tmp_path / "after") == 0
        capsys.readouterr()
        shown = ctclip.load(str(model)).detect(scans_of(cohort, 1)[0])
        assert "(calibrated" in str(shown)
        assert shown.thresholds["Emphysema"] == pytest.approx(shown.frame().at["Emphysema", "threshold"])
        other = typed("zero-shot", "--model", model, "--store", store, "--prompts", "published", "--output", tmp_path / "other")  # fmt: skip
        assert other == 0
        assert "was fitted to report_style" in capsys.readouterr().err
        fitted = json.loads(kept.read_text())
    finally:
        kept.unlink(missing_ok=True)
    assert fitted["model"] == loaded.hash
    before, after = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("before", "after"))
    line = fitted["lines"]["Emphysema"]
    expected = 1 / (1 + np.exp(-(before["margin:Emphysema"] * line["slope"] + line["intercept"])))
    assert np.allclose(after["Emphysema"], expected, atol=1e-6)
    evaluated = tmp_path / "evaluation"
    arguments = ("--labels", tmp_path / "labels.csv", "--protocol", "phantom", "--bootstrap", 10)
    assert typed("evaluate", tmp_path / "after" / "predictions.csv", *arguments, "--output", evaluated) == 0
    code = typed("evaluate", tmp_path / "after" / "predictions.csv", "--against", tmp_path / "before" / "predictions.csv", *arguments, "--output", evaluated)  # fmt: skip
    assert code == 0
    assert "against" in capsys.readouterr().out
    assert typed("report", evaluated, evaluated, "--output", tmp_path / "two.html") == 0
