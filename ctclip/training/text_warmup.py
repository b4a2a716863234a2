"""Warm-up of the text encoder before the first volume: it learns which sections belong to the same report.

A text encoder trained from scratch does not know the meaning of sentences, and the few volumes of a first epoch teach
it little. The reports teach more: findings and impression (the first and the last section of ``data.sections``) state
the same in different words (radiology section matching, Boecking et al. 2022). No labels or volumes are read.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctclip import distributed
from ctclip.config import TextWarmupConfig
from ctclip.data.reports import Report
from ctclip.errors import TrainingError
from ctclip.models.dual_encoder import DualEncoder
from ctclip.objectives.clip import clip
from ctclip.preprocessing.progress import track
from ctclip.sentences import sentences
from ctclip.training.optimizer import rate_factor
from ctclip.training.run_model import warn


def warm_up_text(
    model: DualEncoder, reports: list[Report], config: TextWarmupConfig, *, seed: int, device: torch.device
) -> float:
    """Train the text side of ``model`` in place and return the last loss in nats (NaN, with a warning, if too few
    reports have two sections). The result does not depend on the number of ranks. Raises TrainingError if an untrained
    text side would be locked."""
    pairs = distinct_pairs(reports)
    ranks, rank = distributed.world_size(), distributed.rank()
    batch = min(config.batch, len(pairs)) // ranks * ranks
    if batch < 2 * ranks:
        lacking = (
            f"training.text_warmup matches the first section of a report with the last, but only {len(pairs)} of the "
            f"{len(reports)} reports have both, with distinct last sections"
        )
        if config.lock:
            raise TrainingError(
                f"{lacking}: the text encoder would be frozen untrained. Name two sections in data.sections, or set "
                f"training.text_warmup.steps=0"
            )
        warn(f"warning: {lacking}: training starts without the warm-up")
        return float("nan")
    model.to(device).train()
    scale = nn.Parameter(model.similarity.logit_scale.detach().clone())
    learned = [p for n, p in model.named_parameters() if n.startswith("text_") and p.requires_grad]
    optimizer = torch.optim.AdamW(
        [*learned, scale], lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05
    )
    steps = range(config.steps)
    value = float("nan")
    for step in track(steps, len(steps), "text warm-up", "steps") if distributed.is_main() else steps:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(step / config.steps, 0.07)
        random = np.random.default_rng([seed, 7, step])
        drawn = [pairs[index] for index in random.choice(len(pairs), batch, replace=False)]
        findings = [" ".join(_some(_ends(report)[0], config.keep, random)) for report in drawn]
        share = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
        sides = []
        for texts in (findings, [_ends(report)[1] for report in drawn]):
            tokens = {name: ids.to(device) for name, ids in model.text_encoder.tokenise(texts[share]).items()}
            sides.append(model.similarity.text(distributed.gather(model.text_features(tokens).float())))
        loss = clip(sides[0], sides[1], scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        for parameter in (*learned, scale):
            if parameter.grad is not None and ranks > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        optimizer.step()
        value = float(loss.detach())
    return value


def lock_text(model: DualEncoder, reports: list[Report], device: torch.device) -> None:
    """Freeze the text side, standardised over all ``reports``. The result does not depend on the number of ranks."""
    model.to(device).lock_text()
    features = read_all(model, reports, device)
    standard = model.similarity.text_standard
    if not isinstance(standard, nn.BatchNorm1d):
        return
    for known, found in ((standard.running_mean, features.mean(dim=0)), (standard.running_var, features.var(dim=0))):
        assert known is not None
        known.copy_(found)
        if distributed.world_size() > 1:
            dist.broadcast(known, 0)


@torch.no_grad()
def read_all(model: DualEncoder, reports: list[Report], device: torch.device) -> Tensor:
    """Features (n, dim), float64, of every distinct report, always in the same order. A locked text side caches
    vectors, and the rounding of a sentence depends on the batch it was first encoded in."""
    texts = sorted({report.text() for report in reports})
    found = []
    for start in range(0, len(texts), 64):
        tokens = model.text_encoder.tokenise(texts[start : start + 64])
        found.append(model.text_features({name: ids.to(device) for name, ids in tokens.items()}).double())
    return torch.cat(found)


def distinct_pairs(reports: list[Report]) -> list[Report]:
    """Reports with both sections and distinct last sections, because equal sections would be false negatives of each
    other."""
    by_last = {last: report for report in reports for first, last in [_ends(report)] if first and last}
    return [by_last[key] for key in sorted(by_last)]


def _ends(report: Report) -> tuple[str, str]:
    """The first and the last section of a report; empty strings if it has fewer than two."""
    texts = [text.strip() for text in report.sections.values()]
    return (texts[0], texts[-1]) if len(texts) > 1 else ("", "")


def _some(text: str, keep: float, random: np.random.Generator) -> list[str]:
    every = sentences(text)
    return [sentence for sentence in every if random.random() < keep] or every
