"""Train a prior on a trained model with frozen encoders: it maps the embeddings of a store's reports to those of their
volumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ctclip.adaptation.caption import prompts_of
from ctclip.adaptation.descent import descend
from ctclip.adaptation.examples import cached_embeddings
from ctclip.adaptation.keep import add_head, check_head_name
from ctclip.data.dataset import with_report
from ctclip.data.reports import ReportViews, reports_of
from ctclip.errors import DataError
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.tables import write_predictions
from ctclip.heads.prior import LAST, Prior, PriorHead, signal_and_noise
from ctclip.inference.run import report_embeddings, run_key
from ctclip.inference.scans import StoredScans
from ctclip.language import load_language
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore
from ctclip.schema import Section

METHOD, LOSSES = "prior", "prior.csv"
RIDGES = tuple(10.0**power for power in range(-3, 4))
# Excerpts drawn from a report in addition to the whole, because prompts are short.
VIEWS = {"sentence": 1.0, "sentences": 1.0, "positive": 1.0}


class PriorConfig(Section):
    """How a prior is trained."""

    kind: Literal["ridge", "mlp", "diffusion"] = Field(
        "ridge",
        description="ridge, mlp: linear regression, or regression with a network; diffusion: samples different volume "
        "embeddings for one text",
    )
    excerpts: int = Field(
        2,
        ge=0,
        le=100,
        description="number of excerpts of each report used in addition to the whole report, because prompts are short",
    )
    width: int = Field(512, ge=8, le=10**5, description="mlp, diffusion: width of the network")
    depth: int = Field(2, ge=1, le=100, description="mlp, diffusion: residual blocks of the network")
    dropout: float = Field(0.1, ge=0, lt=1, description="mlp, diffusion: dropout in the blocks")
    no_text: float = Field(
        0.1, ge=0, lt=1, description="diffusion: fraction of the examples without a text, for classifier-free guidance"
    )
    epochs: float = Field(
        60.0, gt=0, le=10**6, description="mlp, diffusion: number of passes over the training reports"
    )
    batch: int = Field(256, ge=1, le=10**6, description="mlp, diffusion: number of texts in a batch")
    learning_rate: float = Field(5e-4, gt=0, le=10, description="mlp, diffusion: peak learning rate of AdamW")
    weight_decay: float = Field(0.05, ge=0, le=100, description="mlp, diffusion: AdamW's weight decay")
    held_out: float = Field(
        0.1,
        gt=0,
        lt=0.9,
        description="fraction of the training patients held out to choose the ridge penalty, or the epoch of the "
        "network",
    )
    language: str = Field(
        "english", description="language of the reports: a YAML file, or its name in configs/languages"
    )


@dataclass(frozen=True)
class TextPairs:
    """Texts and volumes of one store: ``texts`` and ``volumes`` (n, dim) unit vectors, and which pairs (n,) bool are
    held out."""

    texts: Tensor
    volumes: Tensor
    held_out: Tensor


def run_prior(
    loaded: ModelFolder,
    store: Path,
    output: Path,
    config: PriorConfig,
    *,
    head: str = METHOD,
    split: str = "train",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Train a prior on the reports and volumes of a split and save it in the model folder; returns its folder.

    Writes ``prior.csv`` with the losses, and the embeddings of the volumes, to ``output``. Raises DataError or
    PreprocessingError, and saves nothing, if the store has no report or the output cannot be used.
    """
    check_folder(output, made_by_us, "output of `ctclip adapt --method prior`")
    check_head_name(loaded, head, PriorHead.kind)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    scans.table = with_report(scans.table, loaded.trained_on.sections, f"{store}: split {split!r}")
    key = run_key(loaded.hash, scans.origin(), list(scans.table["volume"]), config.model_dump_json(), f"{head} {seed}")
    with claimed_folder(output, "adapt", key, (LOSSES,), made_by_us, force=force):
        vectors = cached_embeddings(loaded, scans, output / "embeddings", 8)
        table = scans.table[scans.table["volume"].isin(vectors)]
        pairs = text_pairs(loaded, table, vectors, config, seed)
        prior, losses = fit_prior(pairs, config, loaded.model.device, seed)
        trained = PriorHead(loaded.model, prior, prompts_of(loaded), loaded.labels.names)
        words = f"{len(table)} volumes of {table['patient'].nunique()} patients, split {split}"
        trained.adaptation = Adaptation.to(METHOD, words, loaded.hash, table["patient"].astype(str))
        card = f"a prior from texts to volumes ({config.kind}), fitted to {words}"
        folder = add_head(loaded.path, head, trained, card)
        write_predictions(output / LOSSES, losses)
    return folder


def text_pairs(
    loaded: ModelFolder, table: pd.DataFrame, vectors: dict[str, np.ndarray], config: PriorConfig, seed: int
) -> TextPairs:
    """Pair every report, and excerpts of it, with its volume. ``table``: one row for each volume of ``vectors``."""
    random = np.random.default_rng([seed, 31])
    views = ReportViews(VIEWS, load_language(config.language))
    reports = reports_of(table, loaded.trained_on.sections)
    texts = [[report.text(), *(views.draw(report, random) for _ in range(config.excerpts))] for report in reports]
    with torch.inference_mode():
        encoded = report_embeddings(loaded.model, [text for each in texts for text in each])
    volumes = np.stack([vectors[name] for name in table["volume"]]).repeat(1 + config.excerpts, axis=0)
    patients = table["patient"].astype(str).to_numpy().repeat(1 + config.excerpts)
    names = np.unique(patients)
    if len(names) < 3:
        raise DataError(f"{len(names)} patients with a report: a prior cannot be learned from fewer than 3")
    drawn = random.permutation(names)[: max(1, round(config.held_out * len(names)))]
    return TextPairs(
        torch.from_numpy(encoded).float(), torch.from_numpy(volumes).float(), torch.from_numpy(np.isin(patients, drawn))
    )


