"""A foreign cohort (abdomens with three labels), from a table to figures, with commands only."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml

from ctclip.evaluation.tables import read_predictions
from ctclip.labels import load_labels
from ctclip.preprocessing.store import VolumeStore

from ..robustness.processes import Command, Done
from ..robustness.runs import last_line

pytestmark = pytest.mark.integration

NAMES = ["Liver lesion", "Ascites", "Splenomegaly"]
STATED = ["A dark lesion lies in the liver.", "There is free fluid around the organs.", "The spleen is enlarged."]
EXCLUDED = ["The liver is homogeneous.", "No free fluid is seen.", "The spleen is of normal size."]
SPEC = {"name": "abdomen_coarse", "spacing": [6, 5, 5], "shape": [16, 32, 32], "hu_window": [-200, 300], "fill": -1000}
RECIPE = {
    "name": "abdomen",
    "preprocessing": "spec.yaml",
    "data": {"workers": 0, "views": {"report": 1, "impression": 1}},
    "model": {
        "dim": 16,
        "volume": {"kind": "vit3d", "patch": [4, 4, 4], "stages": [[8, 0]], "width": 24, "heads": 2, "depth": 1, "windows": [[-200, 300]]},
        "text": {"vocabulary": 200, "width": 16, "heads": 2, "depth": 1, "max_tokens": 64},
    },
    "objectives": {"clip": 1, "labels": 1, "prompts": 1},
    "training": {"batch": 4, "epochs": 3, "log_every": 1, "validate_every": 4, "validate_volumes": 8},
}  # fmt: skip


def scan(present: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """HU (x, y, z) of a body of soft tissue with a liver, a spleen and the findings in ``present``."""
    x, y, z = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 40), np.linspace(-1, 1, 20), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    body = (x / 0.9) ** 2 + (y / 0.7) ** 2 < 1
    hu[body] = 40
    if present[1]:
        hu[body & ((x / 0.8) ** 2 + (y / 0.6) ** 2 > 1)] = 5
    hu[(x + 0.4) ** 2 + y**2 + z**2 < 0.12] = 110
    if present[0]:
        hu[(x + 0.4) ** 2 + y**2 + z**2 < 0.02] = 20
    hu[(x - 0.45) ** 2 + (y - 0.1) ** 2 + z**2 < (0.10 if present[2] else 0.03)] = 150
    return (hu + random.normal(0, 8, hu.shape)).round().astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's files: volumes, a table, a spec, a recipe."""
    root = tmp_path_factory.mktemp("abdomens")
    random = np.random.default_rng(3)
    records = []
    for number in range(24):
        present = (number >> np.arange(3)) & 1
        image = nib.Nifti1Image(scan(present, random), np.diag([-8.0, -8.0, 5.0, 1.0]))
        image.header.set_xyzt_units("mm")
        nib.save(image, root / f"case{number:02d}.nii.gz")
        sentences = [STATED[i] if present[i] else EXCLUDED[i] for i in range(3)]
        impression = [name for name, there in zip(NAMES, present, strict=True) if there] or ["Normal abdomen"]
        records.append({
            "path": f"case{number:02d}.nii.gz", "patient": f"p{number // 2}", "split": "train" if number < 16 else "valid",
            "findings": " ".join(random.permutation(sentences)), "impression": f"{', '.join(impression)}.",
            **dict(zip(NAMES, present.tolist(), strict=True)), "age": 30 + number,
        })  # fmt: skip
    pd.DataFrame(records).to_csv(root / "table.csv", index=False)
    (root / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (root / "own.yaml").write_text(yaml.safe_dump({**RECIPE, "preprocessing": str(root / "spec.yaml")}))
    return root


def typed(*words: object) -> Done:
    done = Command([str(word) for word in words]).wait(600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Done]:
    """Run every command once, from the table to the figures."""
    store, model = folder / "store", folder / "run" / "model"
    return {
        "labels": typed("labels", "from-csv", folder / "table.csv", "--output", folder / "abdomen.yaml", "--body-part", "abdomen"),
        "preprocess": typed("preprocess", folder / "table.csv", "--output", store, "--spec", folder / "spec.yaml", "--label-set", folder / "abdomen.yaml", "--workers", 1),
        "train": typed("train", "--config", folder / "own.yaml", "--store", store, "--output", folder / "run"),
        "zero-shot": typed("zero-shot", "--model", model, "--store", store, "--split", "valid", "--embed-reports", "--output", folder / "predictions"),
        "one scan": typed("zero-shot", "--model", model, folder / "case20.nii.gz", "--output", folder / "one"),
        "evaluate": typed("evaluate", folder / "predictions" / "predictions.csv", "--store", store, "--output", folder / "evaluation", "--bootstrap", 20),
    }  # fmt: skip


def test_its_labels_go_from_the_table_to_the_figures(folder: Path, said: dict[str, Done]) -> None:
    labels = load_labels(folder / "abdomen.yaml")
    assert list(labels.names) == NAMES, "the age is no label"
    assert load_labels(folder / "store" / "labels.yaml") == labels
    assert load_labels(folder / "run" / "model" / "labels.yaml") == labels
    for place in ("predictions", "one"):
        table, names = read_predictions(folder / place / "predictions.csv")
        assert names == NAMES
        assert set(table["labels"]) == {labels.identity}
        assert set(table["supervision"]) == {"label-supervised"}
        assert table["trained_on"].str.contains("abdomen").all()
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert list(metrics["zero_shot"]["auroc"]) == NAMES
    assert metrics["labels"] == labels.identity
    assert metrics["volumes"] == 8
    assert metrics["retrieval"]["report_to_volume"]["pool"] == 8


def test_the_run_learns_from_all_three_objectives_and_is_validated(folder: Path, said: dict[str, Done]) -> None:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert {"clip", "labels", "prompts", "gradient_norm", "logit_scale"} <= set(trained[0])
    assert all(
        line["loss"] == pytest.approx(line["clip"] + line["labels"] + line["prompts"], rel=1e-5) for line in trained
    )
    assert all(np.isfinite(line["valid_loss"]) for line in lines if "valid_loss" in line)
    assert sum("valid_loss" in line for line in lines) == len(trained) // 4


def test_nobody_calls_it_a_chest(folder: Path, said: dict[str, Done]) -> None:
    assert len(VolumeStore(folder / "store").volumes) == 24
    for done in said.values():
        assert "chest" not in f"{done.stdout} {done.stderr}".lower()
    for place in ("predictions", "one"):
        warnings = pd.read_csv(folder / place / "predictions.csv")["warnings"].fillna("")
        assert not warnings.str.contains("chest").any()
    assert "chest" not in (folder / "run" / "model" / "trained_on.yaml").read_text()


def test_labels_that_the_store_lacks_are_refused(folder: Path, said: dict[str, Done], tmp_path: Path) -> None:
    command = [
        "train",
        "--config",
        str(folder / "own.yaml"),
        "--store",
        str(folder / "store"),
        "--output",
        str(tmp_path / "run"),
    ]
    line = last_line(Command([*command, "labels=ct_rate_18"]).wait(600))
    assert "no column for 'Medical material' of the label set 'ct_rate_18'" in line
    assert "its own label set is 'abdomen'" in line
    # If no objective uses labels, the label set only names the findings to ask for.
    asked = Command([*command, "labels=ct_rate_18", "objectives={clip: 1}", "training.validate_every=0"]).wait(600)
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert load_labels(tmp_path / "run" / "model" / "labels.yaml").name == "ct_rate_18"
    preprocess = [
        "preprocess",
        str(folder / "table.csv"),
        "--output",
        str(tmp_path / "store"),
        "--spec",
        str(folder / "spec.yaml"),
    ]
    line = last_line(Command([*preprocess, "--label-set", "ct_rate_18", "--workers", "1"]).wait(600))
    assert "no column of the label set 'ct_rate_18'" in line
    assert "Liver lesion" in line
