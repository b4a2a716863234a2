"""Closed questions: what they ask, and answers by matching prompts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctclip.errors import PromptError
from ctclip.heads.prompts import PromptHead
from ctclip.inference.ask import NO, YES, Respondent
from ctclip.inference.sides import mapped_sides
from ctclip.labels import load_labels
from ctclip.prompts import load_prompts
from ctclip.report_reading.questions import Kind, Question, Questioner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from tests.unit.small import dual_encoder

QUESTIONER = Questioner(RulesReader.build(load_labels("ct_rate_18"), Options()))


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Is there a pleural effusion?", Question("Pleural effusion", Kind.present)),
        ("Is there a pleural effusion on the left?", Question("Pleural effusion", Kind.present, "left")),
        ("Are there nodules in the right upper lobe?", Question("Lung nodule", Kind.present, "right", "upper")),
        ("Is bilateral atelectasis seen?", Question("Atelectasis", Kind.present, "both")),
        ("On which side is the pleural effusion?", Question("Pleural effusion", Kind.side)),
        ("Is the consolidation on the left or right?", Question("Consolidation", Kind.side)),
        ("In which lobe is the consolidation?", Question("Consolidation", Kind.lobe)),
        ("How large is the nodule?", Question("Lung nodule", Kind.size)),
        ("Is the heart size increased?", Question("Cardiomegaly", Kind.present)),
    ],
)
def test_what_a_question_asks(text: str, question: Question) -> None:
    assert QUESTIONER.question(text) == question


@pytest.mark.parametrize("text", ["Is the patient well?", "Is there a nodule or a consolidation?", ""])
def test_a_question_about_no_label_or_several_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PromptError, match="names") as refused:
        QUESTIONER.question(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "Is the chest free of emphysema?",
        "Is there no pleural effusion?",
        "Is the emphysema absent?",
        "Is pleural effusion not seen?",
    ],
)
def test_a_negated_question_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PromptError, match="is negated; ask whether the finding is present"):
        QUESTIONER.question(text)


@pytest.mark.parametrize(
    "text",
    [
        "Is the pleural effusion gone?", "Has the pleural effusion changed?", "Is the pleural effusion severe?", "Where is the nodule?",
        "How many nodules are there?", "Is there a nodule larger than 8 mm?", "Is there a new consolidation?", "Why is there atelectasis?",
    ],
)  # fmt: skip
def test_a_question_about_more_than_presence_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PromptError, match="is not only about presence"):
        QUESTIONER.question(text)


def test_the_answer_is_the_one_whose_prompts_are_nearest() -> None:
    model = dual_encoder()
    head = PromptHead(model, load_prompts("report_style"))
    respondent = Respondent(model, head, QUESTIONER)
    with torch.no_grad():
        for name, prompts in QUESTIONER.answers("Pleural effusion", Kind.side).items():
            vector = F.normalize(model.encode_text(prompts).mean(dim=0), dim=0)
            answer = respondent.answer("On which side is the pleural effusion?", vector)
            assert answer.answer == name
            assert sum(answer.probabilities.values()) == pytest.approx(1)
        place = head.names.index("Pleural effusion")
        for vector, wanted in ((head.positive[place], YES), (head.negative[place], NO)):
            assert respondent.answer("Is there a pleural effusion?", vector).answer == wanted


def test_a_finding_on_the_other_side_is_denied() -> None:
    """A volume with the highest similarity to "on the left": yes for left, no for right, yes for both."""
    model = dual_encoder()
    respondent = Respondent(model, PromptHead(model, load_prompts("report_style")), QUESTIONER)
    shares = {"left": 0.7, "right": 0.1, "both": 0.2}
    respondent._choice = lambda label, kind, embedding, sides: shares  # type: ignore[method-assign]
    respondent.head.probabilities = lambda scores: torch.full((1, 18), 0.9)  # type: ignore[method-assign]
    ask = lambda side: respondent.answer(f"Is there a pleural effusion on the {side}?", torch.zeros(12)).answer  # noqa: E731
    assert (ask("left"), ask("right")) == (YES, NO)
    shares.update(left=0.2, right=0.1, both=0.7)
    assert (ask("left"), ask("right")) == (YES, YES)
    respondent.head.probabilities = lambda scores: torch.full((1, 18), 0.2)  # type: ignore[method-assign]
    assert (ask("left"), ask("right")) == (NO, NO)


def test_the_sides_of_a_map_replace_those_of_the_prompts() -> None:
    model = dual_encoder()
    respondent = Respondent(model, PromptHead(model, load_prompts("report_style")), QUESTIONER)
    respondent.head.probabilities = lambda scores: torch.full((1, 18), 0.9)  # type: ignore[method-assign]
    vector = F.normalize(torch.ones(model.config.dim), dim=0)

    def answer(text: str, shares: dict[str, float]) -> str:
        return respondent.answer_question(
            QUESTIONER.question(text), vector, {"Pleural effusion": shares}.__getitem__
        ).answer

    side, on_the_right = "On which side is the pleural effusion?", "Is there a pleural effusion on the right?"
    assert answer(side, {"left": 0.8, "right": 0.0, "both": 0.2}) == "left"
    assert answer(on_the_right, {"left": 0.8, "right": 0.0, "both": 0.2}) == NO
    assert answer(on_the_right, {"left": 0.4, "right": 0.0, "both": 0.6}) == YES
    # Without a map, or in a language with other names for its sides, prompts decide.
    known = respondent.answer(side, vector)
    for unused in ({}, {"links": 0.9, "rechts": 0.0, "both": 0.1}):
        assert respondent.answer_question(QUESTIONER.question(side), vector, {"Pleural effusion": unused}.get) == known


def test_the_stronger_half_of_a_map_is_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dual_encoder()
    peaks: dict[str, float] = {}
    maps = SimpleNamespace(values=[None], affine=None)
    monkeypatch.setattr("ctclip.inference.sides.method", lambda name: SimpleNamespace(maps=lambda subject: maps))
    monkeypatch.setattr("ctclip.inference.sides.by_side", lambda *given: peaks)
    ready = SimpleNamespace(voxels=np.zeros((2, 2, 2), np.float32))
    sides = mapped_sides(model, PromptHead(model, load_prompts("report_style")), None, ready)  # type: ignore[arg-type]
    for given, wanted in (
        ({"right": 1.0, "left": 4.0}, {"left": 0.75, "right": 0.0, "both": 0.25}),
        ({"right": 2.0, "left": 1.5}, {"right": 0.25, "left": 0.0, "both": 0.75}),
        ({"right": 2.0, "left": -1.0}, {"right": 1.0, "left": 0.0, "both": 0.0}),
        ({"right": 0.0, "left": 0.0}, {}), ({}, {}),
    ):  # fmt: skip
        peaks.clear()
        peaks.update(given)
        assert sides("Pleural effusion") == wanted


def test_a_finding_that_the_head_does_not_score_has_no_map() -> None:
    model = dual_encoder()
    sides = mapped_sides(model, PromptHead(model, load_prompts("report_style"), ["Emphysema"]), None, None)  # type: ignore[arg-type]
    assert sides("Pleural effusion") == {}
