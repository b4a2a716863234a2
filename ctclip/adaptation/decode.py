"""Train a decoder on a trained model with frozen encoders: a prior from texts to embeddings of volumes, an autoencoder
on the volumes of a store, and, on their latents, a flow conditioned on the volumes' embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctclip.adaptation.autoencoder import (
    autoencoder_key,
    autoencoder_loss,
    cached_latents,
    fit_autoencoder,
    measured_noise,
)
from ctclip.adaptation.caption import prompts_of
from ctclip.adaptation.consistency import inconsistency
from ctclip.adaptation.decode_config import DecodeConfig
from ctclip.adaptation.examples import cached_embeddings
from ctclip.adaptation.expectation import fit_expectation
from ctclip.adaptation.keep import add_head, check_head_name
from ctclip.adaptation.prior import LOSSES as PRIOR_LOSSES
from ctclip.adaptation.prior import fit_prior, text_pairs
from ctclip.adaptation.resumable import Schedule, rows_of, train_resumably
from ctclip.data.dataset import some_scans, with_report
from ctclip.errors import ConfigError, DataError
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.tables import write_predictions
from ctclip.heads.decode import DecodeHead
from ctclip.heads.decoder import Decoder
from ctclip.inference.run import run_key
from ctclip.inference.scans import StoredScans
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import axis_shape
from ctclip.models.folder import ModelFolder
from ctclip.models.precision import Precision, at_precision, cpu_multiplies_bf16
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.progress import duration
from ctclip.preprocessing.store import VolumeStore

METHOD, LOSSES = "decode", "decode.csv"
# Number of steps per row in the table of losses, and the longest training on a CPU, in days.
AVERAGED, DAYS = 100, 3.0


def run_decode(
    loaded: ModelFolder,
    store: Path,
    output: Path,
    config: DecodeConfig,
    *,
    head: str = METHOD,
    split: str = "train",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Train a decoder on the volumes and reports of a split and save it in the model folder; returns its folder.

    Writes ``prior.csv`` and ``decode.csv`` with the losses to ``output``, and the embeddings, latents and states of
    training: an interrupted run resumes and produces identical files. Raises ConfigError if training on a CPU would take
    days, TrainingError if it diverges, DataError or PreprocessingError, and saves nothing, if the store has no report or
    the output cannot be used.
    """
    check_folder(output, made_by_us, "output of `ctclip adapt --method decode`")
    check_head_name(loaded, head, DecodeHead.kind)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    scans.table = with_report(scans.table, loaded.trained_on.sections, f"{store}: split {split!r}")
    if config.volumes is not None:
        scans.table = some_scans(scans.table, config.volumes, seed)
    loaded.model.requires_grad_(False)
    decoder = new_decoder(loaded, config, seed)
    if loaded.model.device.type == "cpu":
        print(
            f"note: no GPU is used; training takes about {duration(estimate(loaded.model, decoder, config))} on this CPU"
        )
    key = run_key(loaded.hash, scans.origin(), list(scans.table["volume"]), config.model_dump_json(), f"{head} {seed}")
    first = autoencoder_key(scans, config, seed)
    with claimed_folder(output, "adapt", key, (LOSSES, PRIOR_LOSSES), made_by_us, force=force):
        vectors = cached_embeddings(loaded, scans, output / "embeddings", 8)
        scans.table = scans.table[scans.table["volume"].isin(vectors)].reset_index(drop=True)
        if scans.table.empty:
            raise DataError("no volume with a report to learn from")
        pairs = text_pairs(loaded, scans.table, vectors, config.prior, seed)
        prior, prior_losses = fit_prior(pairs, config.prior, loaded.model.device, seed)
        embeddings = torch.from_numpy(np.stack([vectors[name] for name in scans.table["volume"]])).float()
        losses = {"autoencoder": fit_autoencoder(decoder, scans, config, output, first, seed)}
        latents = cached_latents(decoder, scans, output / "latents", first)
        decoder.noise.copy_(measured_noise(decoder, scans, seed))
        decoder.standardise(latents)
        patients = scans.table["patient"].to_numpy(str)
        fit_expectation(decoder, latents, embeddings, patients, seed)
        losses["flow"] = _fit_flow(loaded.model, decoder, latents, embeddings, config, output, key, seed)
        made = DecodeHead(loaded.model, decoder, prior, prompts_of(loaded), loaded.labels.names)
        words = f"{len(scans.table)} volumes of {scans.table['patient'].nunique()} patients, split {split}"
        made.adaptation = Adaptation.to(METHOD, words, loaded.hash, scans.table["patient"].astype(str))
        folder = add_head(loaded.path, head, made, f"a decoder from texts to volumes, fitted to {words}")
        write_predictions(output / PRIOR_LOSSES, prior_losses)
        write_predictions(output / LOSSES, _losses(losses))
    return folder


