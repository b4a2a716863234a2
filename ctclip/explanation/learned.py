"""Maps of a trained locator: for each cell, how much more likely than average it is that the report states the finding.

See ``ctclip.heads.locator``. A finding is represented by its positive prompts, or by the text to find. Values are
-log(1 - p) in nats, where p is the probability that the text describes the cell, if cells that it describes and others
were equally frequent. For a locator that learned in one stage they are in standard deviations, and cells that make the
finding less likely than average are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Gradient, Maps, Method, Subject
from ctclip.heads.locator import Cells, levels_of


class Learned(Method):
    """Encodes the volume once for each position of the cells; the same cells serve all findings."""

    name = "learned"
    shifts = 2

    def maps(self, subject: Subject) -> Maps:
        with torch.no_grad():
            values, cells = _values(subject, subject.volume)
        return Maps(values.unflatten(1, cells.grid).cpu().numpy(), cells.affine)

    def slopes(self, subject: Subject) -> Gradient | None:
        # A token may respond to a finding elsewhere, so its gradient says nothing about its own cell.
        if subject.locator is None or subject.locator.tokens or not subject.model.volume_encoder.pools_finer_grids:
            return None
        return partial(_gradients, subject)


def _gradients(subject: Subject, volume: Tensor) -> Iterator[Tensor]:
    # One at a time: the gradients of all findings can be larger than the memory.
    with torch.enable_grad():
        volume = volume.detach().clone().requires_grad_()
        totals = _values(subject, volume)[0].sum(dim=1).unbind()
    for one in totals:
        yield torch.autograd.grad(one, volume, retain_graph=True)[0][0, 0]


def _values(subject: Subject, volume: Tensor) -> tuple[Tensor, Cells]:
    """The map of each finding (F, N), and the cells."""
    locator = subject.locator
    if locator is None:
        raise ExplanationError(
            "the model has no locator: train one with `ctclip adapt --method locate`, or use --method similarity"
        )
    encoder = subject.model.volume_encoder
    levels = levels_of(encoder, volume, tokens=locator.tokens, halves=locator.halves)
    try:
        values, cells = locator.maps(levels, encoder.spec, subject.head.texts()[list(subject.findings)])
    except ValueError as error:
        raise ExplanationError(f"the locator belongs to another model: {error}") from error
    values = F.softplus(values) if locator.rounds else values.clamp(min=0)
    return values if cells.real is None else values * cells.real[0].to(values.device), cells