def fit_prior(pairs: TextPairs, config: PriorConfig, device: torch.device, seed: int) -> tuple[Prior, pd.DataFrame]:
    """Fit a prior; return it with its losses for each epoch or each ridge penalty. ``held_out_loss`` is the loss on
    held-out patients."""
    torch.manual_seed(seed)
    prior = Prior(config.kind, pairs.texts.shape[1], config.width, config.depth, config.dropout)
    learned = pairs.volumes[~pairs.held_out]
    prior.mean.copy_(learned.mean(dim=0))
    prior.scale.copy_((learned - prior.mean).std().clamp(min=1e-6)[None])
    ridge = _fit_ridge(prior, pairs) if config.kind != "diffusion" else pd.DataFrame()
    if config.kind == "ridge":
        return prior, ridge
    return prior, _fit_network(prior.to(device), pairs, config, seed)


def _fit_ridge(prior: Prior, pairs: TextPairs) -> pd.DataFrame:
    """Solve a ridge regression in closed form, with the penalty that is best on the held-out patients."""
    targets = prior.target(pairs.volumes).double()
    texts, train = pairs.texts.double(), ~pairs.held_out
    centre = texts[train].mean(dim=0)
    inside = texts[train] - centre
    values, axes = torch.linalg.eigh(inside.T @ inside)
    toward = axes.T @ (inside.T @ (targets[train] - targets[train].mean(dim=0)))
    best, losses = np.inf, []
    for strength in RIDGES:
        weight = axes @ (toward / (values.clamp(min=0) + strength)[:, None])
        bias = targets[train].mean(dim=0) - centre @ weight
        error = ((texts @ weight + bias - targets) ** 2).mean(dim=1)
        loss = float(error[pairs.held_out].mean())
        losses.append((strength, float(error[train].mean()), loss))
        if loss < best:
            best = loss
            prior.linear.weight.data.copy_(weight.T)
            prior.linear.bias.data.copy_(bias)
    return pd.DataFrame(losses, columns=["ridge", "loss", "held_out_loss"])


def _fit_network(prior: Prior, pairs: TextPairs, config: PriorConfig, seed: int) -> pd.DataFrame:
    """Train the network by AdamW with a cosine schedule; the weights of the best epoch are kept."""
    device = prior.mean.device
    train, held = (torch.nonzero(chosen)[:, 0] for chosen in (~pairs.held_out, pairs.held_out))
    batch = min(config.batch, len(train))
    each = max(1, len(train) // batch)
    epochs = max(1, round(config.epochs))
    optimizer = torch.optim.AdamW(prior.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * each)
    best, kept, losses = np.inf, prior.state_dict(), []
    random = torch.Generator().manual_seed(seed)
    for epoch in track(range(epochs), epochs, f"{config.kind} prior", "epochs"):
        prior.train()
        total = 0.0
        for rows in _batches(train, batch, random):
            loss = _loss(prior, pairs.texts[rows].to(device), pairs.volumes[rows].to(device), config.no_text, random)
            total += descend(loss, prior.parameters(), optimizer, f"{config.kind} prior", clip=1.0) / each
            schedule.step()
        prior.eval()
        with torch.no_grad():
            # The same noise in every epoch, so that losses are comparable.
            same = torch.Generator().manual_seed(seed + 1)
            value = float(_loss(prior, pairs.texts[held].to(device), pairs.volumes[held].to(device), 0.0, same))
        losses.append((epoch + 1, total, value))
        if value < best:
            best, kept = value, {name: tensor.detach().clone() for name, tensor in prior.state_dict().items()}
    prior.load_state_dict(kept)
    return pd.DataFrame(losses, columns=["epoch", "loss", "held_out_loss"])


def _batches(rows: Tensor, batch: int, random: torch.Generator) -> Iterator[Tensor]:
    order = rows[torch.randperm(len(rows), generator=random)]
    for start in range(0, len(order) - batch + 1, batch):
        yield order[start : start + batch]


def _loss(prior: Prior, texts: Tensor, volumes: Tensor, no_text: float, random: torch.Generator) -> Tensor:
    """Mean squared error of the regression target, or of x0 at a random time (unCLIP, eq. 2)."""
    target = prior.target(volumes)
    if prior.kind != "diffusion":
        return F.mse_loss(prior.regress(texts), target)
    given = prior.scaled(texts)
    without = (torch.rand(len(given), 1, generator=random) < no_text).to(given.device)
    given = torch.where(without, prior.absent, given)
    times = torch.rand(len(given), generator=random) * LAST
    both = torch.tensor([signal_and_noise(float(time)) for time in times]).to(target)
    noise = torch.randn(target.shape, generator=random).to(target)
    noisy = both[:, :1] * target + both[:, 1:] * noise
    return F.mse_loss(prior.denoise(noisy, times.to(target), given), target)
