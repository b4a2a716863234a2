"""The work of `ctclip evaluate --reports`: drafts against the reports of a store, with controls and intervals."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip.errors import EvaluationError
from ctclip.evaluation.evaluate import plain
from ctclip.evaluation.intervals import FEWEST_PATIENTS, percentile_interval
from ctclip.evaluation.metrics import bootstrap_weights
from ctclip.evaluation.pages import interval_words, number, write_page
from ctclip.evaluation.report_metrics import (
    FINDINGS,
    WORDS,
    Counts,
    WordOverlap,
    finding_scores,
    has_word_metrics,
    label_f1,
)
from ctclip.evaluation.run_evaluation import is_evaluation
from ctclip.labels import LabelSet, load_labels, store_labels
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import write_text, written_beside
from ctclip.preprocessing.no_report import report_text
from ctclip.preprocessing.outputs import check_run, claimed_folder
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import without_suffix
from ctclip.report_reading.findings import BOTH, Cleaner
from ctclip.report_reading.reader import Options, Status
from ctclip.report_reading.reports import load_reports
from ctclip.report_reading.rules import RulesReader
from ctclip.versions import versions

FILES = ("report_metrics.json", "report_metrics.csv", "reports.html")
SECTIONS = ("findings", "impression")
MOST_COMMON, DETECTED = "most common report", "detector's findings"


def run_reports(
    drafts: Path,
    store: Path,
    output: Path,
    *,
    against: Sequence[Path] = (),
    label_set: str | None = None,
    terms: str | None = None,
    language: str = "english",
    bootstrap: int = 1000,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Score a table of drafts (a column ``volume``, and ``findings`` and ``impression`` or one text) against the reports of
    a store. ``against``: other tables of the same volumes, such as the nearest neighbours' reports. Returns what
    ``report_metrics.json`` holds. Raises CtclipError or PreprocessingError.
    """
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (drafts, *against) if path.is_file())).hexdigest()[:16]
    check_run(output, "evaluate --reports", key, FILES, is_evaluation, force=force)
    opened = VolumeStore(store)
    labels = load_labels(label_set) if label_set is not None else store_labels(opened)
    if labels is None:
        raise EvaluationError(f"{store}: has no label set; name one with --label-set")
    reader = RulesReader.build(labels, Options(terms=terms, language=language))
    table, left_out = _references(drafts, opened)
    scorer = _Scorer(
        table, reader, Cleaner(reader), labels, bootstrap_weights(table["patient"].to_numpy(str), bootstrap, seed)
    )
    texts = _texts_of(drafts, table)
    common, frequency = _most_common(opened, table)
    scored = {"drafts": scorer.scores(texts), MOST_COMMON: scorer.scores([common] * len(table))}
    detected = _detected(drafts, table, labels)
    if detected is not None:
        scored[DETECTED] = {"scores": scorer.finding_scores(detected)}
    for path in against:
        scored[path.stem] = scorer.scores(_texts_of(path, table))
    for name, other in scored.items():
        if name != "drafts":
            other["difference"] = scorer.differences(scored["drafts"]["scores"], other["scores"])
    result = plain({
        "kind": "ctclip report evaluation", "drafts": drafts.name, "store": store.resolve().name, "reader": reader.identity,
        "labels": labels.identity, "volumes": len(table), "patients": table["patient"].nunique(), "without_report": left_out,
        "empty_drafts": sum(not text for text in texts), "most_common_is_of": frequency, "bootstrap": bootstrap, "seed": seed,
        "trusted": table["patient"].nunique() >= FEWEST_PATIENTS,
        "word_metrics": "sacrebleu, rouge-score" if has_word_metrics() else "not installed: pip install \"ctclip[reports]\"",
        "results": {name: _without_resamples(one) for name, one in scored.items()}, "versions": versions(),
    })  # fmt: skip
    with claimed_folder(output, "evaluate --reports", key, FILES, is_evaluation, force=force):
        write_text(output / FILES[0], json.dumps(result, indent=2, allow_nan=False))
        with written_beside(output / FILES[1]) as partial:
            write_csv(partial, _table(result), index_label="reports")
        _write_page(output / FILES[2], result)
    return result


