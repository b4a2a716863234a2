"""The side of a finding in a scan, by the map of the model's locator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ctclip.explanation.method import Subject, method
from ctclip.explanation.place import by_side
from ctclip.heads.locator import LocateHead, Locator
from ctclip.heads.prompts import PromptHead
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing.pipeline import Prepared
from ctclip.report_reading.findings import BOTH

# The share of each side (left, right, both) of a finding, which sum to 1; empty if unknown.
Sides = Callable[[str], dict[str, float]]
# A map (d, h, w) and its affine -> its highest value in either half of the body.
Halves = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def mapped_sides(model: DualEncoder, head: PromptHead, locator: Locator, ready: Prepared) -> Sides:
    """The sides of findings in a scan by the maps of its locator: the stronger half of the body, or both if the map is at
    least half as high in the other."""

    def sides(label: str) -> dict[str, float]:
        if label not in head.names:
            return {}
        volume = torch.from_numpy(ready.voxels)[None, None].to(model.device)
        maps = method("learned").maps(Subject(model, head, [head.names.index(label)], volume, locator=locator))
        return side_shares(by_side(maps.values[0], maps.affine, ready))

    return sides


def side_shares(peaks: dict[str, float]) -> dict[str, float]:
    """The highest value of a map on either side -> the share of each side; empty if no side has a positive value."""
    if not peaks or max(peaks.values()) <= 0:
        return {}
    weaker, stronger = sorted(peaks, key=lambda side: peaks[side])
    share = max(peaks[weaker], 0.0) / peaks[stronger]
    return {stronger: 1 - share, weaker: 0.0, BOTH: share}


def certain_sides(head: LocateHead, volume: Tensor, halves: Halves) -> dict[str, str]:
    """The side of each finding that the locator of ``head`` would be certain of in a volume (1, 1, D, H, W) in [-1, 1], if
    the finding is present. ``halves``: such as ``by_side`` for this volume."""
    names = list(head.certain)
    if not names:
        return {}
    chosen = [head.names.index(name) for name in names]
    maps = method("learned").maps(Subject(head.model, head, chosen, volume.to(head.model.device), locator=head.locator))
    sides = dict[str, str]()
    for name, values in zip(names, maps.values, strict=True):
        side = surest(side_shares(halves(values, maps.affine)), head.certain[name])
        sides |= {name: side} if side else {}
    return sides


def surest(shares: dict[str, float], least: float) -> str:
    """The likelier of left and right if its share is at least ``least``, else ""."""
    single = {side: share for side, share in shares.items() if side != BOTH}
    if not single:
        return ""
    side = max(single, key=lambda name: single[name])
    return side if single[side] >= least else ""
