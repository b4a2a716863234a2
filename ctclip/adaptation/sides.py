"""How certain the map of a locator must be for a side to be stated: learned from the sides that held-out reports name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ctclip.adaptation.caption_texts import read_reports
from ctclip.adaptation.plan import FEWEST, FEWEST_SIDES, WRONG
from ctclip.explanation.method import Subject, method
from ctclip.explanation.place import stored_by_side
from ctclip.heads.locator import LocateHead
from ctclip.inference.run import batches
from ctclip.inference.scans import StoredScans
from ctclip.inference.sides import side_shares
from ctclip.models.folder import ModelFolder
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader

BATCH = 4


def fit_sides(
    loaded: ModelFolder,
    head: LocateHead,
    scans: StoredScans,
    rows: Sequence[int],
    language: str,
    refused: dict[str, str],
) -> dict[str, float]:
    """For each finding, the least share of a side (see ``side_shares``) at which hardly any side is wrong in ``rows`` of
    the scans, which the locator must not have learned from. Findings whose sides are named too seldom are left out, and those
    of which only one side is named, since that side says nothing."""
    if loaded.spec.published_geometry:
        # Its volumes have columns and rows exchanged, which ``stored_by_side`` does not know.
        return {}
    reader = RulesReader.build(loaded.labels, Options(language=language))
    if reader.language.scopes is None:
        return {}
    reports = read_reports(Cleaner(reader), scans.table.iloc[list(rows)], loaded.trained_on.sections)
    named = {row: {n: s for n, s in one.present.items() if s and n in head.names} for row, one in zip(rows, reports, strict=True)}  # fmt: skip
    seen: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    sided = [row for row, sides in named.items() if sides]
    for members, voxels, _ in batches(scans, sided, BATCH, refused, "sides"):
        for row, volume in zip(members, torch.from_numpy(voxels), strict=True):
            names = list(named[row])
            chosen = [head.names.index(name) for name in names]
            subject = Subject(head.model, head, chosen, volume[None].to(head.model.device), locator=head.locator)
            maps = method("learned").maps(subject)
            for name, values in zip(names, maps.values, strict=True):
                shares = side_shares(stored_by_side(values, maps.affine, volume[0].numpy(), loaded.spec))
                if shares:
                    side = max(("left", "right"), key=lambda one: shares[one])
                    seen[name].append((shares[side], side == named[row][name]))
    told = {name: [sides[name] for sides in named.values() if name in sides] for name in seen}
    certain = {
        name: _least(each) for name, each in seen.items() if min(map(told[name].count, ("left", "right"))) >= FEWEST
    }
    return {name: least for name, least in certain.items() if least is not None}


def _least(seen: Sequence[tuple[float, bool]]) -> float | None:
    """The smallest share from which on at most ``WRONG`` of the sides are wrong, among at least ``FEWEST_SIDES``."""
    shares, right = (np.array(part) for part in zip(*sorted(seen, reverse=True), strict=True))
    number = np.arange(1, len(shares) + 1)
    fits = np.flatnonzero((np.cumsum(~right) <= WRONG * number) & (number >= FEWEST_SIDES))
    return float(shares[fits[-1]]) if len(fits) else None
