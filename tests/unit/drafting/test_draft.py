"""Drafts of one scan and of a store: claims, probabilities, marks, locations, and one-line errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import ctclip
from ctclip.cli import main
from ctclip.drafting.draft import draft
from ctclip.drafting.writers import CaptionWriter, Detected, TemplateWriter, Writer
from ctclip.evaluation.calibration import Calibration, Line
from ctclip.heads.caption import Decoding
from ctclip.inference.index import Index
from ctclip.labels import load_labels
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import Pair, PromptSet, load_prompts
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from tests.unit.drafting.conftest import Clinic

CLEANER = Cleaner(RulesReader.build(load_labels("ct_rate_18"), Options()))
NOTHING = Encoded(torch.zeros(1, 1, 1), (1, 1, 1), torch.zeros(1, 1), np.eye(4))


class Fixed(Writer):
    def __init__(self, findings: str) -> None:
        self.findings = findings

    def write(self, encoded: Encoded, detected: Detected) -> dict[str, str]:
        return {"findings": self.findings, "impression": ""}


def detected(**probabilities: float) -> Detected:
    named = {name.replace("_", " "): p for name, p in probabilities.items()}
    return Detected(named, {name: p >= 0.5 for name, p in named.items()})


def test_a_template_names_a_side_only_if_it_is_certain() -> None:
    writer = TemplateWriter(load_labels("ct_rate_18").names, [load_prompts("report_style")], CLEANER)
    words = replace(
        detected(Pleural_effusion=0.9, Emphysema=0.8), sides={"Pleural effusion": "left", "Atelectasis": "right"}
    )
    for section in ("findings", "impression"):
        sentences = CLEANER.clean(writer.write(NOTHING, words)[section])
        named = {
            finding.label: finding.side for one in sentences for finding in one.findings if finding.status == "present"
        }
        assert named == {"Pleural effusion": "left", "Emphysema": ""}
    assert writer.sided["Lung nodule", "right"] == "Lung nodule on the right."
    assert all(
        {(one.label, one.side) for one in CLEANER.clean(text)[0].findings} == {key}
        for key, text in writer.sided.items()
    )


def test_a_caption_names_the_sides_of_its_plan_and_of_the_locator() -> None:
    plan = (["Pleural effusion", "Lung opacity", "Atelectasis"], {"Pleural effusion": "left", "Atelectasis": "left"})
    written = dict.fromkeys(("findings", "impression"), "There is a pleural effusion.")
    head = SimpleNamespace(prompted=True, write=lambda *_: [written], planned=lambda _: [plan])
    template = TemplateWriter(load_labels("ct_rate_18").names, [load_prompts("report_style")], CLEANER)
    writer = CaptionWriter(head, Decoding(), template, CLEANER)  # type: ignore[arg-type]
    words = replace(detected(), sides={"Lung opacity": "right", "Atelectasis": "right"})
    assert writer.write(NOTHING, words)["findings"] == (
        "Pleural effusion on the left. Lung opacity on the right. Atelectasis on the right."
    )


def test_each_claim_gets_the_detectors_probability_and_is_marked_if_denied() -> None:
    words = detected(Lung_nodule=0.9, Pleural_effusion=0.2, Cardiomegaly=0.7)
    text = (
        "A nodule is seen in the left upper lobe. There is a right pleural effusion. The heart is not enlarged. "
        "Possible pleural effusion. Emphysema is seen. The trachea is open."
    )
    sentences = draft(NOTHING, words, Fixed(text), CLEANER)["findings"]
    claims = [[(c.finding, c.status.value, c.side, c.probability, c.denied) for c in one.claims] for one in sentences]
    assert claims == [
        [("Lung nodule", "present", "left", 0.9, False)],
        [("Pleural effusion", "present", "right", 0.2, True)],
        [("Cardiomegaly", "absent", "", pytest.approx(0.3), True)],
        [("Pleural effusion", "uncertain", "", 0.2, False)],
        [("Emphysema", "present", "", None, False)],
        [],
    ]
    assert [one.denied for one in sentences] == [False, True, True, False, False, False]
    assert str(sentences[1]).startswith("[!] There is a right pleural effusion.")


def test_template_uses_phrasings_that_claim_nothing_else() -> None:
    both = {"findings": ("Emphysema is seen in both lungs.", "Emphysema with a nodule.", "Emphysema is observed.")}
    mined = PromptSet(
        name="mined",
        abnormalities={
            "Emphysema": Pair(
                positive=both, negative={"findings": ("No emphysema.",)}, positive_weights={"findings": (9, 5, 1)}
            ),
            "Lung nodule": Pair(
                positive={"findings": ("A nodule of 7 mm is seen.",)}, negative={"findings": ("There is no nodule.",)}
            ),
        },
    )
    names = ("Emphysema", "Lung nodule", "Cardiomegaly")
    writer = TemplateWriter(names, [mined, load_prompts("report_style")], CLEANER)
    written = writer.write(NOTHING, detected(Emphysema=0.9, Lung_nodule=0.8, Cardiomegaly=0.1))
    assert written["findings"].startswith("Emphysema is observed. ")
    assert "7 mm" not in written["findings"]
    assert "Emphysema" in written["impression"]
    read = CLEANER.clean(written["findings"])
    assert {(f.label, f.status.value) for one in read for f in one.findings} == {
        ("Emphysema", "present"), ("Lung nodule", "present"), ("Cardiomegaly", "absent"),
    }  # fmt: skip
    assert not any(finding.side or finding.size_mm for one in read for finding in one.findings)
    nothing = writer.write(NOTHING, detected(Emphysema=0.1, Lung_nodule=0.2, Cardiomegaly=0.1))
    assert nothing["impression"] == "No finding reaches its threshold."
    assert "No emphysema." in nothing["findings"]


def test_every_label_has_a_sentence_that_states_it_and_one_that_denies_it() -> None:
    writer = TemplateWriter(load_labels("ct_rate_18").names, [load_prompts("report_style")], CLEANER)
    for (name, present, _), text in writer.sentences.items():
        read = {(f.label, f.status.value, f.side) for one in CLEANER.clean(text) for f in one.findings}
        assert read == {(name, "present" if present else "absent", "")}, text


def test_a_scan_is_drafted_from_python_and_as_a_command(
    clinic: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = ctclip.load(clinic.model)
    head = model.head("prompts")
    line = Line(1.0, 3.0, 0.5, 10, 40)
    head.calibration = Calibration("platt", "valid", model.folder.hash, {"Nodule": line, "Effusion": Line(1.0, -3.0, 0.5, 10, 40)})  # fmt: skip
    drafted = model.draft(clinic.scan, expect="any")
    assert drafted.method == "template"
    claims = [claim for one in drafted.sections["findings"] for claim in one.claims]
    assert [(claim.finding, claim.status.value) for claim in claims] == [("Nodule", "present"), ("Effusion", "absent")]
    probabilities = model.detect(clinic.scan, expect="any").probabilities
    assert claims[0].probability == pytest.approx(probabilities["Nodule"], abs=1e-5)
    assert claims[1].probability == pytest.approx(1 - probabilities["Effusion"], abs=1e-5)
    place = model.explain(clinic.scan, "Nodule", expect="any")["Nodule"]
    assert claims[0].place is not None
    assert claims[0].place.peak_lps == place.peak_lps
    assert claims[1].place is None
    for name in ("draft.json", "draft.txt"):
        words = ["draft", str(clinic.scan), "--model", str(clinic.model), "--expect", "any", "-o", str(tmp_path / name)]
        assert main(words) == 0
    assert "FINDINGS" in (tmp_path / "draft.txt").read_text()
    facts = json.loads((tmp_path / "draft.json").read_text())
    assert (facts["kind"], facts["method"], facts["model"]) == ("ctclip draft", "template", model.folder.hash)
    assert {"text", "claims", "denied"} == set(facts["findings"][0])
    assert "is not calibrated" in capsys.readouterr().out


def test_a_store_is_drafted_from_the_nearest_report(clinic: Clinic, tmp_path: Path) -> None:
    loaded = ctclip.load(clinic.model)
    rows = pd.read_parquet(clinic.store / "cohort.parquet").iloc[:3].assign(findings=["", "A nodule.", "No nodule."])
    rows.loc[0, "impression"] = "Not given."
    store = VolumeStore(clinic.store)
    vectors = np.concatenate([
        loaded.encode_volume(torch.from_numpy(store.voxels(name))[None, None]).numpy() for name in rows["volume"]
    ])  # fmt: skip
    index = Index.build(rows, vectors, None, loaded.folder.hash)
    (tmp_path / "index").mkdir()
    index.save(tmp_path / "index")
    given = ["draft", "--model", str(clinic.model), "--store", str(clinic.store), "--index", str(tmp_path / "index")]
    assert main([*given, "--split", "train", "--count", "3", "-o", str(tmp_path / "drafts.csv")]) == 0
    table = pd.read_csv(tmp_path / "drafts.csv", keep_default_na=False)
    assert table["method"].tolist() == ["retrieval"] * 3
    assert table["findings"].tolist()[1:] == ["A nodule.", "No nodule."]
    assert table["findings"][0], "the nearest has no report, so the next one is taken"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "retrieval"), "give --index"),
        (("--method", "caption"), "has no caption head (it has: none)"),
        (("--head", "prompts"), "no caption head 'prompts'"),
        (("--detector", "nothing"), "no head 'nothing' (it has: prompts)"),
        (("--method", "poetry"), "no method 'poetry': give one of caption, retrieval, template"),
        (("--beams", "2", "--nucleus", "0.9"), "either --beams or --nucleus"),
        (("--index", "nowhere"), "nowhere: not a readable index"),
        (("--index", "i", "--method", "template"), "an index applies only to --method retrieval, not to template"),
        (("--index", "i", "--beams", "2"), "apply only to --method caption, not to retrieval"),
        (("--prompted", "--method", "template"), "apply only to --method caption, not to template"),
        (("--beams", "2"), "has no caption head"),
        (("--output", "draft.pdf"), "end the name in .json or .txt"),
        (("--store", "s"), "give either a scan or --store"),
    ],
)
def test_bad_options_are_one_line(
    words: tuple[str, ...], message: str, clinic_files: Clinic, capsys: pytest.CaptureFixture
) -> None:
    assert main(["draft", str(clinic_files.scan), "--model", str(clinic_files.model), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
