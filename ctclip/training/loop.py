"""The training loop: batches in, a model folder out."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ctclip import distributed
from ctclip.config import Config
from ctclip.data.dataset import ScanSampler, StoredVolumes, collate
from ctclip.errors import TrainingError
from ctclip.findings import FINDINGS
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.folder import prompts_file, save_model
from ctclip.models.text import load_tokenizer, train_tokenizer
from ctclip.training.checkpoints import Checkpoints
from ctclip.training.engine import Engine
from ctclip.training.records import MetricsLog, open_run
from ctclip.training.step import ContrastiveStep
from ctclip.versions import revision
from preprocessing.progress import track


def train(config: Config, output: Path, *, force: bool = False) -> Path:
    """Train as ``config`` says and return the model folder ``output/model``.

    A run that was interrupted continues from its last checkpoint; a finished one returns at once.
    """
    with distributed.process_group() as device:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        return _train(config, output, device, force)


def _train(config: Config, output: Path, device: torch.device, force: bool) -> Path:
    labels = list(FINDINGS) if config.objectives.labels else []
    data = StoredVolumes(config.data, config.data.train_split, seed=config.seed, labels=labels)
    if data.spec.name != config.preprocessing:
        raise TrainingError(
            f"{config.data.store}: prepared with spec {data.spec.name!r}, the configuration wants "
            f"{config.preprocessing!r}. Run `ctclip preprocess --spec {config.preprocessing}`, or set preprocessing="
        )
    _on_main(lambda: open_run(output, config, force=force))
    torch.manual_seed(config.seed)
    model = build_model(config.model, _tokenizer(config, data, output))
    checkpoints = Checkpoints(output / "checkpoints", config.training.keep_checkpoints)
    first, resumed = checkpoints.newest()
    engine = Engine(ContrastiveStep(model, config.objectives, len(labels)), config, device, resumed)
    del resumed
    sampler, steps = _sampler(config, data, first)
    if first < steps:
        _run(config, output, engine, checkpoints, data, sampler, steps)
    return _save(config, output, engine, model, data)


def _run(
    config: Config,
    output: Path,
    engine: Engine,
    checkpoints: Checkpoints,
    data: StoredVolumes,
    sampler: ScanSampler,
    steps: int,
) -> None:
    main = distributed.is_main()
    log = MetricsLog(output, sampler.start) if main else None
    batches: Any = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        pin_memory=engine.device.type == "cuda",
    )
    numbers: Any = range(sampler.start, steps)
    if main:
        numbers = track(numbers, steps - sampler.start, "training", "steps")
    stream = iter(batches)
    began = time.monotonic()
    waited = 0.0
    for step in numbers:
        asked = time.monotonic()
        batch = next(stream).to(engine.device)
        waited += time.monotonic() - asked
        logged = engine.step(batch, step, steps)
        if not math.isfinite(logged["loss"]):
            raise TrainingError(
                f"the loss is {logged['loss']} at step {step} (logit scale {logged['logit_scale']:.3g}, gradient norm "
                f"{logged['gradient_norm']:.3g}): lower training.learning_rate or raise training.warmup; the last good "
                f"checkpoint is in {checkpoints.folder}"
            )
        if log is not None and ((step + 1) % config.training.log_every == 0 or step + 1 == steps):
            elapsed = time.monotonic() - began
            done = step + 1 - sampler.start
            logged["epoch"] = step / sampler.steps_per_epoch
            logged["volumes_per_second"] = done * config.training.batch / elapsed
            logged["data_wait"] = waited / elapsed
            log.write(step, logged)
        if (step + 1) % config.training.checkpoint_every == 0 or step + 1 == steps:
            state = engine.state()
            if main:
                checkpoints.save(step + 1, state)
    if log is not None:
        log.close()


def _sampler(config: Config, data: StoredVolumes, first: int) -> tuple[ScanSampler, int]:
    def make(steps: int) -> ScanSampler:
        return ScanSampler(
            data.scan_numbers,
            config.training.batch,
            steps,
            seed=config.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start=first,
        )

    steps = max(1, round(config.training.epochs * make(first).steps_per_epoch))
    return make(steps), steps


def _tokenizer(config: Config, data: StoredVolumes, output: Path) -> Any:
    """The pretrained encoder's tokenizer, or one learned once from the training reports and kept in the run."""
    if config.model.text.pretrained is not None:
        return load_tokenizer(config.model.text.pretrained)
    folder = output / "tokenizer"

    def learn() -> None:
        if not (folder / "tokenizer.json").is_file():
            texts = np.unique([report.text() for report in data.reports])
            train_tokenizer(texts.tolist(), config.model.text.vocabulary).save_pretrained(folder)

    _on_main(learn)
    return load_tokenizer(folder)


def _save(config: Config, output: Path, engine: Engine, model: DualEncoder, data: StoredVolumes) -> Path:
    state = engine.parameters()
    folder = output / "model"

    def write() -> None:
        prefix = "state/model."
        tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        card = _card(config, len(data))
        save_model(folder, model, data.spec, prompts=prompts_file(config.prompts), card=card, state=tensors)

    _on_main(write)
    return folder


def _card(config: Config, volumes: int) -> str:
    supervision = "label-supervised" if config.objectives.labels else "reports only"
    return (
        f"# {config.name}\n\nsupervision: {supervision}\n\n"
        f"Trained on {volumes} volumes of {config.data.train_split!r}, spec {config.preprocessing!r}, seed {config.seed}, "
        f"code {revision()}. The configuration of the run is in the run's config.yaml. Not a medical device.\n"
    )


def _on_main(action: Any) -> None:
    """Do something on rank 0; if it fails there, every rank stops with its message instead of waiting for it."""
    fault: Exception | None = None
    if distributed.is_main():
        try:
            action()
        except Exception as error:
            fault = error
    message = distributed.broadcast_object(None if fault is None else str(fault))
    if fault is not None:
        raise fault
    if message is not None:
        sys.exit(2)
