"""How certain the map of a locator must be for a side to be stated: learned from the sides that held-out reports name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from ctclip.adaptation.caption_texts import read_reports
from ctclip.adaptation.plan import FEWEST, least_certain
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


def side_cleaner(loaded: ModelFolder, language: str) -> Cleaner | None:
    """Reads the sides of findings in reports; None if the language has no rules for them, or if the sides of stored
    volumes are not known. Raises ConfigError for a language that cannot be read."""
    reader = RulesReader.build(loaded.labels, Options(language=language))
    # Volumes of the published geometry have columns and rows exchanged, which ``stored_by_side`` does not know.
    return None if loaded.spec.published_geometry or reader.language.scopes is None else Cleaner(reader)


def fit_sides(
    loaded: ModelFolder,
    head: LocateHead,
    scans: StoredScans,
    rows: Sequence[int],
    cleaner: Cleaner,
    refused: dict[str, str],
) -> dict[str, float]:
    """For each finding, the least share of a side (see ``side_shares``) at which hardly any side is wrong in ``rows`` of
    the scans, which the locator must not have learned from. Findings whose sides are named too seldom are left out, and those
    of which only one side is named, since that side says nothing."""
    reports = read_reports(cleaner, scans.table.iloc[list(rows)], loaded.trained_on.sections)
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
    certain = dict[str, float]()
    for name, each in seen.items():
        least = least_certain(*(torch.tensor(part) for part in zip(*each, strict=True)))
        if least is not None and min(map(told[name].count, ("left", "right"))) >= FEWEST:
            certain[name] = least
    return certain
