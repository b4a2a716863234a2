"""Write the tables and pages of `ctclip audit data` and `ctclip audit model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip.adaptation.examples import cached_embeddings
from ctclip.audit.concepts import Concepts, concept_scores
from ctclip.audit.data_audit import DIFFERENCE, SHORTCUT, Sheet, audit_data
from ctclip.audit.doubles_page import slices_of
from ctclip.audit.measures import MEASURES
from ctclip.audit.model_audit import audit_errors, errors, fairness, shortcuts
from ctclip.audit.pictures import PICTURES, Pictures, pictures
from ctclip.data.dataset import label_array
from ctclip.errors import DataError
from ctclip.evaluation.pages import interval_words, number, write_page
from ctclip.heads.head import Head
from ctclip.inference.run import run_key
from ctclip.inference.scans import StoredScans
from ctclip.labels import labels_of_columns
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.cohorts import label_names
from ctclip.preprocessing.csv_files import write_csv
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import claimed_folder, made_by_us
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.store import VolumeStore

DATA_TABLES = ("data_audit.csv", "concepts.csv", "data_audit.html")
MODEL_TABLES = ("errors.csv", "fairness.csv", "shortcuts.csv", "model_audit.html")
SHOWN, PICTURED, EXAMPLES = 60, 3, 3


def write_data_audit(
    loaded: ModelFolder,
    store: VolumeStore,
    output: Path,
    concepts: Concepts,
    *,
    splits: Sequence[str] = ("train", "valid"),
    embeddings: Path | None = None,
    batch: int = 8,
    force: bool = False,
) -> pd.DataFrame:
    """Compare concepts between the groups of a store and write ``DATA_TABLES`` to ``output``; see ``audit_data``."""
    key = run_key(loaded.hash, str(store.path.resolve()), concepts.model_dump(mode="json"), list(splits))
    with claimed_folder(output, "audit data", key, DATA_TABLES, lambda folder: made_by_us(folder), force=force):
        sheet, _, _ = concept_sheet(loaded, store, None, embeddings or output / "embeddings", concepts, batch)
        for name in splits:
            if name not in set(sheet.table["split"]):
                print(f"note: {store.path} has no volume of split {name!r}: labels are not compared between splits")
        lines = audit_data(sheet, splits)
        scores = pd.DataFrame(sheet.values, columns=list(sheet.names))
        scores.insert(0, "volume", sheet.table["volume"])
        _write_csv(output / "data_audit.csv", lines)
        _write_csv(output / "concepts.csv", scores)
        _data_page(output / "data_audit.html", store, sheet, lines)
    return lines


def write_model_audit(
    loaded: ModelFolder,
    head: Head,
    store: VolumeStore,
    output: Path,
    concepts: Concepts,
    *,
    split: str = "valid",
    embeddings: Path | None = None,
    batch: int = 8,
    force: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Write where the model errs, how accurate it is in each group and what its embeddings reveal about scanners:
    ``MODEL_TABLES`` in ``output``.

    ``head`` must score from embeddings (``score_embeddings``). Raises DataError if the store has none of its labels.
    """
    key = run_key(loaded.hash, head.identity(), str(store.path.resolve()), concepts.model_dump(mode="json"), split)
    with claimed_folder(output, "audit model", key, MODEL_TABLES, lambda folder: made_by_us(folder), force=force):
        sheet, vectors, taken = concept_sheet(
            loaded, store, split, embeddings or output / "embeddings", concepts, batch
        )
        labels, margins = labels_and_margins(loaded, head, store, sheet.table, vectors)
        tables = (
            audit_errors(sheet, errors(labels, margins)),
            fairness(sheet.table, labels, margins),
            shortcuts(sheet.table, vectors, taken.histograms.whole()),
        )
        for name, table in zip(MODEL_TABLES, tables, strict=False):
            _write_csv(output / name, table)
        _model_page(output / "model_audit.html", store, split, sheet, tables)
    return tables


def concept_sheet(
    loaded: ModelFolder,
    store: VolumeStore,
    split: str | None,
    cache: Path,
    concepts: Concepts,
    batch: int,
) -> tuple[Sheet, np.ndarray, Pictures]:
    """Compute concept scores and image measures of every readable volume, its embedding (n, dim), and its ``Pictures``.
    ``cache``: a folder of embeddings and measures that commands share."""
    scans = StoredScans(store, split, loaded.spec, loaded.path)
    vectors = cached_embeddings(loaded, scans, cache, batch)
    table = scans.table[scans.table["volume"].isin(list(vectors))].reset_index(drop=True)
    volumes = np.stack([vectors[name] for name in table["volume"]])
    told = concept_scores(loaded.model, concepts, volumes)
    taken = pictures(store, list(table["volume"]), cache / PICTURES)
    measured = taken.measures.whole()
    names = (*concepts.concepts, *MEASURES)
    kinds = (
        *[concept.kind for concept in concepts.concepts.values()],
        *["technique" if alone else "picture" for alone in MEASURES.values()],
    )
    return Sheet(table, np.concatenate([told, measured], axis=1).astype(float), names, kinds), volumes, taken


