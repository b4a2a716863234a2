"""Options that would have no effect are refused in one line, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctclip.cli import main

ADAPT = "adapt --model m --store s --output o --method"
READ = "read-reports r.csv --label-set ct_rate_18 --reader"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{ADAPT} lora --head mine", "--head applies only to methods that save a head: coop, caption"),
        (f"{ADAPT} lora --draws 3", "--draws applies only to --method coop"),
        (f"{ADAPT} caption --test-split valid", "--test-split applies only to --method coop"),
        (f"{ADAPT} full --merge-adapters", "--merge-adapters applies only to --method lora"),
        (f"{ADAPT} coop --shots 4 --percent 10", "--percent does not apply to --shots: give one of them"),
        (f"{ADAPT} decode --processes 4", "--processes does not apply to --method decode, which trains in one process"),
        (f"{READ} classifier --terms t.yaml", "--terms applies only to --reader rules"),
        (f"{READ} rules --cache c", "--cache applies only to --reader language-model"),
        (f"{READ} language-model --threshold 0.4", "--threshold applies only to --reader classifier"),
        (f"{READ} rules --batch 3", "--batch applies only to --reader classifier and language-model"),
        (
            "prompts mine --store s --reader-model m",
            "--reader-model applies only to --reader classifier and language-model",
        ),
        (
            "prompts mine --store s --reader classifier --reader-model m --terms t",
            "--terms applies only to --reader rules",
        ),
        ("prompts mine --store s --judge valid", "--judge needs --model"),
        ("zero-shot --model m --store s --expect any", "--expect applies to scan files, not to volumes of a store"),
        ("embed x.nii.gz --model m --split valid", "--split needs --store"),
        ("embed --store s --model m --largest-gb 3", "--largest-gb applies to scan files, not to volumes of a store"),
        ("embed --reports r.csv --model m --batch 3", "--batch applies to volumes, not to reports"),
        ("draft x.nii.gz --model m --count 3", "--count needs --store"),
        ("draft --store s --model m --expect any", "--expect applies to scan files, not to volumes of a store"),
        ("draft x.nii.gz --model m --seed 3", "--seed needs --nucleus"),
        ("imagine text --model m --output x.nii.gz --split valid", "--split needs --store"),
        ("train --config phantom_tiny --output o --card a10", "--card needs --plan"),
        ("audit doubles --store s --batch 3", "--batch needs --model"),
        ("evaluate p.csv --label-set ct_rate_18", "--label-set needs --reports"),
        (
            "evaluate --reports d.csv --store s --protocol ct_rate",
            "--protocol applies to predictions, not to --reports",
        ),
        ("similar --text t --index i --expect any", "--expect applies to a scan, not to --text"),
        ("similar x.nii.gz --index i --weight 2", "--weight needs --plus or --minus"),
        ("explain x.nii.gz --model m --budget 9", "--budget applies only to --method occlusion and counterfactual"),
        ("find x.nii.gz text --model m --method gradcam --budget 9", "--budget applies only to --method occlusion"),
        ("locate c --masks k --model m --budget 9", "--budget applies only to --method occlusion"),
        ("models --model m --spec ct_224", "--spec does not apply to --model, which has its own"),
        ("models tiny --model m", "give either names of sizes or --model"),
        ("publish m --output o --licence mit --public", "--public needs --repository"),
        (
            "preprocess c --output s --merge --verify",
            "--verify does not apply to --merge, which reads no volume",
        ),
        ("serve --model m --dicomweb-token-file t", "--dicomweb-token-file needs --dicomweb"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_head_is_not_trained_by_several_processes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert main([*ADAPT.split(), "prior"]) == 2
    assert "--method prior trains in one process: start it without a launcher" in capsys.readouterr().err
