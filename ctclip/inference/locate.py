"""Score maps of many scans against masks, with two controls."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctclip.errors import ExplanationError
from ctclip.evaluation.evaluate import plain
from ctclip.evaluation.localisation import Candidate, Pair, free_response, histograms, mean_over, summary
from ctclip.explanation.find import contrast_texts
from ctclip.explanation.masks import Masks
from ctclip.explanation.method import Maps, Subject, method
from ctclip.explanation.place import inside_scan, peak_of
from ctclip.explanation.shifts import maps_of
from ctclip.explanation.space import in_scan, resample
from ctclip.heads.head import Head
from ctclip.heads.locator import Locator
from ctclip.heads.text import TextHead
from ctclip.inference.scans import prefetch
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing.cohorts import Cohort
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.pipeline import Prepared, prepare
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.spec import PreprocessingSpec

# Number of candidates for the free-response curve: the highest local maxima of a map.
MOST_CANDIDATES = 16
CONTROLS = ("mean map", "other finding")
FIGURES = ("pointing", "auroc", "average_precision", "dice", "hit")


@dataclass
class Tally:
    """Results of each finding, accumulated over scans: pairs of the maps and of the controls, candidates, lesions."""

    pairs: dict[str, list[Pair]] = field(default_factory=lambda: defaultdict(list))
    candidates: list[list[Candidate]] = field(default_factory=list)
    lesions: list[int] = field(default_factory=list)


def chosen_volumes(cohort: Cohort, masks: Masks, split: str | None, limit: int | None, seed: int) -> list[str]:
    """The volumes of the cohort with a mask, in one ``split``; at most ``limit``, drawn at random."""
    table = cohort.table if split is None else cohort.table[cohort.table["split"] == split]
    names = [name for name in table["volume"] if name in masks.volumes and name in cohort.files]
    if not names:
        raise ExplanationError(
            f"{masks.folder}: none of its {len(masks.volumes)} masks belongs to a volume of the cohort"
            + (f"'s split {split!r}" if split else "")
        )
    if limit is not None and limit < len(names):
        names = sorted(np.random.default_rng(seed).choice(names, limit, replace=False).tolist(), key=names.index)
    return names


def locate_cohort(
    model: DualEncoder,
    head: Head,
    cohort: Cohort,
    masks: Masks,
    volumes: Sequence[str],
    *,
    by: str = "similarity",
    budget: int = 600,
    shifts: int | None = None,
    locator: Locator | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the maps of method ``by`` on every finding that the head scores and that has a mask; for masks of
    sentences, score every sentence, by category.

    The controls are maps that do not depend on the scan (the mean of the finding's maps over all scans), or on the
    finding (the map of a randomly drawn other finding of the same scan). All are compared on the scan's own grid. Raises
    ExplanationError if no mask marks any finding.
    """
    patients = cohort.table.set_index("volume")["patient"].astype(str)
    looking, asked = method(by), {volume: _asked(model, head, masks, volume) for volume in volumes}
    kept: dict[str, Maps] = {}
    for volume, prepared in _prepared(cohort, volumes, model.spec, "mapping"):
        scorer, findings = asked[volume].head, range(len(asked[volume].head.names))
        chosen = [number for number in findings if scorer.names[number] in asked[volume].group]
        voxels = torch.from_numpy(prepared.voxels)[None, None].to(model.device)
        subject = Subject(model, scorer, chosen, voxels, budget, locator)
        kept[volume] = maps_of(looking, subject, shifts)
    means = _means(kept, asked)

    random, tallies = np.random.default_rng(seed), defaultdict[str, Tally](Tally)
    for volume, prepared in _prepared(cohort, volumes, model.spec, "scoring"):
        maps, there = kept[volume], dict(masks.of(volume, prepared.file_grid))
        for number, (name, group) in enumerate(asked[volume].group.items()):
            tally, mask, own = tallies[group], there.get(name), maps.values[number]
            lesions, count = _lesions(mask)
            tally.candidates.append(_candidates(own, maps.affine, prepared, lesions))
            tally.lesions.append(count)
            if mask is None:
                continue
            rest = [other for other in range(len(maps.values)) if other != number]
            controls = {"mean map": means[group]} | (
                {"other finding": (maps.values[random.choice(rest)], maps.affine)} if rest else {}
            )
            for kind, (values, affine) in {"map": (own, maps.affine), **controls}.items():
                tally.pairs[kind].append(_pair(values, affine, prepared, mask, patients[volume]))
    scored = {group: _entry(tally, seed) for group, tally in tallies.items() if tally.pairs["map"]}
    if not scored:
        raise ExplanationError(
            f"{masks.folder}: none of the {len(volumes)} masks marks a finding that the head scores; is this the right folder, "
            f"and the right --mask-layout?"
        )
    return plain({
        "method": by, "layout": masks.layout.name, "scans": len(volumes),
        "patients": int(patients[list(volumes)].nunique()), "findings": scored,
        "means": {
            kind: {figure: mean_over({n: e[kind] for n, e in scored.items() if kind in e}, figure) for figure in FIGURES}
            for kind in ("map", *CONTROLS)
        },
    })  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The maps to compute for a scan: the head, and the finding under which each of the head's names is counted, in
    their order."""

    head: Head
    group: dict[str, str]


def _asked(model: DualEncoder, head: Head, masks: Masks, volume: str) -> Asked:
    if masks.layout.kind != "channels":
        shared = {name: name for name in head.names if name in masks.layout.labels}
        if not shared:
            raise ExplanationError(f"the head scores none of the labels that {masks.folder} shows")
        return Asked(head, shared)
    texts = masks.texts.get(volume, [])
    if not texts:
        raise ExplanationError(f"{masks.folder}: {masks.layout.sentences} names no sentence of {volume}")
    group = dict(zip(texts, masks.categories[volume], strict=True))
    return Asked(TextHead(model, list(group), contrast_texts(head)), group)


def _means(kept: dict[str, Maps], asked: dict[str, Asked]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The mean map of each finding over all scans, and its affine: that of its first map. The blocks of occlusion, and
    so its grid, depend on the scan."""
    total: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    count: dict[str, int] = defaultdict(int)
    for volume, maps in kept.items():
        for values, group in zip(maps.values, asked[volume].group.values(), strict=True):
            count[group] += 1
            if group not in total:
                total[group] = (values, maps.affine)
                continue
            sum_of, affine = total[group]
            same = values.shape == sum_of.shape and np.allclose(maps.affine, affine)
            total[group] = (sum_of + (values if same else resample(values, maps.affine, sum_of.shape, affine)), affine)
    return {group: (values / count[group], affine) for group, (values, affine) in total.items()}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` as JSON, atomically."""
    write_text(path, json.dumps(result, indent=2))


def _prepared(cohort: Cohort, volumes: Sequence[str], spec: PreprocessingSpec, what: str) -> Any:
    """Prepare scans one after another; the next scan is read while the caller works."""

    def one(volume: str) -> Prepared:
        return prepare(cohort.files[volume], spec, series=cohort.series.get(volume))

    ready = zip(volumes, prefetch(one, volumes, workers=1), strict=True)
    for volume, result in track(ready, len(volumes), what, "scans"):
        yield volume, result()


def _entry(tally: Tally, seed: int) -> dict[str, Any]:
    return {
        **{kind: summary(pairs, seed=seed) for kind, pairs in tally.pairs.items()},
        "free_response": free_response(tally.candidates, tally.lesions), "lesions": sum(tally.lesions),
    }  # fmt: skip


def _pair(values: np.ndarray, affine: np.ndarray, prepared: Prepared, mask: np.ndarray, patient: str) -> Pair:
    from scipy import spatial

    peak, grid = peak_of(values, affine, prepared), prepared.file_grid
    lps = (prepared.token_affine(affine) @ [*peak, 1])[:3]
    place = np.rint((np.linalg.inv(grid.affine) @ [*lps, 1])[:3]).astype(int)
    inside_file = bool(np.all((place >= 0) & (place < grid.shape)))
    distance = 0.0
    if not (inside_file and mask[tuple(place)]):
        centres = np.argwhere(mask) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        # A peak in a voxel next to the mask does not lie in it.
        distance = max(float(spatial.distance.cdist(lps[None], centres).min()), 1e-3)
    share = in_scan(values, affine, prepared, grid.shape, grid.affine) / max(float(values[peak]), 1e-12)
    return Pair(patient, distance, *histograms(share, mask))


def _lesions(mask: np.ndarray | None) -> tuple[np.ndarray | None, int]:
    """Connected components of a mask (26-connectivity), and their number."""
    from scipy import ndimage

    if mask is None:
        return None, 0
    lesions, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return lesions, int(count)


def _candidates(values: np.ndarray, affine: np.ndarray, prepared: Prepared, lesions: np.ndarray | None) -> list[Candidate]:  # fmt: skip
    """The highest local maxima among the cells inside the scan, and the lesion that contains each."""
    from scipy import ndimage

    inside = inside_scan(values.shape, affine, prepared)
    tops = (values == ndimage.maximum_filter(values, size=3, mode="nearest")) & inside & (values > 0)
    cells = np.argwhere(tops)
    cells = cells[np.argsort(-values[tops], kind="stable")][:MOST_CANDIDATES]
    leads = np.linalg.inv(prepared.file_grid.affine) @ prepared.token_affine(affine)
    candidates = []
    for cell in cells:
        place = np.clip(np.rint((leads @ [*cell, 1])[:3]).astype(int), 0, np.array(prepared.file_grid.shape) - 1)
        lesion = 0 if lesions is None else int(lesions[tuple(place)])
        candidates.append(Candidate(float(values[tuple(cell)]), lesion))
    return candidates
