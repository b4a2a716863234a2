"""The model in a notebook: its inputs, its heads, and the files it writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import ctclip
from ctclip.errors import CheckpointError, EvaluationError, ExplanationError, PromptError
from ctclip.evaluation.calibration import Calibration, Line
from ctclip.heads.folder import save_head, write_prompt_head
from ctclip.heads.linear import LinearHead
from ctclip.inference.model import Model
from ctclip.inference.run import detect, report_embeddings
from ctclip.inference.scans import ScanFiles, StoredScans
from ctclip.labels import labels_of_columns
from ctclip.models.folder import TrainedOn, load_model, save_model
from ctclip.preprocessing.anatomy import NOT_A_CHEST
from ctclip.preprocessing.cohorts import COLUMNS
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.hounsfield import ALREADY_HU
from ctclip.preprocessing.outcomes import Outcome
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts

from .preprocessing.dicom_builder import series, truth, write
from .small import dual_encoder

LABELS = labels_of_columns("two", ["Emphysema", "Mass"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "NA.nii.gz"
    voxels = np.random.default_rng(0).integers(-1000, 300, (12, 12, 12)).astype(np.int16)
    voxels[:2] = -1024
    nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])), path)
    return path


def written(folder: Path, linear: bool = False, seed: int = 0) -> Path:
    model = dual_encoder(seed=seed).eval()

    def heads(partial: Path) -> None:
        write_prompt_head(partial, load_prompts("report_style"), LABELS.names)
        if linear:
            save_head(partial, "linear", LinearHead(model, LABELS.names, torch.ones(2, 12), torch.zeros(2)))

    return save_model(folder, model, LABELS, write_more=heads)


def test_a_model_says_what_it_is(folder: Path) -> None:
    model = ctclip.load(folder)
    shown = repr(model)
    encoders = (model.dual.volume_encoder, model.dual.text_encoder)
    sizes = [sum(p.numel() for p in encoder.parameters()) / 1e6 for encoder in encoders]
    assert f"{model.dual.config.volume.kind}, {sizes[0]:.1f} M parameters; text, {sizes[1]:.1f} M" in shown
    for part in (
        model.folder.hash,
        str(folder),
        model.spec.name,
        "two (2)",
        "prompts",
        model.folder.trained_on.words(),
    ):
        assert part in shown, part


@pytest.mark.parametrize("names", [[], "", " ", ["Mass", ""], ["Mass", None], 5, b"Mass", "Mass\x1b[31m", [["Mass"]]])
def test_names_that_are_none_are_refused(folder: Path, scan: Path, names: Any) -> None:
    with pytest.raises(PromptError, match="expected a finding in words"):
        ctclip.load(folder).detect(scan, names)


def test_an_absence_is_not_scored_as_a_finding(folder: Path, scan: Path) -> None:
    with pytest.raises(PromptError, match="'no emphysema': states an absence; name the finding"):
        ctclip.load(folder).detect(scan, "no emphysema")


@pytest.mark.parametrize("text", ["左肾囊肿", "كيس في الكلية", "a" * 500])
def test_words_that_the_model_cannot_read_are_not_scored(folder: Path, scan: Path, text: str) -> None:
    with pytest.raises(PromptError, match="knows none of these words"):
        ctclip.load(folder).detect(scan, text)


def test_a_prepared_scan_is_detected_and_embedded_as_the_scan_is(folder: Path, scan: Path) -> None:
    model = ctclip.load(folder)
    ready = model.prepare(scan)
    assert model.detect(ready) == model.detect(scan)
    np.testing.assert_array_equal(model.embed(ready), model.embed(scan))
    with pytest.raises(ValueError, match="read already"):
        model.detect(ready, expect="chest")


def test_volumes_of_any_number_type_are_encoded_as_float32(folder: Path, scan: Path) -> None:
    model = ctclip.load(folder)
    voxels = model.prepare(scan).voxels
    expected = model.encode_volume(voxels)
    assert torch.equal(model.encode_volume(voxels.astype(np.float64)), expected)
    assert torch.equal(model.encode_volume(torch.from_numpy(voxels).double()), expected)
    assert model.encode_volume(np.ones((8, 8, 8), np.int16)).dtype == torch.float32
    for other in ([model.prepare(scan)], str(scan), None):
        with pytest.raises(ValueError, match=r"expected a tensor, an array, or what model\.prepare returns"):
            model.encode_volume(other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "texts",
    [
        [], "", ["a nodule", " "], ["a nodule", None], pd.Series(["a nodule", np.nan]), 5, b"a nodule",
        {"a nodule", "a mass"}, {"a nodule": 1}, pd.DataFrame({"report": ["a nodule"]}),
    ],
)  # fmt: skip
def test_texts_that_are_none_are_refused(folder: Path, texts: Any) -> None:
    with pytest.raises(ValueError, match="expected texts, found"):
        ctclip.load(folder).encode_text(texts)


def test_a_model_loaded_by_a_relative_path_keeps_its_heads_in_another_folder(
    folder: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path / "there" / "model")
    line = Line(2.0, 1.0, 0.5, 9, 20)
    calibration = Calibration("platt", "x", load_model(model).hash, {name: line for name in LABELS.names})
    calibration.save(model / "heads" / "prompts" / "calibration.json")
    monkeypatch.chdir(tmp_path / "there")
    loaded = ctclip.load("model")
    monkeypatch.chdir(tmp_path)
    assert [head.name for head in loaded.heads] == ["prompts"]
    assert loaded.detect(scan).calibrated == "calibrated"
    loaded.save_pretrained("copy")
    assert ctclip.load("copy").detect(scan).probabilities == loaded.detect(scan).probabilities


def test_a_copy_replaces_a_copy_and_never_a_file_of_anybody(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first", linear=True, seed=1), written(tmp_path / "second", seed=2)
    ctclip.load(first).save_pretrained(tmp_path / "copy")
    ctclip.load(second).save_pretrained(tmp_path / "copy")
    copy = ctclip.load(tmp_path / "copy")
    assert copy.folder.hash == load_model(second).hash
    assert [head.name for head in copy.heads] == ["prompts"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text("mine")
    with pytest.raises(PreprocessingError, match="is not empty"):
        copy.save_pretrained(tmp_path / "home")
    assert (tmp_path / "home" / "config.json").read_text() == "mine"


def test_a_revision_that_would_be_ignored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="--revision v2"):
        Model._from_pretrained(model_id="someone/model", revision="v2")


def test_a_head_is_a_name_and_no_path(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no head"):
        ctclip.load(folder).head("../heads/prompts")


@pytest.mark.parametrize("name", ["volume", "model", "margin:x"])
def test_a_finding_is_not_called_like_a_column_of_the_table(
    folder: Path, scan: Path, tmp_path: Path, name: str
) -> None:
    loaded = load_model(folder)
    head = LinearHead(loaded.model, [name], torch.ones(1, 12), torch.zeros(1))
    with pytest.raises(EvaluationError, match="cannot name a finding"):
        detect(loaded, head, ScanFiles([scan], loaded.spec), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scan_called_na_keeps_its_name(folder: Path, scan: Path, tmp_path: Path) -> None:
    loaded = load_model(folder)
    summary = detect(loaded, ctclip.load(folder).head(), ScanFiles([scan], loaded.spec), tmp_path / "out")
    assert summary.table()["volume"].tolist() == ["NA"]


def test_a_scan_that_shows_no_chest_is_told_unless_the_model_is_of_another_part(folder: Path, scan: Path) -> None:
    model = ctclip.load(folder)
    assert any(NOT_A_CHEST in warning for warning in model.detect(scan).warnings)
    model.folder.trained_on = TrainedOn(body_part="abdomen")
    assert not any(NOT_A_CHEST in warning for warning in model.detect(scan).warnings)
    with pytest.raises(PreprocessingError, match=NOT_A_CHEST):
        model.detect(scan, expect="chest")


def test_what_the_model_learned_from_is_told_with_every_detection(folder: Path, scan: Path) -> None:
    model = ctclip.load(folder)
    model.folder.trained_on = TrainedOn(
        volumes=24128, synthetic=False, body_part="chest", spacing=(1.5, 0.75, 0.75), cohort="CT-RATE"
    )
    words = "24,128 scans of patients, chest, 1.5 x 0.75 x 0.75 mm, cohort CT-RATE"
    found = model.detect(scan)
    assert words in str(found)
    assert words in found._repr_html_()
    assert TrainedOn().words() == "scans, body part not stated"


def test_predictions_of_a_store_tell_what_its_scans_were_warned_of(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(folder)
    store = VolumeStore.create(tmp_path / "store", loaded.spec)
    told = Outcome("v", None, (ALREADY_HU, "slices 8.0 mm apart"))
    store.write("v", np.zeros(loaded.spec.shape, np.int16), told.row())
    store.write("w", np.zeros(loaded.spec.shape, np.int16))
    cohort = pd.DataFrame({name: ["v", "w"] for name in COLUMNS}).assign(split="valid")
    cohort.to_parquet(store.path / "cohort.parquet")
    scans = StoredScans(store, None, loaded.spec, folder)
    summary = detect(loaded, ctclip.load(folder).head(), scans, tmp_path / "out")
    assert summary.table()["warnings"].tolist() == ["slices 8.0 mm apart", ""]


def test_a_detection_does_not_repeat_the_name_of_the_patient(folder: Path, tmp_path: Path) -> None:
    """A folder as an archive exports it, named after its patient."""
    export = write(
        tmp_path / "Zebrowski_Ottilie chest", series(truth(), PatientName="Zebrowski^Ottilie", PatientID="P-1")
    )
    assert ctclip.load(folder).detect(export).scan == "*** chest"


def test_names_are_found_in_any_case_and_spacing_and_shape(folder: Path, scan: Path) -> None:
    model = ctclip.load(bytes(folder))
    ready = model.prepare(bytes(scan))
    expected = model.detect(ready, ["Mass"]).probabilities
    for names in ("mass", " MASS ", "Mass\n", ("mass", "Mass"), {"mass"}, pd.Series(["Mass"]), pd.Index(["mass"]), np.array(["Mass"]), (n for n in ["Mass"])):  # fmt: skip
        assert model.detect(ready, names).probabilities == expected, names
    detection, explanation = model.detect(ready), model.explain(ready, ["mass"])
    assert detection.above("  mass") == detection.above("Mass")
    assert explanation["MASS"] is explanation["Mass"]
    for asked in ("Nodule", 0, None):
        with pytest.raises(KeyError, match=r"not one of .*Mass"):
            detection.above(asked)  # type: ignore[arg-type]
        with pytest.raises(KeyError, match="not one of Mass"):
            explanation[asked]  # type: ignore[index]


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"expect": "Chest"}, "give one of auto, chest, any"), ({"expect": True}, "give one of"), ({"hu": None}, "hu=None: give one of"),
        ({"geometry": ["auto"]}, "give one of"), ({"largest_gb": "4"}, "positive number"), ({"largest_gb": -1}, "positive number"),
        ({"largest_gb": float("nan")}, "positive number"), ({"series": 5}, "SeriesInstanceUID"),
    ],
)  # fmt: skip
def test_an_option_of_reading_that_is_none_is_refused_and_not_taken_for_the_default(
    folder: Path, scan: Path, reading: dict[str, Any], message: str
) -> None:
    with pytest.raises(PreprocessingError, match=message):
        ctclip.load(folder).detect(scan, **reading)


@pytest.mark.parametrize("path", [None, "", 0, ["a.nii.gz"], (p for p in ["a.nii.gz"]), np.zeros((4, 4, 4)), pd.Series(["a.nii.gz"])])  # fmt: skip
def test_what_is_no_path_is_said_and_nothing_else_is_read(
    folder: Path, path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, series(truth()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PreprocessingError, match="expected the path of one scan, found"):
        ctclip.load(folder).detect(path)


def test_numbers_that_cannot_be_meant_are_refused(folder: Path, scan: Path) -> None:
    model = ctclip.load(folder)
    ready = model.prepare(scan)
    for level in ("0.5", 2, 0, float("nan"), True):
        with pytest.raises(ExplanationError, match="level="):
            model.explain(ready, "Mass", level=level)  # type: ignore[arg-type]
    for budget in (0, "600", None, 2.5):
        with pytest.raises(ExplanationError, match="budget="):
            model.explain(ready, "Mass", budget=budget)  # type: ignore[arg-type]
    for most in (0, -1, "5", None):
        with pytest.raises(ExplanationError, match="most="):
            model.find(ready, "a mass", most=most)  # type: ignore[arg-type]
    for text in ("", " ", None, ["a mass"], b"a mass"):
        with pytest.raises(ExplanationError, match="expected a text"):
            model.find(ready, text)  # type: ignore[arg-type]
    for head in (None, 5, "Prompts", ["prompts"]):
        with pytest.raises(CheckpointError, match="head"):
            model.detect(ready, head=head)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="device 'gpu' cannot be used"):
        ctclip.load(folder, "gpu")


def test_arrays_of_any_layout_are_encoded_and_what_is_no_volume_is_refused(folder: Path, scan: Path) -> None:
    model = ctclip.load(folder)
    voxels = model.prepare(scan).voxels
    expected = model.encode_volume(voxels)
    assert torch.equal(model.encode_volume(voxels.astype(">f4")), expected)
    assert torch.equal(model.encode_volume(voxels[::-1].copy()[::-1]), expected)
    wrong = [
        voxels > 0, torch.from_numpy(voxels > 0), voxels.astype(complex), np.ma.masked_array(voxels, voxels > 0), voxels.astype(object),
        np.full(voxels.shape, np.nan, np.float32), np.zeros((0, 1, *voxels.shape), np.float32),
    ]  # fmt: skip
    for volume in wrong:
        with pytest.raises(ValueError):
            model.encode_volume(volume)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model.encode_text(input_ids=ids).shape == model.encode_text(input_ids=ids, attention_mask=ids).shape
    for given in ([[1, 2]], ids[0], ids * 10**6, -ids, ids.float()):
        with pytest.raises(ValueError, match="input_ids"):
            model.encode_text(input_ids=given)
    with pytest.raises(ValueError, match="attention_mask"):
        model.encode_text(input_ids=ids, attention_mask=ids[:, 1:])


def test_reports_share_a_batch_in_their_order() -> None:
    """Not in that of a set, which differs between processes: the sums of a batch would too, in their last digits."""
    texts = [f"Report {number:02d}." for number in range(99, 0, -1)]
    seen: list[str] = []

    def encode_text(part: list[str]) -> torch.Tensor:
        seen.extend(part)
        return torch.zeros(len(part), 2)

    model = SimpleNamespace(config=SimpleNamespace(dim=2), encode_text=encode_text)
    assert report_embeddings(model, [*texts, "", "Long report.", *texts]).shape == (200, 2)  # type: ignore[arg-type]
    assert seen == [*texts, "Long report."]