def new_decoder(loaded: ModelFolder, config: DecodeConfig, seed: int) -> Decoder:
    """A decoder before training, on the model's device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(axis_shape(loaded.spec), loaded.model.config.dim, config.networks)
    return decoder.to(loaded.model.device)


def estimate(model: DualEncoder, decoder: Decoder, config: DecodeConfig) -> float:
    """Estimate the seconds of training on this device from timed steps: of each network on a small grid, and of the
    comparison of one volume. Raises ConfigError if training on a CPU would take longer than ``DAYS``."""
    step = decoder.networks.step
    cube = -(-32 // step) * step
    volume = decoder.mean.new_zeros(1, 1, cube, cube, cube)
    learned = math.prod(min(config.crop or extent, extent) for extent in decoder.shape) / cube**3
    latents = decoder.mean.new_zeros(1, decoder.networks.latent, *(min(extent, 32) for extent in decoder.grid))
    share = math.prod(decoder.grid) / math.prod(latents.shape[2:])
    first = _timed(lambda: autoencoder_loss(decoder, volume, config, (-1000.0, 1000.0)))
    with at_precision(_precision(config, decoder.mean.device), decoder.mean.device):
        second = _timed(lambda: decoder.flow_loss(latents, decoder.condition())[0])
        third = 0.0
        if config.consistency.weight:
            predicted = decoder.mean[None].clone().requires_grad_()
            third = _timed(lambda: inconsistency(model, decoder, predicted, decoder.mean[None]))
    compared = min(config.consistency.volumes, config.flow.batch) * (1 - config.consistency.begin)
    seconds = config.autoencoder.steps * config.autoencoder.batch * learned * first
    seconds += config.flow.steps * (config.flow.batch * share * second + compared * third)
    if decoder.mean.device.type == "cpu" and seconds > DAYS * 86_400:
        raise ConfigError(
            f"--method decode needs a GPU: on this CPU it would take about {duration(seconds)}; lower "
            f"autoencoder.steps and flow.steps, or give --config phantom_imagine, which is sized for a CPU"
        )
    return seconds


def _precision(config: DecodeConfig, device: torch.device) -> Precision:
    """The precision in which the flow network is trained on ``device``."""
    if config.precision != "auto":
        return config.precision
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_multiplies_bf16()
    return "bf16" if fast else "fp32"


def _timed(loss: Callable[[], Tensor]) -> float:
    """Seconds of one training step, after one step to warm up."""
    with torch.random.fork_rng(devices=[]):
        loss().backward()
        begin = time.perf_counter()
        loss().backward()
        return time.perf_counter() - begin


def _fit_flow(
    model: DualEncoder,
    decoder: Decoder,
    latents: Tensor,
    embeddings: Tensor,
    config: DecodeConfig,
    output: Path,
    key: str,
    seed: int,
) -> list[float]:
    stage, asked, device = config.flow, config.consistency, decoder.mean.device
    precision = _precision(config, device)
    batch = min(stage.batch, len(latents))
    decoder.autoencoder.requires_grad_(False)

    def loss(given: tuple[int, Tensor]) -> Tensor:
        step, rows = given
        conditions = drawn_conditions(decoder, embeddings[rows], config)
        chosen = decoder.standard(latents[rows].float().to(device))
        with at_precision(precision, device):
            error, clean = decoder.flow_loss(chosen, conditions)
            if asked.weight and step >= asked.begin * stage.steps:
                compared = slice(asked.volumes)
                error = error + asked.weight * inconsistency(model, decoder, clean[compared], chosen[compared])
            return error

    def batches(begin: int) -> Iterator[tuple[int, Tensor]]:
        for step in range(begin, stage.steps):
            yield step, torch.from_numpy(rows_of(step, len(latents), batch, seed))

    return train_resumably(
        decoder.flow,
        loss,
        batches,
        Schedule(stage.steps, stage.learning_rate, weight_decay=0.01, average=stage.average),
        output / "flow.safetensors",
        key=key,
        seed=seed + 1,
        what="flow",
    )


def drawn_conditions(decoder: Decoder, embeddings: Tensor, config: DecodeConfig) -> Tensor:
    """Conditions (B, dim + 1) of volumes with these embeddings (B, dim), a fraction of them empty. Uses torch's random
    generator."""
    told = (torch.rand(len(embeddings), 1) >= config.untold).to(decoder.scale)
    return decoder.condition(embeddings.to(decoder.scale)) * told


def _losses(losses: dict[str, list[float]]) -> pd.DataFrame:
    """One row per ``AVERAGED`` steps of each network, with their mean loss."""
    rows = [
        (network, min(start + AVERAGED, len(values)), float(np.mean(values[start : start + AVERAGED])))
        for network, values in losses.items()
        for start in range(0, len(values), AVERAGED)
    ]
    return pd.DataFrame(rows, columns=["network", "step", "loss"])
