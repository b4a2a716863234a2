"""The commands as a user types them, in a temporary folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ctclip import __version__

from .conftest import TINY, run, typed


def test_version_and_help() -> None:
    assert typed("ctclip", "--version").stdout.startswith(f"ctclip {__version__}")
    for command in ("phantom", "preprocess", "train", "zero-shot", "evaluate", "demo", "calibrate", "report", "embed",
                    "index", "similar", "import-checkpoint"):  # fmt: skip
        shown = run(command, "--help")
        assert shown.returncode == 0
        assert f"ctclip {command}" in shown.stdout


def test_a_run_folder_says_what_it_is(trained: Path) -> None:
    facts = json.loads((trained / "run.json").read_text())
    assert facts["seed"] == 0
    assert facts["versions"]["torch"]
    assert facts["revision"]
    card = (trained / "model" / "model_card.md").read_text()
    assert "supervision: reports only" in card
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_an_interrupted_run_continues_as_if_nothing_had_happened(store: Path, trained: Path, tmp_path: Path) -> None:
    whole = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "model")
    newest = sorted((again / "checkpoints").iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"damaged")
    done = run("train", "--config", "phantom_tiny", "--store", store, "--output", again, *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is damaged" in done.stderr
    resumed = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in whole], abs=1e-5)


def test_another_configuration_is_refused(store: Path, trained: Path) -> None:
    changed = [*TINY, "training.learning_rate=0.5"]
    done = run("train", "--config", "phantom_tiny", "--store", store, "--output", trained, *changed)
    assert done.returncode == 2
    assert "training.learning_rate" in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) > 20
    assert "Traceback" not in done.stderr


def test_from_scans_to_a_report(store: Path, cohort: Path, trained: Path, tmp_path: Path) -> None:
    done = typed(
        "ctclip.zero_shot", "--model", trained / "model", "--store", store, "--split", "valid", "--embed-reports", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    done = run("evaluate", tmp_path / "predictions.csv", "--store", store, "--protocol", "phantom", "--run", trained,
               "--output", tmp_path / "evaluation", "--bootstrap", 50)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert found["retrieval"]["report_to_volume"]["pool"] == found["volumes"]
    assert (tmp_path / "evaluation" / "report.html").read_text().count("data:image/png") >= 3
    scan = next((cohort / "dataset" / "valid").rglob("*.nii.gz"))
    one = run("zero-shot", "--model", trained / "model", scan, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    table, stored = pd.read_csv(tmp_path / "one" / "predictions.csv"), pd.read_csv(tmp_path / "predictions.csv")
    same = stored.set_index("volume").loc[table["volume"][0]]
    assert abs(float(table["Cardiomegaly"][0]) - float(same["Cardiomegaly"])) < 0.01, "one scan goes the store's way"
    free = run(
        "zero-shot", "--model", trained / "model", scan, "--abnormality", "pneumothorax", "--output", tmp_path / "free"
    )
    assert "pneumothorax" in free.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--config", "phantom_tinny", "--output", "x"], "phantom_tiny"),
        (["train", "--config", "phantom_tiny", "--output", "x", "training.epoch=1"], "training.epochs"),
        (["preprocess", "absent", "--output", "x"], "no such cohort"),
        (["zero-shot", "--model", "absent", "scan.nii.gz"], "no such model folder"),
        (["evaluate", "absent.csv", "--labels", "labels.csv"], "absent.csv: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command: list[str], said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*command)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in done.stderr


def test_a_corrupt_volume_is_refused_and_the_rest_is_done(cohort: Path, tmp_path: Path) -> None:
    mine = tmp_path / "cohort"
    mine.mkdir()
    files = sorted((cohort / "dataset").rglob("*.nii.gz"))[:3]
    for path in files:
        shutil.copy(path, mine / path.name)
    (mine / files[0].name).write_bytes(files[0].read_bytes()[:4000])
    done = run("preprocess", mine, "--output", tmp_path / "store", "--spec", "phantom", "--workers", 1)
    assert done.returncode == 3
    outcomes = pd.read_csv(tmp_path / "store" / "outcomes.csv")
    assert sorted(outcomes["outcome"]) == ["done", "done", "refused"]
    assert files[0].name in outcomes["reason"].dropna().iloc[0]


def test_reports_and_volumes_that_do_not_match_are_named_or_taken_on_purpose(cohort: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(cohort / "dataset", part / "dataset")
    gone, *kept = sorted((part / "dataset").rglob("*.nii.gz"))
    for path in [gone, *kept[5:]]:
        path.unlink()
    tables = sorted((part / "dataset" / "radiology_text_reports").glob("*.csv"))
    for path in tables:
        table = pd.read_csv(path)
        table[~table["VolumeName"].isin([kept[0].name])].to_csv(path, index=False)
    command = ("preprocess", part, "--output", tmp_path / "store", "--spec", "phantom", "--workers", 1)
    done = run(*command)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    for said in ("have no volume on disk", "1 of the volumes have no report", kept[0].name.split(".")[0], "--partial"):
        assert said in line
    assert not (tmp_path / "store").exists()
    assert run(*command, "--partial").returncode == 0
    assert sorted(pd.read_csv(tmp_path / "store" / "outcomes.csv")["volume"]) == [
        p.name.split(".")[0] for p in kept[:5]
    ]
