"""Recipes that train: frozen layers, the labels used, and the record of patients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from ctclip.adaptation.protocol import Setting
from ctclip.adaptation.recipes import DRAW, Recipe, configured, merge_adapters, run_recipe
from ctclip.config_files import configs_folder
from ctclip.errors import CtclipError, DataError
from ctclip.evaluation.adapted import FILE, Adaptation
from ctclip.heads.folder import list_heads, write_prompt_head
from ctclip.labels import labels_of_columns
from ctclip.models.folder import load_model, save_model
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.prompts import load_prompts
from tests.unit.adaptation.conftest import NAMES, Clinic
from tests.unit.small import VIT, dual_encoder, spec_of

METHODS = ("vocabfine", "classfine", "lora", "last-layers", "full")
QUICK = ("training.epochs=1", "training.batch=14", "data.workers=0", "training.log_every=1")


@pytest.fixture
def deep(clinic: Clinic, tmp_path: Path) -> Clinic:
    """The clinic with a model of two layers, so that there is a last layer."""
    model = dual_encoder(VIT.model_copy(update={"depth": 2}), spec_of((8, 8, 8)), standardise=True).eval()
    save_model(tmp_path / "deep", model, labels_of_columns("clinic", NAMES))
    return Clinic(clinic.store, tmp_path / "deep")


def test_every_method_has_a_recipe() -> None:
    assert {path.stem for path in (configs_folder() / "adapt").glob("*.yaml")} == {
        *METHODS,
        "coop",
        "caption",
        "prior",
        "locate",
        "decode",
        # Settings of `decode` for a whole training on phantoms.
        "phantom_imagine",
    }


def test_shots_are_what_the_run_sees(clinic: Clinic, tmp_path: Path) -> None:
    recipe = Recipe("vocabfine", str(clinic.model), clinic.store, setting=Setting("shots", 3))
    config, patients = configured(recipe, clinic.model, tmp_path / "run")
    seen = pd.read_csv(tmp_path / "run" / DRAW, index_col="volume")
    assert (seen == 1).sum().tolist() == (seen == 0).sum().tolist() == [3, 3]
    assert set(patients) == {f"p{int(name[1:]) // 2:02d}" for name in seen.index}
    assert config.data.label_table == str(tmp_path / "run" / DRAW)
    # So few volumes are used for at least 60 steps.
    assert config.training.epochs * max(1, len(seen) // config.training.batch) >= 60
    assert config.reads_labels
    again, _ = configured(recipe, clinic.model, tmp_path / "run")
    assert again == config


def test_only_the_last_layer_learns(deep: Clinic, tmp_path: Path) -> None:
    config, _ = configured(Recipe("last-layers", str(deep.model), deep.store), deep.model, tmp_path / "run")
    assert config.training.freeze.volume == "0-1"
    assert config.training.freeze.text == "all"


@pytest.mark.integration
@pytest.mark.parametrize("method", ["vocabfine", "lora"])
def test_a_recipe_ends_with_a_model_that_knows_its_patients(method: str, clinic: Clinic, tmp_path: Path) -> None:
    command = [
        "--method",
        method,
        "--model",
        clinic.model,
        "--store",
        clinic.store,
        "--output",
        tmp_path / "run",
        *QUICK,
    ]
    command += ["--merge-adapters"] if method == "lora" else []
    folder = tmp_path / "run" / "model"

    def run() -> str:
        # In a separate process: a training would leave the settings of its ranks behind.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "ctclip.adapt", *map(str, command)], env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return load_model(folder).hash

    once = run()
    adapted, before = load_model(folder), load_model(clinic.model)
    assert adapted.trained_on.supervision == "label-supervised"
    assert len(Adaptation.load(folder / FILE).saw([f"p{number:02d}" for number in range(40)])) == 28
    assert [one.name for one in list_heads(folder)] == ["prompts"]
    assert adapted.model.config.volume.tuning == "full", "merged"
    changed = {
        name for name, value in adapted.model.state_dict().items()
        if not torch.allclose(value.float(), before.model.state_dict()[name].float(), atol=1e-7)
    }  # fmt: skip
    assert any(name.startswith("volume_encoder.") for name in changed)
    assert not any(name.startswith("text_encoder.") for name in changed)
    # Finished: the same command returns at once, with the same model and what was added to it. Merged weights are not those
    # of the checkpoint: such a folder is written and merged again.
    (folder / "heads" / "prompts" / "calibration.json").write_text("{}")
    assert run() == once
    if method != "lora":
        assert (folder / "heads" / "prompts" / "calibration.json").read_text() == "{}"


def test_merged_adapters_score_as_they_did_apart(tmp_path: Path) -> None:
    model = dual_encoder(VIT.model_copy(update={"tuning": "lora", "lora_rank": 2}), spec_of((8, 8, 8))).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    volumes = torch.rand(3, 1, 8, 8, 8, generator=random) * 2 - 1
    save_model(
        tmp_path / "model", model, labels_of_columns("clinic", NAMES),
        write_more=lambda folder: write_prompt_head(folder, load_prompts("generic"), NAMES),
    )  # fmt: skip
    merge_adapters(tmp_path / "model")
    merged = load_model(tmp_path / "model")
    assert merged.model.config.volume.tuning == "full"
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    assert [one.name for one in list_heads(tmp_path / "model")] == ["prompts"]
    with torch.no_grad():
        assert torch.allclose(model.encode_volume(volumes), merged.model.encode_volume(volumes), atol=1e-5)
    once = merged.hash
    merge_adapters(tmp_path / "model")
    assert load_model(tmp_path / "model").hash == once


def test_what_cannot_be_trained_is_refused_before_anything_is_written(clinic: Clinic, tmp_path: Path) -> None:
    output = tmp_path / "run"
    one_class = tmp_path / "one.csv"
    one_class.write_text("volume,Gallstones\n" + "".join(f"v{number:02d},1\n" for number in range(80)))
    cases: list[tuple[Recipe, str]] = [
        (Recipe("vocabfine", str(clinic.model), clinic.store, labels=one_class), r"one\.csv: every label has only one class"),
        (Recipe("full", str(clinic.model), clinic.store, setting=Setting("shots", 4)), "full reads no label"),
        (Recipe("vocabfine", str(clinic.model), clinic.store, setting=Setting("shots", 99)), "fewer than the 99 shots asked for"),
        (Recipe("vocabfine", str(clinic.model), clinic.store, split="tset"), "no stored volume of split 'tset'"),
        (Recipe("vocabfine", str(clinic.model), clinic.store, overrides=("training.epoch=1",)), "epoch"),
        (Recipe("vocabfine", str(clinic.model), clinic.store, config="nothing.yaml"), "no recipe of `ctclip adapt` 'nothing.yaml'"),
    ]  # fmt: skip
    for recipe, message in cases:
        with pytest.raises((CtclipError, PreprocessingError), match=message) as raised:
            run_recipe(recipe, output)
        assert "\n" not in str(raised.value)
    assert not output.exists()
    other = dual_encoder(VIT, spec_of((8, 8, 16)), standardise=True)
    save_model(tmp_path / "other", other, labels_of_columns("clinic", NAMES))
    with pytest.raises(DataError, match="run `ctclip preprocess --spec"):
        run_recipe(Recipe("vocabfine", str(tmp_path / "other"), clinic.store), output)
