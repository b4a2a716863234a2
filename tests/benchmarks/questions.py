"""Closed questions about phantoms, answered by a model and from the text of the question alone: ``python -m
tests.benchmarks.questions``.

``--cohort``: the folder of the phantom cohort (its ``phantom/*.json`` hold the truth); ``--embeddings``: the embeddings
of its validation volumes by ``ctclip zero-shot``; ``--model``: the model folder. Half of the patients set thresholds,
the others are asked about.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from ctclip.evaluation.tables import read_embeddings
from ctclip.heads.folder import load_head
from ctclip.heads.locator import LocateHead
from ctclip.heads.prompts import PromptHead
from ctclip.inference.ask import NO, YES, Respondent
from ctclip.inference.model import asking
from ctclip.inference.sides import Sides, mapped_sides
from ctclip.models.folder import ModelFolder, load_model
from ctclip.phantom.prevalence import FINDINGS
from ctclip.preprocessing import prepare
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.progress import track
from ctclip.report_reading.questions import Kind, Question, Questioner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from tests.benchmarks.common import machine, table

SIDED = ("Pleural effusion", "Lung opacity", "Consolidation", "Atelectasis", "Bronchiectasis", "Pulmonary fibrotic sequela", "Lung nodule")  # fmt: skip
OPPOSITE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Item:
    """A question about one volume, and its true answer."""

    volume: int
    question: Question
    answer: str


def truths(cohort: Path, volumes: list[str]) -> list[dict[str, dict[str, object]]]:
    """The true findings of each volume."""
    drawn = {}
    for path in (cohort / "phantom").rglob("*.json"):
        facts = json.loads(path.read_text())
        details = {detail["finding"]: detail for detail in facts["findings"]}
        for row in facts["metadata"]:
            drawn[row["VolumeName"].removesuffix(".nii.gz")] = details
    return [drawn[name] for name in volumes]


def items(drawn: list[dict[str, dict[str, object]]], rows: list[int], count: int, seed: int = 0) -> list[Item]:
    """About ``count`` questions about ``rows``, balanced over answers for each kind and finding."""
    random = np.random.default_rng(seed)
    pools: dict[tuple[str, ...], dict[str, list[Item]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name in FINDINGS:
            detail = drawn[row].get(name)
            pools["present", name][YES if detail else NO].append(
                Item(row, Question(name, Kind.present), YES if detail else NO)
            )
            if name in SIDED and detail and detail["side"] in OPPOSITE:
                side = str(detail["side"])
                # The side decides the answer: the finding is present in both cases.
                pools["present on a side", name, side][YES].append(Item(row, Question(name, Kind.present, side), YES))
                other = OPPOSITE[side]
                pools["present on a side", name, other][NO].append(Item(row, Question(name, Kind.present, other), NO))
                pools["side", name][side].append(Item(row, Question(name, Kind.side), side))
            if name in SIDED and detail and detail["side"] == "both":
                pools["side", name]["both"].append(Item(row, Question(name, Kind.side), "both"))
            if name in SIDED and detail and detail["lobe"] in ("upper", "lower"):
                pools["lobe", name][str(detail["lobe"])].append(
                    Item(row, Question(name, Kind.lobe), str(detail["lobe"]))
                )
    each = max(count // (2 * len(pools)), 1)
    chosen: list[Item] = []
    for answers in pools.values():
        most = min(each, *(len(pool) for pool in answers.values())) if len(answers) > 1 else 0
        for pool in answers.values():
            chosen += [pool[i] for i in random.permutation(len(pool))[:most]]
    return chosen


def text_only(chosen: list[Item], others: list[Item]) -> float:
    """Accuracy of the most frequent answer of ``others`` to the same question."""
    counts: dict[Question, Counter[str]] = defaultdict(Counter)
    for item in others:
        counts[item.question][item.answer] += 1
    guesses = [counts[item.question].most_common(1)[0][0] if counts[item.question] else YES for item in chosen]
    return float(np.mean([guess == item.answer for guess, item in zip(guesses, chosen, strict=True)]))


def chance(chosen: list[Item]) -> float:
    """Accuracy of a random answer."""
    answers: dict[Question, set[str]] = defaultdict(set)
    for item in chosen:
        answers[item.question].add(item.answer)
    return float(np.mean([1 / len(answers[item.question]) for item in chosen]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("cohort", "embeddings", "model"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument(
        "--locate", action="store_true", help="let the model's locator decide sides, as `ctclip ask` does"
    )
    given = parser.parse_args()
    arrays = read_embeddings(given.embeddings)
    volumes = [str(name) for name in arrays["volume"]]
    vectors = torch.from_numpy(arrays["volume_embedding"].copy())
    drawn = truths(given.cohort, volumes)
    folder = load_model(str(given.model))
    head = asking(folder, given.prompts or folder.labels.prompts or "report_style", list(FINDINGS))
    patients = [name.rsplit("_", 2)[0] for name in volumes]
    half = {patient: number % 2 for number, patient in enumerate(sorted(set(patients)))}
    first, second = ([row for row, patient in enumerate(patients) if half[patient] == n] for n in (0, 1))
    scores = head.probabilities(head.score_embeddings(vectors)).detach().float().numpy()
    truth = np.array([[name in facts for name in FINDINGS] for facts in drawn])
    thresholds = [best_threshold(scores[first, i], truth[first, i]) for i in range(len(FINDINGS))]
    aurocs = {name: float(roc_auc_score(truth[second, i], scores[second, i])) for i, name in enumerate(FINDINGS)}
    respondent = Respondent(
        folder.model, Thresholded(head, thresholds), Questioner(RulesReader.build(folder.labels, Options()))
    )
    chosen, others = items(drawn, second, given.count), items(drawn, first, given.count)
    located = sides_of(given, folder, head, [volumes[i.volume] for i in chosen]) if given.locate else {}
    right = [
        respondent.answer_question(i.question, vectors[i.volume], located.get(volumes[i.volume])).answer == i.answer
        for i in chosen
    ]
    rows = []
    for title, wanted in (("all", FINDINGS), ("AUROC above 0.9", [n for n in FINDINGS if aurocs[n] > 0.9])):
        for kind in (None, "yes or no", "yes or no, with a side", "side", "lobe"):
            mine = [
                n for n, i in enumerate(chosen) if i.question.label in wanted and kind in (None, kind_of(i.question))
            ]
            if mine:
                part = [chosen[n] for n in mine]
                figures = (np.mean([right[n] for n in mine]), text_only(part, others), chance(part))
                rows.append([title, kind or "all", str(len(mine)), *(f"{value:.3f}" for value in figures)])
    print(machine())
    print(table("Questions", ["findings", "kind", "questions", "accuracy", "text alone", "chance"], rows))


def sides_of(given: argparse.Namespace, folder: ModelFolder, head: PromptHead, names: list[str]) -> dict[str, Sides]:
    """What the maps of the model's locator say about the sides of findings, for each volume."""
    located = load_head(folder.path, "locate", folder.model)
    assert isinstance(located, LocateHead)
    files, found = read_cohort(given.cohort).files, {}
    for name in track(sorted(set(names)), len(set(names)), "mapping", "scans"):
        sides = mapped_sides(folder.model, head, located.locator, prepare(files[name], folder.spec))
        found[name] = {label: sides(label) for label in SIDED}.__getitem__
    return found


class Thresholded(PromptHead):
    """A prompt head with its own thresholds."""

    def __init__(self, head: PromptHead, values: list[float]) -> None:
        self.__dict__.update(head.__dict__)
        self.values_by_name = dict(zip(head.names, values, strict=True))

    def thresholds(self) -> dict[str, float]:
        return self.values_by_name


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the highest balanced accuracy."""
    candidates = np.quantile(scores, np.linspace(0.01, 0.99, 99))
    balanced = [((scores[truth] >= c).mean() + (scores[~truth] < c).mean()) / 2 for c in candidates]
    return float(candidates[int(np.argmax(balanced))])


def kind_of(question: Question) -> str:
    if question.kind is not Kind.present:
        return question.kind.value
    return "yes or no, with a side" if question.side else "yes or no"


if __name__ == "__main__":
    main()
