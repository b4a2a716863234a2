"""Mine prompts from training reports: sentences that state each label, and sentences that deny it.

A sentence becomes a phrasing of a label if a reader finds that label in it and no other. Sentences that differ only in
numbers are one phrasing, weighted by its frequency. The labels of volumes are not used.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ctclip.data.dataset import stored_volumes
from ctclip.data.reports import reports_of
from ctclip.errors import DataError
from ctclip.labels import LabelSet
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.no_report import report_text
from ctclip.preprocessing.outputs import check_file, check_same, file_holds
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import Pair, PromptSet
from ctclip.report_reading.reader import Reader, Status
from ctclip.sentences import sentences

SECTIONS = ("findings", "impression")
SIDES = {Status.present: True, Status.absent: False}
# Longer sentences are not used.
LONGEST_WORDS = 40
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# (label, side, section) -> phrasing without its numbers -> counts of its wordings.
Counts = dict[tuple[str, bool, str], dict[str, Counter[str]]]


@dataclass
class Mined:
    """A prompt set; ``kept``: for each label the number of phrasings that state it and that deny it; ``borrowed``:
    sides that no report states by itself, whose phrasings come from another set."""

    prompts: PromptSet
    kept: dict[str, tuple[int, int]]
    borrowed: list[str] = field(default_factory=list)


def mine_prompts(
    store: VolumeStore,
    labels: LabelSet,
    reader: Reader,
    others: PromptSet,
    *,
    split: str = "train",
    name: str = "mined",
    most: int = 24,
    least: int = 2,
) -> Mined:
    """The ``most`` most frequent phrasings of each label, side and section, each found in at least ``least`` scans of a
    split.

    ``others``: the set to borrow from if there is no phrasing of a side. Raises DataError if no report names any label.
    """
    table = stored_volumes(store, split).drop_duplicates("scan")
    reports = reports_of(table, SECTIONS)
    written = {section: [report_text(report.sections.get(section, "")) for report in reports] for section in SECTIONS}
    counts = count_phrasings(written, reader)
    if not counts:
        raise DataError(f"{store.path}: no report of split {split!r} names a label of {labels.name!r} by itself")
    pairs, kept, borrowed = {}, {}, []
    for label in labels.names:
        sides = {side: _commonest(counts, label, side, most, least) for side in (True, False)}
        present, absent = (sum(map(len, sides[side][0].values())) for side in (True, False))
        kept[label] = (present, absent)
        fallback = others.pair(label)
        for side, phrasings in ((True, fallback.positive), (False, fallback.negative)):
            if not sides[side][0]:
                sides[side] = (phrasings, {})
                borrowed.append(f"{label} ({'present' if side else 'absent'})")
        (positive, positive_weights), (negative, negative_weights) = sides[True], sides[False]
        pairs[label] = Pair(
            positive=positive, negative=negative, positive_weights=positive_weights, negative_weights=negative_weights
        )
    provenance = {
        "store": store.path.resolve().name, "split": split, "reports": str(len(table)), "reader": reader.identity,
        "labels": labels.identity, "phrasings": f"at most {most} a side and section, each in at least {least} scans",
        "borrowed": f"{', '.join(borrowed)} from {others.identity()}" if borrowed else "none",
    }  # fmt: skip
    return Mined(PromptSet(name=name, sections=SECTIONS, abnormalities=pairs, provenance=provenance), kept, borrowed)


def count_phrasings(written: dict[str, list[str]], reader: Reader) -> Counts:
    """Count the sentences that state or deny a single label; ``written``: the reports by section."""
    split = {section: [list(dict.fromkeys(sentences(text))) for text in texts] for section, texts in written.items()}
    distinct = list(dict.fromkeys(s for texts in split.values() for text in texts for s in text))
    short = [sentence for sentence in distinct if len(sentence.split()) <= LONGEST_WORDS]
    stated: dict[str, tuple[str, bool]] = {}
    for sentence, reading in zip(short, reader.read(short), strict=True):
        if len(reading) == 1:
            ((label, statement),) = reading.items()
            if statement.status in SIDES:
                stated[sentence] = (label, SIDES[statement.status])
    counts: Counts = {}
    for section, texts in split.items():
        for sentence in (s for text in texts for s in text if s in stated):
            phrasings = counts.setdefault((*stated[sentence], section), {})
            phrasings.setdefault(_without_numbers(sentence), Counter())[sentence] += 1
    return counts


def save_prompts(prompts: PromptSet, path: Path, *, force: bool = False) -> None:
    """Write a prompt set as YAML. Raises PreprocessingError if the file holds other prompts, unless ``force``."""
    check_prompts_file(path, force=force)
    values = prompts.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    check_same(path, text.encode(), "prompts", force=force)
    write_text(path, text)


def check_prompts_file(path: Path, *, force: bool = False) -> None:
    """Raise unless mined prompts may be written to ``path``."""
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(f"{path}: end the name in .yaml")
    check_file(path, file_holds(b"provenance:"), force=force)


def _commonest(
    counts: Counts, label: str, side: bool, most: int, least: int
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[float, ...]]]:
    """Phrasings with their weights by section, the most frequent first, each in its most frequent wording."""
    phrasings, weights = {}, {}
    for section in SECTIONS:
        wordings = counts.get((label, side, section), {})
        ranked = sorted(((sum(each.values()), each) for each in wordings.values()), key=lambda pair: -pair[0])
        kept = [(count, each.most_common(1)[0][0]) for count, each in ranked[:most] if count >= least]
        if kept:
            phrasings[section] = tuple(text for _, text in kept)
            weights[section] = tuple(float(count) for count, _ in kept)
    return phrasings, weights


def _without_numbers(sentence: str) -> str:
    return NUMBER.sub("0", " ".join(sentence.casefold().split()))
