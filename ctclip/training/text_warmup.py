"""Before the first volume: the text side learns which impression belongs to which findings.

A text encoder from scratch knows nothing of what its sentences mean, and the few volumes of a first epoch are a poor
teacher. The reports themselves say it: findings and impression state the same in other words (radiology section
matching, Boecking et al. 2022). No label and no volume is read.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctclip import distributed, losses
from ctclip.config import TextWarmupConfig
from ctclip.data.reports import Report
from ctclip.models.dual_encoder import DualEncoder
from ctclip.preprocessing.progress import track
from ctclip.sentences import sentences
from ctclip.training.engine import rate_factor


def warm_up_text(
    model: DualEncoder, reports: list[Report], config: TextWarmupConfig, *, seed: int, device: torch.device
) -> float:
    """Train the text side of ``model`` in place; returns the last loss (nats). The same on any number of ranks."""
    pairs = distinct_pairs(reports)
    ranks, rank = distributed.world_size(), distributed.rank()
    batch = min(config.batch, len(pairs)) // ranks * ranks
    if batch < 2 * ranks:
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
        findings = [" ".join(_some(report.findings, config.keep, random)) for report in drawn]
        share = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
        sides = []
        for texts in (findings, [report.impression for report in drawn]):
            tokens = {name: ids.to(device) for name, ids in model.text_encoder.tokenise(texts[share]).items()}
            sides.append(model.similarity.text(distributed.gather(model.text_features(tokens).float())))
        loss = losses.clip(sides[0], sides[1], scale.exp().clamp(max=100))
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
    """Fix the text side as it is now, standardised over all ``reports``; the same on any number of ranks."""
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
    """Features of every distinct report (n, dim) float64, in one order whenever it is asked: a locked text side keeps what
    it read, and how a sentence is rounded depends on those beside which it was first read."""
    texts = sorted({report.text() for report in reports})
    found = []
    for start in range(0, len(texts), 64):
        tokens = model.text_encoder.tokenise(texts[start : start + 64])
        found.append(model.text_features({name: ids.to(device) for name, ids in tokens.items()}).double())
    return torch.cat(found)


def distinct_pairs(reports: list[Report]) -> list[Report]:
    """Reports with both sections, each impression once: two of one wording would be each other's false negative."""
    by_impression = {report.impression.strip(): report for report in reports if report.findings and report.impression}
    return [by_impression[key] for key in sorted(by_impression)]


def _some(text: str, keep: float, random: np.random.Generator) -> list[str]:
    every = sentences(text)
    return [sentence for sentence in every if random.random() < keep] or every
