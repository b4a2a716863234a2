"""Prompts mined from reports: counted, weighted, without labels of volumes; and weighted prompts in a head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ctclip.errors import DataError, PromptError
from ctclip.heads.prompts import pair_vectors
from ctclip.labels import load_labels
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.prompts import Pair, PromptSet, load_prompts
from ctclip.report_reading.mine import _commonest, count_phrasings, save_prompts
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from tests.unit.small import dual_encoder

READER = RulesReader.build(load_labels("ct_rate_18"), Options())


def test_sentences_of_one_label_are_counted_without_their_numbers() -> None:
    findings = [
        "A pacemaker is seen. A nodule of 7 mm is seen. No pleural effusion is seen.",
        "A pacemaker is seen. A nodule of 12 mm is seen. Nodule and consolidation.",
        "A pacemaker is seen. A pacemaker is seen. Possible consolidation. The trachea is open.",
    ]
    counts = count_phrasings({"findings": findings, "impression": ["", "Pacemaker.", "Pacemaker."]}, READER)
    assert counts == {
        ("Medical material", True, "findings"): {"a pacemaker is seen.": {"A pacemaker is seen.": 3}},
        ("Lung nodule", True, "findings"): {
            "a nodule of 0 mm is seen.": {"A nodule of 7 mm is seen.": 1, "A nodule of 12 mm is seen.": 1}
        },
        ("Pleural effusion", False, "findings"): {"no pleural effusion is seen.": {"No pleural effusion is seen.": 1}},
        ("Medical material", True, "impression"): {"pacemaker.": {"Pacemaker.": 2}},
    }
    phrasings, weights = _commonest(counts, "Medical material", True, most=5, least=2)
    assert phrasings == {"findings": ("A pacemaker is seen.",), "impression": ("Pacemaker.",)}
    assert weights == {"findings": (3.0,), "impression": (2.0,)}
    assert _commonest(counts, "Pleural effusion", False, most=5, least=2) == ({}, {})


def test_phrasings_weigh_what_they_are_given() -> None:
    model = dual_encoder()
    texts = ("A nodule lies in the upper lobe.", "The heart is enlarged.")
    pair = {"positive": {"findings": texts}, "negative": {"findings": ["There is no effusion."]}}
    plain = PromptSet.model_validate({"name": "p", "abnormalities": {"x": pair}})
    weighted = PromptSet.model_validate(
        {"name": "p", "abnormalities": {"x": {**pair, "positive_weights": {"findings": [3, 1]}}}}
    )
    vectors = model.encode_text(list(texts))
    for prompts, shares in ((plain, (0.5, 0.5)), (weighted, (0.75, 0.25))):
        positive, _ = pair_vectors(model, prompts, ["x"])
        wanted = F.normalize(shares[0] * vectors[0] + shares[1] * vectors[1], dim=-1)
        torch.testing.assert_close(positive[0], wanted)
    assert plain.identity() != weighted.identity()


def test_identities_of_sets_without_weights_are_what_they_were() -> None:
    """Calibrations and prediction tables of earlier versions name them."""
    named = ("report_style", "graded", "generic", "published")
    assert [load_prompts(name).identity() for name in named] == [
        "report_style 09f5748c", "graded 8c8d5418", "generic 0f6965f0", "published 8accb2fc",
    ]  # fmt: skip


def test_a_mined_set_survives_its_file(tmp_path: Path) -> None:
    pair = Pair(
        positive={"findings": ("A.", "B: c.")}, negative={"findings": ("No.",)}, positive_weights={"findings": (2, 1)}
    )
    prompts = PromptSet(name="mined", abnormalities={"x": pair}, provenance={"reader": "rules: a, b"})
    save_prompts(prompts, tmp_path / "mined.yaml")
    assert load_prompts(tmp_path / "mined.yaml") == prompts
    save_prompts(prompts, tmp_path / "mined.yaml")
    other = prompts.model_copy(update={"provenance": {"reader": "another"}})
    with pytest.raises(
        PreprocessingError, match="holds other prompts; give another --output, or replace it with --force"
    ):
        save_prompts(other, tmp_path / "mined.yaml")
    assert load_prompts(tmp_path / "mined.yaml") == prompts
    save_prompts(other, tmp_path / "mined.yaml", force=True)
    assert load_prompts(tmp_path / "mined.yaml") == other
    with pytest.raises(DataError, match=r"end the name in \.yaml"):
        save_prompts(prompts, tmp_path / "mined.txt")


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, 2, 3], [1, -1]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    pair = {
        "positive": {"findings": ["a", "b"]},
        "negative": {"findings": ["c"]},
        "positive_weights": {"findings": weights},
    }
    with pytest.raises(PromptError, match="weights of the section 'findings' must be one positive number per phrasing"):
        load_prompts({"name": "p", "abnormalities": {"x": pair}})
