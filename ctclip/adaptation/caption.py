"""Train a caption head on a trained model with frozen encoders. Volumes are encoded once; a plan learns which findings
their reports state and on which side, and a decoder learns to write the reports from the tokens.

In most training examples the decoder is prompted with the findings that the report states, as read by rules, so that it
can later write about the findings of the plan or a detector. In the other examples it gets no findings (prompt dropout
as in DCP-PD, arXiv 2604.10437).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ctclip.adaptation.caption_texts import Examples, read_reports
from ctclip.adaptation.descent import descend
from ctclip.adaptation.keep import add_head, check_head_name
from ctclip.adaptation.plan import fit_plan
from ctclip.data.dataset import with_report
from ctclip.errors import DataError
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.tables import write_predictions
from ctclip.heads.caption import CaptionHead
from ctclip.heads.plan import plan_features
from ctclip.inference.run import batches, run_key
from ctclip.inference.scans import StoredScans
from ctclip.models.encoded import Encoded
from ctclip.models.folder import ModelFolder
from ctclip.objectives.words import LONGEST, WordDecoder
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import PromptSet, load_prompts
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader
from ctclip.schema import Section
from ctclip.training.optimizer import rate_factor

METHOD, LOSSES = "caption", "caption.csv"
SECTIONS = ("findings", "impression")


class CaptionConfig(Section):
    """How a caption head is trained."""

    depth: int = Field(
        4, ge=1, le=512, description="number of layers of the decoder; its width is that of the text encoder"
    )
    heads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="number of attention heads of the decoder; null: one per 64 channels of its width",
    )
    length: int = Field(
        LONGEST, ge=16, le=10**5, description="maximum number of tokens of a report; longer ones are cut"
    )
    told: float = Field(
        0.9,
        ge=0,
        le=1,
        description="fraction of the examples in which the decoder is prompted with the findings of the report",
    )
    quiet: float = Field(
        0.5,
        ge=0,
        le=1,
        description="fraction of the prompted findings whose side is left out of the prompt and the report, so that "
        "the decoder can write without a side",
    )
    places: bool = Field(
        True, description="also attend to finer grids, if the encoder has them, and to token positions"
    )
    epochs: float = Field(20.0, gt=0, le=10**6, description="number of passes over the training scans")
    batch: int = Field(16, ge=1, le=10**5, description="number of volumes in a batch")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="peak learning rate of AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps with a rising learning rate")
    weight_decay: float = Field(0.05, ge=0, le=100, description="AdamW's weight decay")
    language: str = Field(
        "english", description="language of the reports: a YAML file, or its name in configs/languages"
    )


def run_caption(
    loaded: ModelFolder,
    store: Path,
    output: Path,
    config: CaptionConfig,
    *,
    head: str = "caption",
    split: str = "train",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Train a caption head on the reports of a split and save it in the model folder; returns its folder.

    Writes ``caption.csv`` with the loss of each epoch to ``output`` and, during training, the volumes' tokens
    (float16). Raises DataError or PreprocessingError, and saves nothing, if the store has no report or the output
    cannot be used.
    """
    check_folder(output, made_by_us, "output of `ctclip adapt --method caption`")
    check_head_name(loaded, head, CaptionHead.kind)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    scans.table = with_report(scans.table, SECTIONS, f"{store}: split {split!r}")
    key = run_key(loaded.hash, scans.origin(), list(scans.table["volume"]), config.model_dump_json(), f"{head} {seed}")
    with (
        claimed_folder(output, "adapt", key, (LOSSES,), made_by_us, force=force),
        scratch_folder(".tokens.", ".partial", output) as scratch,
    ):
        encoded, features, indices = _encoded(loaded, scans, scratch, config.batch)
        table = scans.table.iloc[indices]
        reader = RulesReader.build(loaded.labels, Options(language=config.language))
        reports = read_reports(Cleaner(reader), table, SECTIONS)
        names = loaded.labels.names
        stated = torch.from_numpy(np.stack([report.stated(names) for report in reports]))
        plan = fit_plan(names, features, stated, table["patient"].to_numpy(str), seed) if config.told > 0 else None
        torch.manual_seed(seed)
        decoder = _decoder(loaded, encoded, config)
        caption = CaptionHead(
            loaded.model, decoder, prompts_of(loaded), names, SECTIONS, prompted=config.told > 0, plan=plan
        )
        examples = Examples(caption.tokens, reports, names, config.told, config.quiet)
        losses = _fit(decoder, encoded, examples, config, loaded.model.device, seed)
        words = f"{len(table)} volumes of {table['patient'].nunique()} patients, split {split}"
        caption.adaptation = Adaptation.to(METHOD, words, loaded.hash, table["patient"].astype(str))
        folder = add_head(loaded.path, head, caption, f"a decoder of reports, fitted to reports of {words}")
        write_predictions(output / LOSSES, pd.DataFrame({"epoch": range(1, len(losses) + 1), "loss": losses}))
    return folder


