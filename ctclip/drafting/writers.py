"""Three ways to write a report: from the detector's findings, by copying the report of the nearest scan, and with a
caption head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import torch

from ctclip.drafting.agree import agree
from ctclip.errors import DataError
from ctclip.heads.caption import CaptionHead, Decoding
from ctclip.heads.folder import FOLDER, list_heads
from ctclip.heads.head import Head
from ctclip.heads.prompts import PromptHead
from ctclip.inference.index import Index
from ctclip.models.encoded import Encoded
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.no_report import report_text
from ctclip.prompts import PromptSet, load_prompts
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.questions import Kind, Questioner
from ctclip.report_reading.reader import Status

SECTIONS = ("findings", "impression")
NOTHING = "No finding reaches its threshold."
# Number of nearest scans that are searched for one with a report.
DEPTH = 20


@dataclass(frozen=True)
class Detected:
    """A detector's result for one volume: the probability of each finding, whether it reaches its threshold (0.5
    without a calibration), and the side of each finding whose side is certain if it is present."""

    probabilities: Mapping[str, float]
    present: Mapping[str, bool]
    sides: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    @torch.inference_mode()
    def by(cls, detector: Head, encoded: Encoded) -> list[Detected]:
        """The result for each volume of ``encoded``."""
        values = detector.probabilities(detector.score(encoded).float()).tolist()
        thresholds = detector.thresholds()
        every = []
        for each in values:
            probabilities = dict(zip(detector.names, each, strict=True))
            present = {name: p >= thresholds.get(name, 0.5) for name, p in probabilities.items()}
            every.append(cls(probabilities, present))
        return every

    def findings(self) -> list[str]:
        """The findings that reach their threshold, in the order of the detector."""
        return [name for name, there in self.present.items() if there]


class Writer(ABC):
    """Writes the sections of a report."""

    @abstractmethod
    def write(self, encoded: Encoded, detected: Detected) -> dict[str, str]:
        """The text of each of ``SECTIONS``. encoded: one volume."""

    def write_all(self, encoded: Encoded, detected: Sequence[Detected]) -> list[dict[str, str]]:
        """Like ``write``, for several volumes."""
        return [self.write(encoded.one(number), each) for number, each in enumerate(detected)]


class TemplateWriter(Writer):
    """Writes one sentence for each finding of the detector: present findings first, then absent ones.

    A phrasing is used only if it makes no other claim: no other finding, no lobe or size, which the detector does not
    determine, and no side but a certain one.
    """

    def __init__(self, names: Sequence[str], prompts: Sequence[PromptSet], cleaner: Cleaner) -> None:
        """``names``: findings; ``prompts``: sets of phrasings, in order of preference."""
        self.names = tuple(names)
        sets = [*prompts, load_prompts("generic")]
        self.sentences = {
            (name, present, section): _phrasing(name, present, section, sets, cleaner)
            for name in names
            for present in (True, False)
            for section in SECTIONS
        }
        self.sided = _sided(names, cleaner)

    def write(self, encoded: Encoded, detected: Detected) -> dict[str, str]:
        present = [name for name in self.names if detected.present.get(name)]
        absent = [name for name in self.names if not detected.present.get(name)]
        findings = [self.present(name, "findings", detected.sides) for name in present]
        findings += [self.sentences[name, False, "findings"] for name in absent]
        impression = [self.present(name, "impression", detected.sides) for name in present] or [NOTHING]
        return {"findings": " ".join(findings), "impression": " ".join(impression)}

    def present(self, name: str, section: str, sides: Mapping[str, str]) -> str:
        """The sentence that a finding is present, on its side if that is certain."""
        return self.sided.get((name, sides.get(name, "")), self.sentences[name, True, section])


class RetrievalWriter(Writer):
    """Copies the report of the nearest scan of an index: the baseline that every other method must beat."""

    def __init__(self, index: Index, but: str | None = None) -> None:
        """``but``: a patient whose own reports are not copied."""
        self.index, self.but = index, but

    def nearest(self, encoded: Encoded) -> tuple[str, float, dict[str, str]]:
        """The nearest volume that has a report, its cosine similarity, and the text of each section. Raises DataError."""
        assert encoded.embedding is not None
        near = self.index.similar(encoded.embedding[0].float().cpu().numpy(), DEPTH)
        for row in near.to_dict("records"):
            report = {section: report_text(row[section]) for section in SECTIONS}
            if any(report.values()) and str(row["patient"]) != self.but:
                return str(row["volume"]), float(row["similarity"]), report
        raise DataError("none of the nearest scans of the index has a report; index a store with reports")

    def write(self, encoded: Encoded, detected: Detected) -> dict[str, str]:
        return self.nearest(encoded)[2]


class CaptionWriter(Writer):
    """Writes with a caption head, which is prompted with the detector's findings if ``prompted``, else with those of
    its plan."""

    def __init__(
        self,
        head: CaptionHead,
        decoding: Decoding,
        template: TemplateWriter,
        cleaner: Cleaner,
        *,
        prompted: bool = False,
    ) -> None:
        """``template`` adds findings that the decoder omits. Raises DataError if ``prompted`` and the head was not
        trained with prompts of findings."""
        if prompted and not head.prompted:
            raise DataError(
                "this caption head was not trained with findings to write about; leave out --prompted, or train one with "
                "`ctclip adapt --method caption`"
            )
        self.head, self.decoding, self.prompted = head, decoding, prompted
        self.template, self.cleaner = template, cleaner

    @classmethod
    def of(
        cls,
        folder: ModelFolder,
        detector: Head,
        head: CaptionHead,
        decoding: Decoding,
        cleaner: Cleaner,
        *,
        prompted: bool = False,
    ) -> CaptionWriter:
        """A writer whose template uses the prompts of the model."""
        names = tuple(dict.fromkeys((*head.names, *detector.names)))
        template = TemplateWriter(names, known_prompts(folder, detector), cleaner)
        return cls(head, decoding, template, cleaner, prompted=prompted)

    def write(self, encoded: Encoded, detected: Detected) -> dict[str, str]:
        return self.write_all(encoded, [detected])[0]

    def write_all(self, encoded: Encoded, detected: Sequence[Detected]) -> list[dict[str, str]]:
        findings: list[list[str]] | None = [one.findings() for one in detected] if self.prompted else None
        written = self.head.write(encoded, self.decoding, findings)
        planned = self.head.planned(encoded)
        if planned is None:
            return written
        return [
            agree(text, stated if own is None else own, {**sides, **one.sides}, self.cleaner, self.template)
            for text, own, (stated, sides), one in zip(
                written, findings or repeat(None, len(written)), planned, detected, strict=True
            )
        ]


def known_prompts(folder: ModelFolder, detector: Head) -> list[PromptSet]:
    """The prompt sets of a model: mined ones (in the words of reports) first, then those of the detector and of its
    label set."""
    heads = [head.name for head in list_heads(folder.path) if head.kind == PromptHead.kind]
    files = [folder.path / FOLDER / name / "prompts.yaml" for name in heads]
    sets = [load_prompts(path) for path in files if path.is_file()]
    if isinstance(detector, PromptHead):
        sets.append(detector.prompts)
    if folder.labels.prompts:
        sets.append(load_prompts(folder.labels.prompts))
    return sorted(sets, key=lambda prompts: not prompts.provenance)


def _phrasing(name: str, present: bool, section: str, sets: Sequence[PromptSet], cleaner: Cleaner) -> str:
    """The most frequent phrasing that makes exactly this claim, from the first set that has one."""
    status = Status.present if present else Status.absent
    fallback = ""
    for prompts in sets:
        if name not in prompts.abnormalities and prompts.templates is None:
            continue
        pair = prompts.pair(name)
        for part in (section, *SECTIONS):
            for text in _by_weight(pair.groups(present, [part]), pair.weights(present, [part])):
                fallback = text
                if _claims_only(text, name, status, cleaner):
                    return text
    return fallback


def _sided(names: Sequence[str], cleaner: Cleaner) -> dict[tuple[str, str], str]:
    """A sentence for each finding on each side, of those of the language that claim exactly this."""
    if not cleaner.language.questions.sides:
        return {}
    questioner, sided = Questioner(cleaner.reader), {}
    for name in names:
        for side, texts in questioner.answers(name, Kind.side).items():
            fitting = [text for text in texts if _claims_only(text, name, Status.present, cleaner, side)]
            if fitting:
                sided[name, side] = fitting[0]
    return sided


def _by_weight(groups: Sequence[Sequence[str]], weights: Sequence[Sequence[float]]) -> list[str]:
    pairs = [pair for texts, shares in zip(groups, weights, strict=True) for pair in zip(texts, shares, strict=True)]
    return [text for text, _ in sorted(pairs, key=lambda pair: -pair[1])]


def _claims_only(text: str, name: str, status: Status, cleaner: Cleaner, side: str = "") -> bool:
    sentences = cleaner.clean(text)
    findings = [finding for sentence in sentences for finding in sentence.findings]
    return bool(findings) and all(
        finding.label == name and finding.status is status and finding.side == side and not (finding.lobe or finding.size_mm)
        for finding in findings
    ) and not any(sentence.comparison for sentence in sentences)  # fmt: skip


def check_index(path: Path | None) -> Path:
    """Raise DataError if the method `retrieval` has no index."""
    if path is None:
        raise DataError(
            "the method retrieval copies the report of the nearest scan: give --index, written by `ctclip index`"
        )
    return path
