"""Choose between mined and written prompts for each finding, on reports that were not mined.

A model's prompts should separate reports with a finding from reports without it. If the written prompts do so as well
as the mined ones, they are kept. The statements of the reports are read by rules; the labels of volumes are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ctclip.evaluation.metrics import auroc
from ctclip.heads.prompts import pair_vectors
from ctclip.models.dual_encoder import DualEncoder
from ctclip.prompts import PromptSet
from ctclip.report_reading.reader import NOTHING, Reader, Status

# The gain in AUROC on reports that mined phrasings need, and the minimum number of reports with and without the
# finding.
MARGIN, FEWEST = 0.01, 5
VALUES = {Status.present: 1.0, Status.uncertain: float("nan")}
BATCH = 64


@dataclass(frozen=True)
class Chosen:
    """``prompts``: the mined set, with written phrasings for the findings that keep them; ``auroc``: for each finding,
    the AUROC of the written and of the mined prompts on the reports; NaN if too few reports state or lack it."""

    prompts: PromptSet
    auroc: dict[str, tuple[float, float]]
    mined: tuple[str, ...]


def choose_prompts(
    model: DualEncoder, mined: PromptSet, written: PromptSet, texts: Sequence[str], reader: Reader, where: str
) -> Chosen:
    """``texts``: reports of patients whose reports were not mined; ``where`` names them, for the provenance."""
    names = tuple(mined.abnormalities)
    readings = reader.read(list(texts))
    truth = np.array([[VALUES.get(each.get(name, NOTHING).status, 0.0) for name in names] for each in readings])
    with torch.inference_mode():
        vectors = torch.cat(
            [model.encode_text(list(texts[start : start + BATCH])) for start in range(0, len(texts), BATCH)]
        )
        scores = []
        for prompts in (written, mined):
            positive, negative = pair_vectors(model, prompts, names)
            scores.append((vectors @ (positive - negative).T).float().cpu().numpy())
    results = {}
    for column, name in enumerate(names):
        known = ~np.isnan(truth[:, column])
        labels = truth[known, column]
        enough = min(labels.sum(), len(labels) - labels.sum()) >= FEWEST
        one, other = (auroc(labels, each[known, column]) if enough else float("nan") for each in scores)
        results[name] = (one, other)
    better = tuple(name for name, (one, other) in results.items() if other > one + MARGIN)
    pairs = {name: mined.pair(name) if name in better else written.pair(name) for name in names}
    provenance = mined.provenance | {
        "mined": ", ".join(better) or "none",
        "chosen": f"the others are from {written.identity()}, which separates {len(texts)} reports of {where} as well",
    }
    sections = tuple(dict.fromkeys((*mined.sections, *written.sections)))
    return Chosen(
        mined.model_copy(update={"abnormalities": pairs, "provenance": provenance, "sections": sections}),
        results,
        better,
    )