def _decoder(loaded: ModelFolder, encoded: Encoded, config: CaptionConfig) -> WordDecoder:
    text, volume = loaded.model.text_encoder, loaded.model.volume_encoder
    local = encoded.local.shape[2] if config.places and encoded.local is not None else 0
    return WordDecoder(
        text.bert.config.vocab_size, volume.token_width, text.width, depth=config.depth, heads=config.heads,
        length=config.length, local_width=local, places=config.places,
    )  # fmt: skip


def prompts_of(loaded: ModelFolder) -> PromptSet:
    """The prompts with which a new head scores the findings of the label set."""
    return load_prompts(loaded.labels.prompts or "generic")


def _encoded(loaded: ModelFolder, scans: StoredScans, scratch: Path, batch: int) -> tuple[Encoded, Tensor, list[int]]:
    """Tokens of all volumes in host memory (float16, memory-mapped files), the features of the plan (n, D), and the row
    indices."""
    kept: dict[str, np.memmap] = {}
    features, real = list[Tensor](), list[Tensor]()
    indices: list[int] = []
    refused: dict[str, str] = {}
    one: Encoded | None = None
    lateral = 1 if loaded.spec.published_geometry else 2
    for members, voxels, _ in batches(scans, list(range(len(scans.table))), batch, refused, "encoding"):
        with torch.inference_mode():
            one = loaded.model.encode(torch.from_numpy(voxels).to(loaded.model.device))
            features.append(plan_features(one, lateral).cpu())
        for name, part in (("tokens", one.tokens), ("local", one.local)):
            if part is not None:
                shape = (len(scans.table), *part.shape[1:])
                if name not in kept:
                    kept[name] = np.memmap(scratch / name, np.float16, "w+", shape=shape)
                kept[name][len(indices) : len(indices) + len(members)] = part.float().cpu().numpy()
        if one.real is not None:
            real.append(one.real.cpu())
        indices += members
    for reason in refused.values():
        print(f"refused: {reason}")
    if one is None:
        raise DataError(next(iter(refused.values()), f"{scans.store.path}: no volume to learn from"))
    mask = torch.cat(real) if real else None
    local = torch.from_numpy(kept["local"]) if "local" in kept else None
    every = Encoded(torch.from_numpy(kept["tokens"]), one.grid, one.pooled, one.affine, mask, local=local)
    return every, torch.cat(features).clone(), indices


def _fit(
    decoder: WordDecoder, encoded: Encoded, examples: Examples, config: CaptionConfig, device: torch.device, seed: int
) -> list[float]:
    """Train the decoder; return the mean loss (nats per token) of each epoch."""
    decoder.to(device).train().requires_grad_(True)
    count = len(examples)
    batch = min(config.batch, count)
    each = count // batch
    steps = max(1, round(config.epochs * each))
    optimizer = torch.optim.AdamW(
        decoder.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step / steps, config.warmup))
    losses: list[float] = []
    random = np.random.default_rng([seed, 29])
    for rows in track(_draws(count, batch, steps, random), steps, "caption head", "steps"):
        ids, mask, learned = _padded([examples.draw(row, random) for row in rows])
        one = _some(encoded, torch.from_numpy(rows), device)
        scores = decoder(ids[:, :-1].to(device), mask[:, :-1].to(device), one).float()
        target = ids.masked_fill(~learned, -100)[:, 1:].to(device)
        loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-100)
        losses.append(descend(loss, decoder.parameters(), optimizer, "caption head", clip=1.0))
        schedule.step()
    decoder.eval().requires_grad_(False)
    return [float(np.mean(losses[start : start + each])) for start in range(0, len(losses), each)]


def _some(encoded: Encoded, rows: Tensor, device: torch.device) -> Encoded:
    """The tokens of the volumes in ``rows``, float32 on ``device``."""
    tokens = encoded.tokens[rows].float().to(device)
    local = None if encoded.local is None else encoded.local[rows].float().to(device)
    real = None if encoded.real is None else encoded.real[rows].to(device)
    return Encoded(tokens, encoded.grid, encoded.pooled, encoded.affine, real, local=local)


def _draws(count: int, batch: int, steps: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The rows of each step; every row occurs once per epoch."""
    order: np.ndarray = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = random.permutation(count)
        rows, order = order[:batch], order[batch:]
        yield rows


def _padded(texts: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, L), a mask (B, L) that is 1 for tokens and 0 for padding, and a bool mask (B, L) of the tokens that
    count in the loss."""
    length = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row, _ in texts])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in texts])
    places = torch.arange(length)[None]
    return ids, mask, (mask == 1) & (places >= torch.tensor([prefix for _, prefix in texts])[:, None])
