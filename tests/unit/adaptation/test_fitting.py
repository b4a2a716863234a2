"""Probes and learned prompts on a store: tables, the saved head, and refusals."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from ctclip.adaptation import examples as examples_module
from ctclip.adaptation.coop import CoopConfig
from ctclip.adaptation.examples import Splits
from ctclip.adaptation.fitting import Options, run_coop, run_probe
from ctclip.adaptation.keep import add_head
from ctclip.adaptation.protocol import Setting
from ctclip.errors import CheckpointError, CtclipError, DataError, EvaluationError
from ctclip.evaluation.run_calibration import run_calibration
from ctclip.evaluation.run_evaluation import run_evaluation
from ctclip.heads.folder import list_heads
from ctclip.inference.model import load, usable_head
from ctclip.inference.run import detect
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import load_model
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.store import VolumeStore
from tests.unit.adaptation.conftest import NAMES, Clinic

ALL = [Setting("fraction", 100.0)]


def predictions(clinic: Clinic, head: str, split: str | None, output: Path) -> Path:
    loaded = load_model(clinic.model)
    scans = StoredScans(VolumeStore(clinic.store), split, loaded.spec, loaded.path)
    return detect(loaded, usable_head(loaded, head), scans, output).predictions


def test_probe_is_scikit_learns_and_its_head_scores_alike(clinic: Clinic, tmp_path: Path) -> None:
    loaded = load_model(clinic.model)
    result = run_probe(loaded, clinic.store, tmp_path / "probe", ALL, Options())
    cohort = VolumeStore(clinic.store).cohort.set_index("volume")
    store = VolumeStore(clinic.store)
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack([store.voxels(name) for name in cohort.index])[:, None])
        vectors = loaded.model.encode_volume(batch).double().numpy()
    train = (cohort["split"] == "train").to_numpy()
    scaler = StandardScaler().fit(vectors[train])
    table = pd.read_csv(predictions(clinic, "probe", "valid", tmp_path / "predictions")).set_index("volume")
    for label, strength in zip(NAMES, (None, None), strict=True):
        truth = cohort[label].to_numpy(dtype=int)
        # Whichever strength it chose, one of scikit-learn's regressions must score like the head.
        aurocs = {}
        for c in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0):
            by_hand = LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(vectors[train]), truth[train])
            scores = by_hand.decision_function(scaler.transform(vectors[~train]))
            found = table.loc[cohort.index[~train], f"margin:{label}"].to_numpy()
            if np.allclose(found, scores, atol=2e-3):
                aurocs[c] = roc_auc_score(truth[~train], scores)
        assert aurocs, f"{label}: {strength}"
        measured = result.labels.set_index("label").loc[label, "auroc"]
        assert measured == pytest.approx(next(iter(aurocs.values())), abs=1e-9)
    assert (tmp_path / "probe" / "curve.png").stat().st_size > 5000
    assert table["supervision"].unique().tolist() == ["label-supervised"]


def test_embeddings_are_read_once(clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(clinic.model)
    run_probe(loaded, clinic.store, tmp_path / "probe", ALL, Options())

    def never(*_: object, **__: object) -> int:
        raise AssertionError("embedded twice")

    monkeypatch.setattr(examples_module, "embed_scans", never)
    again = run_probe(loaded, clinic.store, tmp_path / "probe", ALL, Options())
    assert again.summary["mean_auroc"].iloc[0] > 0.5


def test_patients_it_was_fitted_to_are_refused_in_test_and_calibration(clinic: Clinic, tmp_path: Path) -> None:
    loaded = load_model(clinic.model)
    run_probe(loaded, clinic.store, tmp_path / "probe", ALL, Options())
    seen = predictions(clinic, "probe", None, tmp_path / "all")
    held = predictions(clinic, "probe", "valid", tmp_path / "held")
    assert pd.read_csv(seen)["adapted_on"].sum() == 56
    with pytest.raises(
        EvaluationError, match=r"28 of its patients, the first 'p00', are among those whose labels .* test"
    ):
        run_evaluation(seen, tmp_path / "evaluation", store=clinic.store)
    where = clinic.model / "heads" / "probe" / "calibration.json"
    with pytest.raises(EvaluationError, match="a calibration must come from other patients"):
        run_calibration(seen, clinic.model, where, model_hash=loaded.hash, store=clinic.store)
    assert not (tmp_path / "evaluation").exists()
    assert run_evaluation(held, tmp_path / "evaluation", store=clinic.store, bootstrap=20)["patients"] == 12
    run_calibration(held, clinic.model, where, model_hash=loaded.hash, store=clinic.store)
    assert usable_head(load_model(clinic.model), "probe").thresholds().keys() == set(NAMES)
    # It does not change predictions of any prompts.
    assert "adapted_on" not in pd.read_csv(predictions(clinic, "prompts", None, tmp_path / "prompts")).columns


def test_a_copy_to_give_away_names_no_patient(clinic: Clinic, tmp_path: Path) -> None:
    run_probe(load_model(clinic.model), clinic.store, tmp_path / "probe", ALL, Options())
    run_probe(load_model(clinic.model), clinic.store, tmp_path / "probe", ALL, Options())
    card = (clinic.model / "model_card.md").read_text()
    assert (
        card.count("Head probe: label-supervised, probe, fitted to labels of 56 volumes of 28 patients, split train.")
        == 1
    )
    kept = json.loads((clinic.model / "heads" / "probe" / "adaptation.json").read_text())
    assert len(kept["patients"]) == 28
    assert "p00" not in json.dumps(kept)
    load(clinic.model).save_pretrained(tmp_path / "copy")
    given = json.loads((tmp_path / "copy" / "heads" / "probe" / "adaptation.json").read_text())
    assert given["patients"] == []
    assert given["salt"] == ""


def test_a_head_of_another_model_is_refused(clinic: Clinic, tmp_path: Path) -> None:
    run_probe(load_model(clinic.model), clinic.store, tmp_path / "probe", ALL, Options())
    folder = clinic.model / "heads" / "probe"
    facts = json.loads((folder / "adaptation.json").read_text())
    (folder / "adaptation.json").write_text(json.dumps(facts | {"model": "0123456789ab"}))
    with pytest.raises(CheckpointError, match="its head 'probe' was fitted to another model"):
        usable_head(load_model(clinic.model), "probe")


def test_coop_learns_and_is_kept_as_a_head(clinic: Clinic, tmp_path: Path) -> None:
    config = CoopConfig(steps=60, learning_rate=0.3, anchor=0.0)
    options = Options(head="coop", draws=1)
    result = run_coop(load_model(clinic.model), clinic.store, tmp_path / "coop", Setting("shots", 8), config, options)
    assert result.zero_shot is not None
    assert result.summary["mean_auroc"].iloc[0] > max(0.8, result.zero_shot + 0.05)
    table = pd.read_csv(predictions(clinic, "coop", "valid", tmp_path / "predictions")).set_index("volume")
    truth = VolumeStore(clinic.store).cohort.set_index("volume").loc[table.index]
    for label in NAMES:
        by_head = roc_auc_score(truth[label].to_numpy(dtype=int), table[f"margin:{label}"])
        assert by_head == pytest.approx(result.labels.set_index("label").loc[label, "auroc"])
    facts = {one.name: (one.kind, one.supervision) for one in list_heads(clinic.model)}
    assert facts["coop"] == ("contexts", "label-supervised")


def own_labels(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["volume,Gallstones,age", *rows]) + "\n")
    return path


def test_own_labels_are_fitted_to(clinic: Clinic, tmp_path: Path) -> None:
    table = VolumeStore(clinic.store).cohort
    rows = [f"{row.volume}.nii.gz,{'yes' if row.Nodule else 'no'},{40 + i}" for i, row in enumerate(table.itertuples())]
    labels = own_labels(tmp_path / "mine.csv", rows)
    result = run_probe(load_model(clinic.model), clinic.store, tmp_path / "probe", ALL, Options(labels))
    assert result.labels["label"].tolist() == ["Gallstones"]
    held = predictions(clinic, "probe", "valid", tmp_path / "held")
    assert run_evaluation(held, tmp_path / "e", labels=labels, bootstrap=20)["zero_shot"]["labels_defined"] == 1


def bad_inputs(clinic: Clinic, folder: Path) -> dict[str, tuple[Options, list[Setting], str]]:
    rows = [f"v{number:02d},{number % 2},50" for number in range(80)]
    third = own_labels(folder / "third.csv", [*rows[:10], "v10,2,50", *rows[11:]])
    strangers = own_labels(folder / "strangers.csv", [f"x{number},{number % 2},50" for number in range(9)])
    one_class = own_labels(folder / "one.csv", [f"v{number:02d},1,50" for number in range(80)])
    nothing = own_labels(folder / "nothing.csv", [f"v{number:02d},,50" for number in range(80)])
    return {
        "third value": (Options(third), ALL, r"third\.csv: column 'Gallstones' holds values other than 0 and 1: '2' \(line 12\)"),
        "in no store": (Options(strangers), ALL, r"strangers\.csv: none of its 9 volumes is in the store"),
        "one class": (Options(one_class), ALL, r"one\.csv: every label has only one class among the training patients"),
        "no label": (Options(nothing), ALL, r"nothing\.csv: has no label column"),
        "too many shots": (Options(), [Setting("shots", 15)], r"'Nodule' has 14 positive training patients, fewer than the 15 shots asked for"),
        "one class in a draw": (Options(), [Setting("fraction", 1)], r"1 % of the patients \(1 of 28\) have only one class"),
        "a split that is not there": (Options(splits=Splits("train", "tset")), ALL, r"no stored volume of split 'tset'"),
        "the same patients twice": (Options(splits=Splits("train", "train")), ALL, r"28 patients, the first 'p00', are in both the training"),
        "a head of the model's own": (Options(head="prompts"), ALL, r"has a head 'prompts' of its own"),
        "a name that is a path": (Options(head="../x"), ALL, r"'\.\./x' is not a valid name for a head"),
    }  # fmt: skip


BAD = (
    "third value", "in no store", "one class", "no label", "too many shots", "one class in a draw",
    "a split that is not there", "the same patients twice", "a head of the model's own", "a name that is a path",
)  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_kept(case: str, clinic: Clinic, tmp_path: Path) -> None:
    options, settings, message = bad_inputs(clinic, tmp_path)[case]
    with pytest.raises((CtclipError, PreprocessingError), match=message) as raised:
        run_probe(load_model(clinic.model), clinic.store, tmp_path / "probe", settings, options)
    assert "\n" not in str(raised.value)
    assert [one.name for one in list_heads(clinic.model)] == ["prompts"]
    assert not list((tmp_path / "probe").glob("*.csv"))


def test_a_folder_of_somebody_elses_is_refused(clinic: Clinic, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(PreprocessingError, match="is not empty and holds no output of `ctclip probe`"):
        run_probe(load_model(clinic.model), clinic.store, tmp_path / "mine", ALL, Options())


def test_all_labels_of_one_class_in_a_split_are_left_out(
    clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "store"
    shutil.copytree(clinic.store, store)
    table = pd.read_parquet(store / "cohort.parquet")
    table["Effusion"] = pd.array([0] * len(table), "Int8")
    table.to_parquet(store / "cohort.parquet")
    result = run_probe(load_model(clinic.model), store, tmp_path / "probe", ALL, Options())
    assert result.labels["label"].tolist() == ["Nodule"]
    assert "because the training patients have only one class of them: Effusion" in capsys.readouterr().out
    with pytest.raises(DataError):
        run_probe(load_model(clinic.model), store, tmp_path / "probe", ALL, Options(splits=Splits("valid", "nothing")))


def _describe(model: Path, names: list[str]) -> None:
    for name in names:
        add_head(model, name, NoHead(), f"of {name}")


class NoHead:
    """A head of one empty file."""

    kind, supervision, names, calibration, adaptation = "none", "none", (), None, None

    def save(self, folder: Path) -> None:
        (folder / "weights").touch()


def test_commands_that_add_heads_to_one_model_at_once_lose_no_line_of_its_card(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    names = [[f"{who}{number}" for number in range(25)] for who in "abc"]
    several = [context.Process(target=_describe, args=(tmp_path, part)) for part in names]
    for one in several:
        one.start()
    for one in several:
        one.join(60)
    lines = (tmp_path / "model_card.md").read_text().splitlines()
    assert sorted(lines[1:]) == sorted(f"Head {name}: of {name}." for part in names for name in part)
