"""Answer closed questions by comparing the volume with a prompt for each answer (as for BiomedCLIP; Zhang et al. 2023).

The prompt pair of a finding decides whether it is present; the nearest prompts decide its side, lobe and size. If the
model has a locator, its map of the finding decides the side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.heads.prompts import PromptHead
from ctclip.inference.sides import Sides
from ctclip.models.dual_encoder import DualEncoder
from ctclip.report_reading.findings import BOTH
from ctclip.report_reading.questions import Kind, Question, Questioner

YES, NO = "yes", "no"


@dataclass(frozen=True)
class Answer:
    """The most likely answer, and the probability of each answer; these sum to 1."""

    question: Question
    answer: str
    probabilities: dict[str, float]


class Respondent:
    """Answers questions about embedded volumes; prompts are encoded once."""

    def __init__(self, model: DualEncoder, head: PromptHead, questioner: Questioner) -> None:
        """``head``: scores the labels in question."""
        self.model, self.head, self.questioner = model, head, questioner
        self._vectors: dict[tuple[str, Kind], tuple[list[str], Tensor]] = {}

    def answer(self, text: str, embedding: Tensor) -> Answer:
        """``embedding``: the unit vector (dim,) of a volume. Raises PromptError if the question is not understood."""
        return self.answer_question(self.questioner.question(text), embedding)

    @torch.inference_mode()
    def answer_question(self, question: Question, embedding: Tensor, sides: Sides | None = None) -> Answer:
        """The answer to a parsed question. ``sides``: the sides of a finding in this volume, such as ``mapped_sides``; if
        None, or empty for a finding, prompts decide."""
        if question.kind is Kind.present:
            probabilities = self._present(question, embedding, sides)
        else:
            probabilities = self._choice(question.label, question.kind, embedding, sides)
        return Answer(question, max(probabilities, key=lambda name: probabilities[name]), probabilities)

    def _present(self, question: Question, embedding: Tensor, sides: Sides | None) -> dict[str, float]:
        """Yes if the finding is present and in the stated location: the lower of the two probabilities. A calibrated
        threshold counts as one half."""
        place = self.head.names.index(question.label)
        score = self.head.probabilities(self.head.score_embeddings(embedding[None]))[0, place]
        threshold = (self.head.thresholds() or {}).get(question.label, 0.5)
        yes = _about(float(score), threshold)
        if question.side:
            # A finding on both sides is also on this side.
            shares = self._choice(question.label, Kind.side, embedding, sides)
            yes = min(yes, _against(shares, question.side, also=BOTH))
        if question.lobe:
            yes = min(yes, _against(self._choice(question.label, Kind.lobe, embedding), question.lobe))
        return {YES: yes, NO: 1 - yes}

    def _choice(self, label: str, kind: Kind, embedding: Tensor, sides: Sides | None = None) -> dict[str, float]:
        seen = sides(label) if kind is Kind.side and sides is not None else {}
        # A language may have other names for its sides.
        if seen and seen.keys() == self.questioner.answers(label, kind).keys():
            return seen
        names, vectors = self._encoded(label, kind)
        shares = self.model.logits(embedding[None], vectors)[0].float().softmax(dim=0)
        return dict(zip(names, shares.tolist(), strict=True))

    def _encoded(self, label: str, kind: Kind) -> tuple[list[str], Tensor]:
        """The names of the answers, and their unit vectors (answers, dim), each the mean of its prompts."""
        if (label, kind) not in self._vectors:
            answers = self.questioner.answers(label, kind)
            vectors = self.model.encode_text([text for texts in answers.values() for text in texts])
            means = [part.mean(dim=0) for part in vectors.split([len(texts) for texts in answers.values()])]
            self._vectors[label, kind] = (list(answers), F.normalize(torch.stack(means), dim=-1))
        return self._vectors[label, kind]


def _against(shares: dict[str, float], name: str, also: str = "") -> float:
    """The probability of ``name`` (or ``also``) against the most likely other answer."""
    ours = max(shares[name], shares.get(also, 0.0))
    others = max(share for other, share in shares.items() if other not in (name, also))
    return ours / (ours + others)


def _about(score: float, threshold: float) -> float:
    """A probability shifted so that the threshold becomes one half."""
    if score < threshold:
        return 0.5 * score / threshold
    return 0.5 + 0.5 * (score - threshold) / max(1 - threshold, 1e-6)
