"""A published model folder: its card, the files left out, and the behaviour without a network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import ctclip
from ctclip.cli import main
from ctclip.errors import CheckpointError, CtclipError, EvaluationError
from ctclip.evaluation.calibration import Calibration
from ctclip.inference.publish import check_licence, publish


@pytest.fixture
def evaluation(trained: Path, tmp_path: Path) -> Path:
    """``metrics.json`` as `ctclip evaluate` writes it, with figures that none of our models has."""
    figures: dict[str, Any] = {
        "model": ctclip.load(trained / "model").folder.hash, "volumes": 321, "patients": 123, "supervision": "reports only",
        "protocol": {"name": "a_protocol", "describes": "Held-out phantoms."},
        "zero_shot": {
            "mean_auroc": 0.8771, "mean_auroc_interval": [0.8, 0.9], "labels_defined": 1, "thresholds": "0.5; not calibrated",
            "auroc": {
                "Pleural effusion": {"value": 0.8771, "lower": 0.81, "upper": 0.93, "interval_trusted": True, "positives": 40, "n": 321},
                "Lung nodule": {"value": None, "lower": None, "upper": None, "interval_trusted": False, "positives": 0, "n": 321},
            },
        },
    }  # fmt: skip
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(figures))
    return folder


def test_the_card_says_what_a_reader_must_know(trained: Path, evaluation: Path, tmp_path: Path) -> None:
    output = tmp_path / "published"
    publish(trained / "model", output, licence="cc-by-nc-sa-4.0", evaluation=evaluation)
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert card.data.library_name == "ctclip"
    for fact in ("0.877", "0.800 to 0.900", "a_protocol", "321 volumes of 123 patients", "reports only", "phantoms",
                 "| Pleural effusion | 0.877 | 0.810 to 0.930 | 40 of 321 |", "undefined", "fewer than ten patients",
                 "not a medical device", "only on synthetic scans", "phantom (", "1000 HU"):  # fmt: skip
        assert fact in card.text, fact
    assert os.fspath(tmp_path) not in card.text
    assert ctclip.load(output).folder.hash == ctclip.load(trained / "model").folder.hash
    # Publish again to the same folder: a copy that ctclip wrote is replaced.
    publish(trained / "model", output, licence="other")
    assert "Not evaluated." in (output / "README.md").read_text()


def test_a_model_is_not_published_onto_itself(trained: Path, tmp_path: Path) -> None:
    """Otherwise the model would be uploaded with the digests of its patients."""
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for output in (tmp_path / "model", tmp_path / "link" / "model", tmp_path / "model" / "published"):
        with pytest.raises(CheckpointError, match="is the model folder itself"):
            publish(tmp_path / "model", output, licence="other")
    assert not (tmp_path / "model" / "README.md").exists()
    assert not (tmp_path / "model" / "published").exists()


def test_another_model_is_replaced_only_if_asked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained / "model", other)
    words = ["publish", str(trained / "model"), "--output", str(other), "--licence", "other"]
    assert main(words) == 2
    assert "holds a model; give another --output, or replace it with --force" in capsys.readouterr().err
    assert not (other / "README.md").exists()
    assert main([*words, "--force"]) == 0
    assert (other / "README.md").exists()


def test_a_damaged_head_is_not_published(trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    (model / "heads" / "linear").mkdir()
    (model / "heads" / "linear" / "head.yaml").write_text("kind: linear\nsupervision: labels\nnames: [x]\n")
    (model / "heads" / "linear" / "linear.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="heads/linear"):
        publish(model, tmp_path / "published", licence="other")
    assert not (tmp_path / "published").exists()


def test_patients_of_a_calibration_stay_at_home(trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    of = ctclip.load(model).folder.hash
    patients = ("0123456789abcdef",)
    Calibration("platt", "9 volumes", of, {}, patients=patients, salt="1").save(
        model / "heads" / "prompts" / "calibration.json"
    )
    publish(model, tmp_path / "published", licence="other")
    assert "0123456789abcdef" not in (tmp_path / "published" / "heads" / "prompts" / "calibration.json").read_text()


def test_figures_of_another_model_are_refused(trained: Path, evaluation: Path, tmp_path: Path) -> None:
    path = evaluation / "metrics.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["model"], "0" * 12))
    with pytest.raises(EvaluationError, match="evaluate this model"):
        publish(trained / "model", tmp_path / "published", licence="other", evaluation=evaluation)
    assert not (tmp_path / "published").exists()
    with pytest.raises(EvaluationError, match="ctclip evaluate"):
        publish(trained / "model", tmp_path / "published", licence="other", evaluation=tmp_path)


def test_figures_that_are_damaged_are_refused(trained: Path, evaluation: Path, tmp_path: Path) -> None:
    figures = json.loads((evaluation / "metrics.json").read_text())
    for change in ({"mean_auroc": [0.8]}, {"mean_auroc_interval": [1, 2, 3]}, {"auroc": {"Lung nodule": {}}}):
        damaged = figures | {"zero_shot": figures["zero_shot"] | change}
        (evaluation / "metrics.json").write_text(json.dumps(damaged))
        with pytest.raises(EvaluationError, match=r"metrics\.json: no evaluation could be read"):
            publish(trained / "model", tmp_path / "published", licence="other", evaluation=evaluation)


def test_without_a_network_the_folder_is_there_and_one_line_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not published") as caught:
        publish(trained / "model", tmp_path / "published", licence="other", repository="somebody/a-model")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "published" / "README.md").is_file()


def test_what_is_uploaded_is_the_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **given: calls.update(made=(name, given)) or "page")  # fmt: skip
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **given: calls.update(sent=given))
    assert publish(trained / "model", tmp_path / "published", licence="other", repository="somebody/a-model") == "page"
    assert calls["made"] == ("somebody/a-model", {"private": True, "exist_ok": True})
    assert calls["sent"]["folder_path"] == tmp_path / "published"
    assert 'ctclip.load("somebody/a-model")' in (tmp_path / "published" / "README.md").read_text()


def test_a_licence_is_an_identifier() -> None:
    check_licence("cc-by-nc-sa-4.0")
    for wrong in ("", "free for all", "mit\nlicense: x"):
        with pytest.raises(CtclipError, match="identifier"):
            check_licence(wrong)
