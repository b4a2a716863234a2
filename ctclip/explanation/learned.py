"""Maps of a trained locator: for each cell, how much more likely than average it is that the report states the finding.

See ``ctclip.heads.locator``. A finding is represented by its positive prompts, or by the text to find. Values are
-log(1 - p) in nats, where p is the probability that the text describes the cell, if cells that it describes and others
were equally frequent. For a locator that learned in one stage they are in standard deviations, and cells that make the
finding less likely than average are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ctclip.errors import ExplanationError
from ctclip.explanation.method import Maps, Method, Subject
from ctclip.heads.locator import levels_of


class Learned(Method):
    """Encodes the volume once for each position of the cells; the same cells serve all findings."""

    name = "learned"
    shifts = 2

    def maps(self, subject: Subject) -> Maps:
        locator = subject.locator
        if locator is None:
            raise ExplanationError(
                "the model has no locator: train one with `ctclip adapt --method locate`, or use --method similarity"
            )
        encoder = subject.model.volume_encoder
        with torch.no_grad():
            levels = levels_of(encoder, subject.volume, tokens=locator.tokens, halves=locator.halves)
            try:
                values, cells = locator.maps(levels, encoder.spec, subject.head.texts()[list(subject.findings)])
            except ValueError as error:
                raise ExplanationError(f"the locator belongs to another model: {error}") from error
            values = F.softplus(values) if locator.rounds else values.clamp(min=0)
            if cells.real is not None:
                values = values * cells.real[0].to(values.device)
        return Maps(values.unflatten(1, cells.grid).cpu().numpy(), cells.affine)
