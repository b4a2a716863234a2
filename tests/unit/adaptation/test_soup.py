"""Averages of models: of their probabilities, and of their weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from ctclip.adaptation.soup import make_soup, mean_state, model_of
from ctclip.errors import CheckpointError, DataError
from ctclip.evaluation.adapted import FILE, Adaptation
from ctclip.evaluation.tables import read_predictions
from ctclip.inference.ensemble import average_predictions, detect_together
from ctclip.inference.model import usable_head
from ctclip.inference.scans import StoredScans
from ctclip.models import folder as folder_module
from ctclip.models.checksums import write_checksums
from ctclip.models.folder import load_model
from ctclip.preprocessing.store import VolumeStore
from tests.unit.adaptation.conftest import Clinic


def variant(clinic: Clinic, folder: Path, seed: int, size: float) -> Path:
    """A copy of the clinic's model whose weights differ a little."""
    shutil.copytree(clinic.model, folder)
    random = torch.Generator().manual_seed(seed)
    state = load_file(folder / "model.safetensors")
    changed = {
        name: value + size * torch.randn(value.shape, generator=random) if value.is_floating_point() and "standard" not in name else value
        for name, value in state.items()
    }  # fmt: skip
    save_file(changed, folder / "model.safetensors")
    write_checksums(folder)
    return folder


