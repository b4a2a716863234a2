"""Mined phrasings are used only for findings whose reports they separate better."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ctclip.inference import choose_prompts as module
from ctclip.inference.choose_prompts import choose_prompts
from ctclip.labels import load_labels
from ctclip.prompts import Pair, PromptSet
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader

READER = RulesReader.build(load_labels("ct_rate_18"), Options())
WORDS = ("nodule", "emphysema", "port")
NAMES = ("Medical material", "Lung nodule", "Emphysema")


class Words:
    """Embed a text by its words, negated or not."""

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([
            [(-1.0 if f"no {word}" in text.lower() else 1.0) * (word in text.lower()) for word in WORDS] for text in texts
        ])  # fmt: skip


def vectors(model: Any, prompts: PromptSet, names: Any) -> tuple[torch.Tensor, torch.Tensor]:
    positive, negative = ([prompts.side(name, there)[0] for name in names] for there in (True, False))
    return model.encode_text(positive), model.encode_text(negative)


def prompts_of(name: str, *words: str) -> PromptSet:
    pairs = {
        label: Pair(positive={"findings": (f"{word}.",)}, negative={"findings": (f"No {word}.",)})
        for label, word in zip(NAMES, words, strict=True)
    }
    return PromptSet(name=name, abnormalities=pairs, provenance={"split": "train"} if name == "mined" else {})


def test_only_what_tells_reports_apart_better_is_mined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pair_vectors", vectors)
    written = prompts_of("written", "medical material", "nodule", "emphysema")
    mined = prompts_of("mined", "port catheter", "nodule is seen", "emphysema is seen")
    texts = ["There is a port catheter. A nodule is seen.", "No port catheter is seen. No nodule is seen."] * 6
    chosen = choose_prompts(Words(), mined, written, texts, READER, "split calibration")  # type: ignore[arg-type]
    assert chosen.mined == ("Medical material",)
    assert chosen.auroc["Medical material"] == (0.5, 1.0)
    assert chosen.auroc["Lung nodule"] == (1.0, 1.0)
    assert all(map(math.isnan, chosen.auroc["Emphysema"])), "no report states it"
    assert chosen.prompts.pair("Medical material") == mined.pair("Medical material")
    for name in ("Lung nodule", "Emphysema"):
        assert chosen.prompts.pair(name) == written.pair(name)
    assert chosen.prompts.provenance["split"] == "train"
    assert chosen.prompts.provenance["mined"] == "Medical material"
    assert "12 reports of split calibration" in chosen.prompts.provenance["chosen"]