class _Scorer:
    """Scores texts against the reports of one table; references are read once."""

    def __init__(
        self, table: pd.DataFrame, reader: RulesReader, cleaner: Cleaner, labels: LabelSet, weights: np.ndarray
    ) -> None:
        self.reader, self.cleaner, self.labels, self.weights = reader, cleaner, labels, weights
        self.references = table["reference"].tolist()
        self.truth = self._read(self.references, np.nan)
        if not (self.truth == 1).any():
            raise EvaluationError(f"the reports of the store state no finding of the label set {labels.name!r}")
        self.sides = [_sides(text, cleaner) for text in self.references]

    def scores(self, texts: Sequence[str]) -> dict[str, Any]:
        """All scores for one drafted text per report."""
        # An uncertain finding counts as present in a draft, and is ignored in the reference.
        counts = Counts.of(self.truth, self._read(texts, 1.0))
        scores = self.finding_scores(counts)
        if has_word_metrics():
            overlap = WordOverlap(texts, self.references)
            one, many = overlap.scores(np.ones((1, len(texts)))), overlap.scores(self.weights)
            scores |= {name: (float(one[name][0]), many[name]) for name in WORDS}
        f1 = dict(zip(self.labels.names, label_f1(counts).tolist(), strict=True))
        return {"scores": scores, "label_f1": f1, "sides": self._sided(texts)}

    def finding_scores(self, counts: Counts | np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
        """Scores of findings, each with its values in the resamples. ``counts``: the counts, or the findings (n, L) of
        0 and 1."""
        if isinstance(counts, np.ndarray):
            counts = Counts.of(self.truth, counts)
        one, many = finding_scores(counts, np.ones((1, len(self.truth)))), finding_scores(counts, self.weights)
        return {name: (float(one[name][0]), many[name]) for name in FINDINGS}

    def differences(self, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        """Differences ``ours`` minus ``theirs`` on the same patients."""
        pairs = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
        return {name: _entry(a[0] - b[0], a[1] - b[1]) for name, (a, b) in pairs.items()}

    def _read(self, texts: Sequence[str], uncertain: float) -> np.ndarray:
        """Findings (n, L) of texts: 1 present, 0 absent or not mentioned."""
        values = {Status.present: 1.0, Status.uncertain: uncertain}
        readings = self.reader.read(list(texts))
        return np.array([
            [values.get(reading[name].status, 0.0) if name in reading else 0.0 for name in self.labels.names]
            for reading in readings
        ])  # fmt: skip

    def _sided(self, texts: Sequence[str]) -> dict[str, Any]:
        """Count sentences that name the side of a present finding: all, those whose finding also has a side in the
        reference, and those among them that name the wrong side."""
        counts = np.array(
            [_compare_sides(text, sides, self.cleaner) for text, sides in zip(texts, self.sides, strict=True)]
        )
        named, compared, wrong = counts.sum(axis=0).tolist()
        resampled = self.weights @ counts
        shares = {
            name: _entry(wrong / whole if whole else float("nan"), _share(resampled[:, 2], resampled[:, column]))
            for name, whole, column in (("of_named", named, 0), ("of_compared", compared, 1))
        }
        return {"named": named, "compared": compared, "wrong": wrong, **shares}


def _sides(text: str, cleaner: Cleaner) -> dict[str, set[str]]:
    """The sides that a report states for each finding."""
    sides: dict[str, set[str]] = {}
    for sentence in cleaner.clean(text):
        for finding in sentence.findings:
            if finding.side and finding.status is Status.present:
                sides.setdefault(finding.label, set()).update(
                    ("left", "right") if finding.side == BOTH else (finding.side,)
                )
    return sides


def _compare_sides(text: str, truth: dict[str, set[str]], cleaner: Cleaner) -> tuple[int, int, int]:
    """Counts of sentences that name a side, that can be compared, and that name the wrong side."""
    named = compared = wrong = 0
    for sentence in cleaner.clean(text):
        sided = [finding for finding in sentence.findings if finding.side and finding.status is Status.present]
        named += bool(sided)
        known = [finding for finding in sided if finding.label in truth]
        compared += bool(known)
        wrong += any(
            not truth[finding.label] >= ({"left", "right"} if finding.side == BOTH else {finding.side})
            for finding in known
        )
    return named, compared, wrong


def _references(drafts: Path, store: VolumeStore) -> tuple[pd.DataFrame, int]:
    """The drafted volumes whose report is in the store (volume, patient, reference), and the number of drafts without
    one."""
    names = _ids(drafts)
    cohort = store.cohort.set_index("volume")
    unknown = [name for name in names if name not in cohort.index]
    if unknown:
        raise EvaluationError(f"{drafts}: volume {unknown[0]!r} is not in the store {store.path}")
    rows = cohort.loc[names]
    texts = _joined(rows)
    kept = [bool(text) for text in texts]
    if not any(kept):
        raise EvaluationError(f"{store.path}: none of the drafted volumes has a report")
    table = pd.DataFrame({"volume": names, "patient": rows["patient"].astype(str).tolist(), "reference": texts})
    return table[kept].reset_index(drop=True), len(names) - sum(kept)


def _ids(path: Path) -> list[str]:
    reports = load_reports(path)
    if reports.id_column.casefold() not in ("volume", "volumename"):
        raise EvaluationError(f"{path}: has no column 'volume', which names the volume that each draft belongs to")
    names = [str(without_suffix(name)) for name in reports.ids]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise EvaluationError(f"{path}: volume {twice!r} has several drafts; keep one")
    return names


def _texts_of(path: Path, table: pd.DataFrame) -> list[str]:
    """The drafts of the volumes of ``table``."""
    reports = load_reports(path)
    texts = dict(zip(_ids(path), reports.texts(), strict=True))
    absent = [name for name in table["volume"] if name not in texts]
    if absent:
        raise EvaluationError(f"{path}: has no draft of volume {absent[0]!r}; draft the same volumes")
    chosen = [texts[name] for name in table["volume"]]
    if not any(chosen):
        raise EvaluationError(f"{path}: every draft is empty")
    return chosen


def _joined(rows: pd.DataFrame) -> list[str]:
    return [
        "\n".join(text for text in (report_text(row.get(section, "")) for section in SECTIONS) if text)
        for row in rows.to_dict("records")
    ]


def _most_common(store: VolumeStore, table: pd.DataFrame) -> tuple[str, int]:
    """The most common report of the other patients, and the number of scans that have it."""
    others = store.cohort[~store.cohort["patient"].astype(str).isin(set(table["patient"]))].drop_duplicates("scan")
    texts = Counter(text for text in _joined(others) if text)
    if not texts:
        raise EvaluationError(
            f"{store.path}: every patient with a report was drafted, so the control has no report to copy"
        )
    # Among equally common reports, take the one with the most common sentences.
    words = Counter(line for text in texts.elements() for line in text.split(". "))
    best = max(texts, key=lambda text: (texts[text], np.mean([words[line] for line in text.split(". ")])))
    return best, texts[best]


def _detected(path: Path, table: pd.DataFrame, labels: LabelSet) -> np.ndarray | None:
    """The findings (n, L) that the detector called, if `ctclip draft` recorded them."""
    from ctclip.preprocessing.tables import read_table

    kept = read_table(path)
    if "detected" not in kept.columns:
        return None
    called = {
        without_suffix(volume): set(detected.split("; "))
        for volume, detected in zip(kept["volume"], kept["detected"], strict=True)
    }
    return np.array([[float(name in called[volume]) for name in labels.names] for volume in table["volume"]])


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _entry(value: float, resampled: np.ndarray) -> dict[str, float]:
    interval = percentile_interval(value, resampled)
    return {"value": value, "lower": interval.lower, "upper": interval.upper}


def _without_resamples(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "scores": {name: _entry(*pair) for name, pair in result["scores"].items()}}


def _table(result: dict[str, Any]) -> pd.DataFrame:
    rows = {}
    for name, one in result["results"].items():
        row: dict[str, float] = {}
        for metric, entry in one["scores"].items():
            row |= {metric: entry["value"], f"{metric}_lower": entry["lower"], f"{metric}_upper": entry["upper"]}
        sides = one.get("sides")
        if sides is not None:
            row |= {"sides_named": sides["named"], "sides_compared": sides["compared"], "sides_wrong": sides["wrong"]}
        rows[name] = row
    return pd.DataFrame(rows).T


def _write_page(path: Path, result: dict[str, Any]) -> None:
    names = {"macro_f1": "macro F1", "micro_f1": "micro F1", "crg": "CRG", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR"}  # fmt: skip
    metrics = [name for name in names if name in result["results"]["drafts"]["scores"]]
    head = ["reports", *(names[name] for name in metrics)]
    scores, differences = [head], [head]
    for name, one in result["results"].items():
        for rows, part in ((scores, one["scores"]), (differences, one.get("difference", {}))):
            if part:
                rows.append(
                    [name if rows is scores else f"drafts minus {name}", *(_cell(part.get(m)) for m in metrics)]
                )
    sides = [["reports", "sentences with a side", "compared", "wrong side", "fraction of all", "fraction of compared"]]
    for name, one in result["results"].items():
        if "sides" in one:
            s = one["sides"]
            sides.append([name, str(s["named"]), str(s["compared"]), str(s["wrong"]), _cell(s["of_named"]), _cell(s["of_compared"])])  # fmt: skip
    each = result["results"]["drafts"]["label_f1"]
    labels = [["finding", "F1"], *([name, number(value)] for name, value in each.items())]
    main = result["results"]["drafts"]["scores"]
    write_page(
        path, title=f"Drafted reports: {result['drafts']}",
        subtitle=f"{result['volumes']} volumes of {result['patients']} patients; findings read by {result['reader']}; 95 % "
        "intervals bootstrapped by patient",
        headline=[(number(main["macro_f1"]["value"]), "macro F1"), (number(main["micro_f1"]["value"]), "micro F1")],
        sections=[
            {"title": "Scores", "table": scores}, {"title": "Differences", "table": differences},
            {"title": "Sides", "table": sides}, {"title": "F1 by finding", "table": labels},
        ],
    )  # fmt: skip


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{number(entry['value'])} ({interval_words(entry['lower'], entry['upper'])})"
