"""Train a decoder on a trained model with frozen encoders: a prior from texts to embeddings of volumes, an autoencoder
on the volumes of a store, and, on their latents, a flow conditioned on the volumes' embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from ctclip.adaptation.caption import prompts_of
from ctclip.adaptation.components import begin_with_components
from ctclip.adaptation.consistency import ConsistencyConfig, inconsistency
from ctclip.adaptation.examples import cached_embeddings
from ctclip.adaptation.expectation import fit_expectation
from ctclip.adaptation.keep import add_head, check_head_name
from ctclip.adaptation.prior import LOSSES as PRIOR_LOSSES
from ctclip.adaptation.prior import PriorConfig, fit_prior, text_pairs
from ctclip.adaptation.resumable import Schedule, rows_of, train_resumably
from ctclip.adaptation.state import read_state, write_state
from ctclip.data.dataset import some_scans, with_report
from ctclip.errors import CheckpointError, ConfigError, DataError
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.tables import write_predictions
from ctclip.heads.decode import DecodeHead
from ctclip.heads.decoder import BINS, Decoder, Networks, intensity_bin
from ctclip.inference.run import run_key
from ctclip.inference.scans import StoredScans, prefetch
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import axis_shape
from ctclip.models.folder import ModelFolder
from ctclip.models.precision import Precision, at_precision, cpu_multiplies_bf16
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.progress import duration, track
from ctclip.preprocessing.store import VolumeStore
from ctclip.schema import Section

METHOD, LOSSES = "decode", "decode.csv"
# HU windows with loss terms of their own, because lung and soft tissue have little contrast between air and bone.
WINDOWS = ((-1000.0, -500.0), (-160.0, 240.0))
# Number of volumes whose noise is measured, and number of latents per file.
MEASURED, TOGETHER = 32, 256
# Number of volumes that initialise the autoencoder.
FIRST = 16
# Number of steps per row in the table of losses, and the longest training on a CPU, in days.
AVERAGED, DAYS = 100, 3.0


class Stage(Section):
    """How one of the two networks is trained."""

    steps: int = Field(20_000, ge=1, le=10**8, description="number of steps of AdamW")
    batch: int = Field(8, ge=1, le=10**5, description="number of volumes, or latents, in a batch")
    learning_rate: float = Field(2e-4, gt=0, le=10, description="peak learning rate of AdamW")
    average: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the weights that is saved; 0: save the last weights",
    )


class DecodeConfig(Section):
    """How a decoder is trained."""

    networks: Networks = Field(Networks(), description="sizes of the networks")  # type: ignore[call-arg]
    autoencoder: Stage = Field(Stage(), description="training of the autoencoder")  # type: ignore[call-arg]
    flow: Stage = Field(Stage(steps=50_000, batch=32), description="training of the flow network")  # type: ignore[call-arg]
    consistency: ConsistencyConfig = Field(
        ConsistencyConfig(),  # type: ignore[call-arg]
        description="comparison of predicted volumes with the embeddings that the flow is conditioned on",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision in which the flow network is trained; auto: bf16 if the device multiplies in it, else fp32",
    )
    volumes: int | None = Field(None, ge=1, description="number of training volumes to use; null: all")
    crop: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="side in voxels of the cubes on which the autoencoder is trained; null: whole volumes",
    )
    windows: float = Field(
        0.2,
        ge=0,
        le=100,
        description="weight of differences in the lung and soft tissue windows relative to differences in the full HU "
        "window",
    )
    kl: float = Field(
        1e-7, ge=0, le=1, description="weight of the autoencoder's KL divergence, summed over the latents of a volume"
    )
    untold: float = Field(
        0.1, ge=0, lt=1, description="fraction of the examples without a condition, for classifier-free guidance"
    )
    prior: PriorConfig = Field(
        PriorConfig(kind="diffusion", excerpts=5, epochs=20.0),  # type: ignore[call-arg]
        description="training of the prior, which draws an embedding of a volume for a text",
    )


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
    first = _autoencoder_key(scans, config, seed)
    with claimed_folder(output, "adapt", key, (LOSSES, PRIOR_LOSSES), made_by_us, force=force):
        vectors = cached_embeddings(loaded, scans, output / "embeddings", 8)
        scans.table = scans.table[scans.table["volume"].isin(vectors)].reset_index(drop=True)
        if scans.table.empty:
            raise DataError("no volume with a report to learn from")
        pairs = text_pairs(loaded, scans.table, vectors, config.prior, seed)
        prior, prior_losses = fit_prior(pairs, config.prior, loaded.model.device, seed)
        embeddings = torch.from_numpy(np.stack([vectors[name] for name in scans.table["volume"]])).float()
        losses = {"autoencoder": _fit_autoencoder(decoder, scans, config, output, first, seed)}
        latents = _latents(decoder, scans, output / "latents", first)
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


def _autoencoder_key(scans: StoredScans, config: DecodeConfig, seed: int) -> str:
    """The key of the autoencoder, which does not depend on the settings of the flow: if only those change (with
    --force), the autoencoder is not trained again."""
    networks = config.networks.model_dump(exclude={"width", "depth"}) | {"step": config.networks.step}
    settings = config.model_dump(mode="json", include={"autoencoder", "crop", "windows", "kl"})
    return run_key(scans.origin(), list(scans.table["volume"]), networks, settings, seed)


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
            predicted, embedding = decoder.mean[None].clone().requires_grad_(), decoder.mean.new_zeros(1, decoder.dim)
            third = _timed(lambda: inconsistency(model, decoder, predicted, embedding))
    compared = min(config.consistency.volumes, config.flow.batch)
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


def autoencoder_loss(decoder: Decoder, volumes: Tensor, config: DecodeConfig, window: tuple[float, float]) -> Tensor:
    """Mean absolute differences in ``window`` (the HU of -1 and 1) and in the windows of lung and soft tissue, plus the
    KL divergence of the latents (Rombach et al. 2022, section 3.1). ``volumes`` (B, 1, D, H, W). Uses torch's random
    generator."""
    volumes = decoder.padded(volumes)
    mean, deviation = decoder.encode(volumes)
    again = decoder.decode(mean + deviation * torch.randn_like(deviation))
    loss = (again - volumes).abs().mean()
    low, high = window
    for bottom, top in WINDOWS:
        first, last = ((value - low) / (high - low) * 2 - 1 for value in (bottom, top))
        part = (again.clamp(first, last) - volumes.clamp(first, last)).abs().mean()
        loss = loss + config.windows * 2 / (last - first) * part
    variance = deviation.square()
    divergence = 0.5 * (mean.square() + variance - 1 - variance.clamp(min=1e-12).log())
    return loss + config.kl * divergence.flatten(1).sum(dim=1).mean()


def _fit_autoencoder(
    decoder: Decoder, scans: StoredScans, config: DecodeConfig, output: Path, key: str, seed: int
) -> list[float]:
    stage, device = config.autoencoder, decoder.mean.device
    count = len(scans.table)
    batch = min(stage.batch, count)
    first = torch.stack(
        [_crop(scans.voxels(row)[0], None) for row in rows_of(0, count, min(FIRST, count), seed).tolist()]
    )
    begin_with_components(decoder, first[:, None].to(device))

    def batches(begin: int) -> Iterator[Tensor]:
        rows = [row for step in range(begin, stage.steps) for row in rows_of(step, count, batch, seed).tolist()]
        ready = prefetch(scans.voxels, rows)
        for step in range(begin, stage.steps):
            random = np.random.default_rng([seed, 59, step])
            yield torch.stack([_crop(next(ready)()[0], config.crop, random) for _ in range(batch)])[:, None]

    return train_resumably(
        decoder.autoencoder,
        lambda volumes: autoencoder_loss(decoder, volumes.to(device), config, scans.spec.hu_window),
        batches,
        Schedule(stage.steps, stage.learning_rate, average=stage.average),
        output / "autoencoder.safetensors",
        key=key,
        seed=seed,
        what="autoencoder",
    )


def _crop(voxels: np.ndarray, side: int | None, random: np.random.Generator | None = None) -> Tensor:
    """A random cube of a volume (D, H, W), or the whole volume if ``side`` is None."""
    if side is None or random is None:
        return torch.from_numpy(np.array(voxels))
    begins = [int(random.integers(0, max(extent - side, 0) + 1)) for extent in voxels.shape]
    d, h, w = (slice(begin, begin + side) for begin in begins)
    return torch.from_numpy(np.ascontiguousarray(voxels[d, h, w]))


@torch.inference_mode()
def _latents(decoder: Decoder, scans: StoredScans, folder: Path, key: str) -> Tensor:
    """The means (n, latent, d, h, w), float16, of the latents of every volume. They are cached in ``folder``,
    ``TOGETHER`` per file, so that an interrupted run resumes."""
    folder.mkdir(exist_ok=True)
    count, parts = len(scans.table), []
    starts = range(0, count, TOGETHER)
    for start in track(starts, len(starts), "latents", f"files of {TOGETHER}"):
        path = folder / f"{start:08d}.safetensors"
        part = _kept(path, key)
        if part is None:
            rows = range(start, min(start + TOGETHER, count))
            encoded = []
            for ready in prefetch(scans.voxels, rows):
                volume = _crop(ready()[0], None)[None, None].to(decoder.mean.device)
                encoded.append(decoder.encode(volume)[0].half().cpu())
            part = torch.cat(encoded)
            write_state(path, key, {"latents": part})
        parts.append(part)
    return torch.cat(parts).clone()


def _kept(path: Path, key: str) -> Tensor | None:
    """The latents cached in a file by this run; None if there are none, or if the file is damaged."""
    try:
        kept = read_state(path, key)
    except CheckpointError:
        return None
    return None if kept is None else kept[0].get("latents")


@torch.inference_mode()
def measured_noise(decoder: Decoder, scans: StoredScans, seed: int) -> Tensor:
    """The standard deviation (BINS,) of the noise that the autoencoder removes, at each reconstructed intensity. It is
    estimated from differences of neighbouring voxels, which ignores lost structures, by their median absolute
    deviation, which ignores edges."""
    count = len(scans.table)
    rows = np.random.default_rng([seed, 61]).permutation(count)[:MEASURED].tolist()
    bins, left = list[np.ndarray](), list[np.ndarray]()
    for ready in prefetch(scans.voxels, rows):
        volume = _crop(ready()[0], None)[None, None].to(decoder.mean.device)
        again = decoder.decode(decoder.encode(volume)[0])[tuple(slice(extent) for extent in (1, 1, *volume.shape[2:]))]
        # Every seventh voxel is enough; a stride of 7 does not select whole planes of the volume.
        bins.append(intensity_bin(again[..., 1:]).flatten()[::7].cpu().numpy())
        left.append(((volume - again).diff(dim=-1) / math.sqrt(2)).flatten()[::7].cpu().numpy())
    table = pd.DataFrame({"bin": np.concatenate(bins), "left": np.concatenate(left)})
    deviation = table.groupby("bin")["left"].agg(lambda each: 1.4826 * float((each - each.median()).abs().median()))
    return torch.from_numpy(deviation.reindex(range(BINS)).fillna(0.0).to_numpy(np.float32).copy())


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
    stage, compared, device = config.flow, config.consistency.volumes, decoder.mean.device
    precision = _precision(config, device)
    batch = min(stage.batch, len(latents))
    decoder.autoencoder.requires_grad_(False)

    def loss(rows: Tensor) -> Tensor:
        chosen = embeddings[rows].to(device)
        conditions = drawn_conditions(decoder, chosen, config)
        with at_precision(precision, device):
            error, clean = decoder.flow_loss(decoder.standard(latents[rows].float().to(device)), conditions)
            if config.consistency.weight:
                weight = config.consistency.weight
                error = error + weight * inconsistency(model, decoder, clean[:compared], chosen[:compared])
            return error

    def batches(begin: int) -> Iterator[Tensor]:
        for step in range(begin, stage.steps):
            yield torch.from_numpy(rows_of(step, len(latents), batch, seed))

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