def labels_and_margins(
    loaded: ModelFolder, head: Head, store: VolumeStore, table: pd.DataFrame, vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and margins (n, L each) of the labels that both the head and the store have."""
    import torch

    score = getattr(head, "score_embeddings", None)
    if score is None:
        raise DataError(f"the head of kind {head.kind!r} does not score embeddings; name one of prompts in --head")
    known = [name for name in head.names if name in label_names(table)]
    if not known:
        raise DataError(
            f"{store.path}: its cohort table has none of the labels that the head scores ({', '.join(head.names[:3])}, "
            f"...)"
        )
    with torch.inference_mode():
        margins = score(torch.from_numpy(vectors).to(loaded.model.device)).float().cpu().numpy()
    labels = label_array(table, labels_of_columns("audited", known)).astype(float)
    if np.isnan(labels).all():
        raise DataError(f"{store.path}: none of the audited volumes has a label, so errors cannot be computed")
    return labels, margins[:, [head.names.index(name) for name in known]]


def _data_page(path: Path, store: VolumeStore, sheet: Sheet, lines: pd.DataFrame) -> None:
    shortcuts, others = (lines[lines["family"] == family] for family in (SHORTCUT, DIFFERENCE))
    significant = [int(part["significant"].sum()) for part in (shortcuts, others)]
    with scratch_folder("ctclip-audit-") as scratch:
        sections: list[dict[str, Any]] = [
            {
                "title": "Possible shortcuts", "table": _comparisons(shortcuts),
                "words": f"{_found(significant[0], len(shortcuts), BY_PERMUTATION)} A possible shortcut is anything "
                         f"that differs between splits, or is associated with a label without being part of the "
                         f"finding: technique and acquisition, and anything whose association with a label differs "
                         f"between the splits. A model can learn it instead of the finding. Sorted by the strength of "
                         f"the evidence.",
            },
            {
                "title": "Differences between groups", "table": _comparisons(others) if len(others) else None,
                "words": f"{_found(significant[1], len(others), BY_DISCOVERY)} Scanners, kernels, sexes and ages are "
                         f"expected to differ; it matters only if a label or a split is associated with them (table "
                         f"above)." if len(others)
                else "No column of the cohort table groups the volumes.",
            },
            *[_examples(scratch, store, sheet, str(name)) for name in _pictured(sheet, lines)],
        ]  # fmt: skip
        headline = [
            (f"{significant[0]:,}", f"possible shortcuts (of {len(shortcuts):,} comparisons)"),
            (f"{significant[1]:,}", f"differences between groups (of {len(others):,})"),
            (f"{len(sheet.table):,}", "volumes"), (f"{len(sheet.names)}", "concepts and measures"),
        ]  # fmt: skip
        write_page(path, title="Audit of a cohort", subtitle=store.path.name, headline=headline, sections=sections)


BY_PERMUTATION = "permutation of patients, max-T, Westfall & Young 1993"
BY_DISCOVERY = "false discovery rate, Benjamini & Hochberg 1995"


def _found(significant: int, lines: int, corrected: str) -> str:
    """State how many comparisons are significant."""
    if not significant:
        return f"None of {lines:,} comparisons is significant after correction ({corrected})."
    return f"{significant:,} of {lines:,} comparisons are significant after correction ({corrected}), marked *."


def _model_page(
    path: Path, store: VolumeStore, split: str, sheet: Sheet, tables: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
) -> None:
    wrong, fair, short = tables
    significant = int(wrong["significant"].sum())
    with scratch_folder("ctclip-audit-") as scratch:
        sections: list[dict[str, Any]] = [
            {
                "title": "Where it errs", "table": _comparisons(wrong),
                "words": f"{_found(significant, len(wrong), BY_DISCOVERY)} Difference in error (cross-entropy beyond that "
                         f"of volumes with the same labels, mean over labels) between volumes whose concept score is above the median and the others.",
            },
            {
                "title": "Groups", "table": _fairness_rows(fair) if len(fair) else None,
                "words": "Mean AUROC over labels in each group and its difference from all other patients, the worst "
                         "first; 95 % intervals by bootstrap over patients." if len(fair) else "No column of the "
                                                                                               "cohort table groups "
                                                                                               "the patients.",
            },
            {
                "title": "Shortcuts", "table": _shortcut_rows(short) if len(short) else None,
                "words": "Balanced accuracy, on held-out patients, of a linear probe that predicts the group from "
                         "embeddings and from HU histograms. If embeddings predict it better than histograms, the "
                         "model has learned it.",
            },
            *[_examples(scratch, store, sheet, str(name)) for name in _pictured(sheet, wrong)],
        ]  # fmt: skip
        headline = [(f"{significant}", f"concepts associated with errors (of {len(wrong)})")]
        if len(fair):
            worst = fair.iloc[0]
            interval = f"95 % interval {worst['difference_lower']:+.3f} to {worst['difference_upper']:+.3f}"
            headline.append((f"{worst['difference']:+.3f}", f"AUROC of {worst['group']} {worst['value']} minus all others, the worst group ({interval})"))  # fmt: skip
        if len(short):
            best = short.iloc[0]
            headline.append((f"{best['embeddings']:.2f}", f"accuracy of predicting {best['group']} from embeddings "
                                                          f"(chance {best['chance']:.2f})"))  # fmt: skip
        subtitle = f"{len(sheet.table):,} volumes of {store.path.name}, split {split}"
        write_page(path, title="Audit of a model", subtitle=subtitle, headline=headline, sections=sections)


def _pictured(sheet: Sheet, lines: pd.DataFrame) -> list[str]:
    """The concepts of the first few comparisons by which volumes can be ranked."""
    return [name for name in lines["concept"].drop_duplicates() if name in sheet.names][:PICTURED]


def _examples(scratch: Path, store: VolumeStore, sheet: Sheet, name: str) -> dict[str, Any]:
    """Draw slices of the volumes with the highest and the lowest values of a concept, side by side."""
    values = sheet.values[:, sheet.names.index(name)]
    order = [row for row in np.argsort(values, kind="stable") if np.isfinite(values[row])]
    most, least = order[::-1][:EXAMPLES], order[:EXAMPLES]
    figures = []
    # Alternating, so that each kind fills one column of the page.
    for words, row in [
        pair for rows in zip(most, least, strict=True) for pair in zip(("most", "least"), rows, strict=True)
    ]:
        volume = str(sheet.table["volume"].iloc[row])
        png = scratch / f"{len(list(scratch.iterdir()))}.png"
        slices_of(store, volume).save(png)
        figures.append((f"{words}: {volume} ({values[row]:.3g})", png))
    return {"title": f"Examples: {name}", "figures": figures, "beside": True}


def _comparisons(lines: pd.DataFrame) -> list[list[str]]:
    """The comparisons of either audit as a table for the page."""
    is_data = "group" in lines
    rows = [["concept", *["between"] * is_data, "difference in SD", "95 % interval", "adjusted p", "patients"]]
    line: Any
    for line in lines.head(SHOWN).itertuples():
        between = [f"{line.group}, {line.where}".removesuffix(", all")] if is_data else []
        rows.append(
            ["* " * int(line.significant) + f"{line.concept} ({line.kind})", *between, f"{line.difference:+.2f}",
             f"{line.lower:+.2f} to {line.upper:+.2f}",
             "<0.001" if line.adjusted_p < 0.0005 else number(line.adjusted_p), str(line.patients)]
        )  # fmt: skip
    return rows


def _fairness_rows(fair: pd.DataFrame) -> list[list[str]]:
    rows = [["group", "patients", "mean AUROC", "95 % interval", "difference from the others", "95 % interval"]]
    line: Any
    for line in fair.head(SHOWN).itertuples():
        rows.append(
            [f"{line.group}: {line.value}", f"{line.patients:,}", number(line.mean_auroc),
             interval_words(line.lower, line.upper), f"{line.difference:+.3f}",
             f"{line.difference_lower:+.3f} to {line.difference_upper:+.3f}"]
        )  # fmt: skip
    return rows


def _shortcut_rows(short: pd.DataFrame) -> list[list[str]]:
    rows = [["group", "values", "volumes", "from embeddings", "from histograms", "by chance"]]
    line: Any
    for line in short.head(SHOWN).itertuples():
        rows.append(
            [str(line.group), str(line.values), f"{line.volumes:,}",
             *(number(value, 2) for value in (line.embeddings, line.histogram, line.chance))]
        )  # fmt: skip
    return rows


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with written_beside(path) as partial:
        write_csv(partial, table, float_format="%.5g")