def test_probabilities_are_averaged(clinic: Clinic, tmp_path: Path) -> None:
    folders = [load_model(variant(clinic, tmp_path / f"m{number}", number, 0.05)) for number in range(2)]
    heads = [usable_head(folder, "prompts") for folder in folders]
    scans = [StoredScans(VolumeStore(clinic.store), "valid", folder.spec, folder.path) for folder in folders]
    found = detect_together(folders, heads, scans, tmp_path / "out")
    parts = [pd.read_csv(tmp_path / "out" / f"model_{n}" / "predictions.csv").set_index("volume") for n in (1, 2)]
    table, names = read_predictions(found.predictions)
    assert names == ["Nodule", "Effusion"]
    together = table.set_index("volume")
    mean = (parts[0][names] + parts[1].loc[parts[0].index, names]) / 2
    assert np.allclose(together.loc[mean.index, names], mean, atol=1e-6)
    margins = together[[f"margin:{name}" for name in names]].to_numpy()
    assert np.allclose(1 / (1 + np.exp(-margins)), together[names], atol=1e-6)
    assert table["model"].iloc[0] == f"{folders[0].hash} + {folders[1].hash}"
    # The same command again continues, and adds nothing.
    detect_together(folders, heads, scans, tmp_path / "out")
    with pytest.raises(DataError, match=r"holds the same weights as .*; give each model once"):
        detect_together([folders[0], load_model(folders[0].path)], heads, scans, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    identity = {"volume": ["a", "b"], "patient": ["a", "b"], "scan": ["a", "b"]}
    one = pd.DataFrame({**identity, "x": [0.2, 0.4], "supervision": "reports only", "adapted_on": [0, 1]})
    one.to_csv(tmp_path / "one.csv", index=False)
    one.rename(columns={"x": "y"}).to_csv(tmp_path / "other_names.csv", index=False)
    one.assign(volume=["a", "c"]).to_csv(tmp_path / "other_scans.csv", index=False)
    one.iloc[::-1].assign(x=[0.8, 0.6], supervision="label-supervised", adapted_on=0).to_csv(
        tmp_path / "two.csv", index=False
    )
    with pytest.raises(DataError, match="scores different findings"):
        average_predictions([tmp_path / "one.csv", tmp_path / "other_names.csv"], tmp_path / "mean.csv")
    with pytest.raises(DataError, match="holds other volumes"):
        average_predictions([tmp_path / "one.csv", tmp_path / "other_scans.csv"], tmp_path / "mean.csv")
    assert not (tmp_path / "mean.csv").exists()
    mean = average_predictions([tmp_path / "one.csv", tmp_path / "two.csv"], tmp_path / "mean.csv")
    assert mean["x"].tolist() == pytest.approx([0.4, 0.6])
    assert mean["supervision"].unique().tolist() == ["label-supervised"]
    assert mean["adapted_on"].tolist() == [0, 1]


def test_mean_of_tensors() -> None:
    mean = mean_state(
        [{"w": torch.tensor([1.0, 3.0]), "n": torch.tensor(5)}, {"w": torch.tensor([3.0, 5.0]), "n": torch.tensor(9)}]
    )
    assert mean["w"].tolist() == [2.0, 4.0]
    assert mean["n"].item() == 5


def test_a_soup_is_kept_only_if_it_is_better(clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place = folder_module.put_in_place

    def whole_at_once(partial: Path, *rest: Any) -> None:
        assert Adaptation.load(partial / FILE).saw(["p01", "p02"]) == ["p01"], "a kill from here on loses no record"
        put_in_place(partial, *rest)

    store = clinic.store
    same = [variant(clinic, tmp_path / f"same{number}", number, 1e-7) for number in range(2)]
    made = make_soup(same, store, "valid", tmp_path / "none")
    assert made.folder is None, "the mean of models that score alike is no better"
    assert not (tmp_path / "none").exists()
    # Two models that err in opposite directions; their mean is right.
    good = load_file(clinic.model / "model.safetensors")
    base = load_model(clinic.model)
    noise = {n: 3.0 * v.std() * torch.randn(v.shape, generator=torch.Generator().manual_seed(3)) for n, v in good.items() if n.startswith("volume_encoder") and v.is_floating_point() and v.numel() > 1}  # fmt: skip
    for sign, name in ((1, "plus"), (-1, "minus")):
        shutil.copytree(clinic.model, tmp_path / name)
        save_file(
            {n: v + sign * noise[n] if n in noise else v for n, v in good.items()},
            tmp_path / name / "model.safetensors",
        )
        write_checksums(tmp_path / name)
    Adaptation.to("lora", "x", "m", ["p01"]).save(tmp_path / "plus" / FILE)
    monkeypatch.setattr(folder_module, "put_in_place", whole_at_once)
    made = make_soup([tmp_path / "plus", tmp_path / "minus"], store, "valid", tmp_path / "soup")
    if made.auroc > max(made.alone.values()):
        assert made.folder == tmp_path / "soup"
        kept = load_model(tmp_path / "soup").model.state_dict()
        for name, value in base.model.state_dict().items():
            assert torch.allclose(kept[name], value, atol=1e-5), name
    else:
        assert made.folder is None


def test_models_of_other_recipes_and_patients_are_refused(clinic: Clinic, tmp_path: Path) -> None:
    other = variant(clinic, tmp_path / "other", 1, 0.01)
    (other / "labels.yaml").write_text("name: two\nlabels: [Nodule, Gallstones]\n")
    with pytest.raises(CheckpointError, match=r"other: differs from .* in its label set"):
        make_soup([clinic.model, other], clinic.store, "valid", tmp_path / "soup")
    adapted = variant(clinic, tmp_path / "adapted", 1, 0.01)
    Adaptation.to("lora", "x", "m", ["p30"]).save(adapted / FILE)
    with pytest.raises(DataError, match="adapted: was adapted to 1 patients of split 'valid', the first 'p30'"):
        make_soup([clinic.model, adapted], clinic.store, "valid", tmp_path / "soup")
    with pytest.raises(DataError, match="is one of the models to average"):
        make_soup([clinic.model, other], clinic.store, "valid", other.parent / "." / "other")
    with pytest.raises(DataError, match="at least two"):
        make_soup([clinic.model], clinic.store, "valid", tmp_path / "soup")
    with pytest.raises(DataError, match="holds the same weights as"):
        make_soup([clinic.model, clinic.model], clinic.store, "valid", tmp_path / "soup")
    assert model_of(clinic.model.parent) == clinic.model
