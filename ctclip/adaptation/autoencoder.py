"""Train the autoencoder of a decoder on the volumes of a store; their latents; and the noise that it removes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctclip.adaptation.components import begin_with_components
from ctclip.adaptation.decode_config import DecodeConfig
from ctclip.adaptation.resumable import Schedule, rows_of, train_resumably
from ctclip.adaptation.state import read_state, write_state
from ctclip.errors import CheckpointError
from ctclip.heads.decoder import BINS, Decoder, intensity_bin
from ctclip.inference.run import run_key
from ctclip.inference.scans import StoredScans, prefetch
from ctclip.preprocessing.progress import track

# HU windows with loss terms of their own, because lung and soft tissue have little contrast between air and bone.
WINDOWS = ((-1000.0, -500.0), (-160.0, 240.0))
# Number of volumes whose noise is measured, and number of latents per file.
MEASURED, TOGETHER = 32, 256
# Number of voxels of an intensity without which its noise is not measured.
ENOUGH = 1000
# Number of volumes that initialise the autoencoder.
FIRST = 16


def autoencoder_key(scans: StoredScans, config: DecodeConfig, seed: int) -> str:
    """The key of the autoencoder, which does not depend on the settings of the flow: if only those change (with
    --force), the autoencoder is not trained again."""
    networks = config.networks.model_dump(exclude={"width", "depth"}) | {"step": config.networks.step}
    settings = config.model_dump(mode="json", include={"autoencoder", "crop", "windows", "kl"})
    return run_key(scans.origin(), list(scans.table["volume"]), networks, settings, seed)


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


def fit_autoencoder(
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
def cached_latents(decoder: Decoder, scans: StoredScans, folder: Path, key: str) -> Tensor:
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
    """The standard deviation (BINS,) of the white noise that reconstructions lack, at each reconstructed intensity: the
    difference of the variances of noise in volumes and in their reconstructions, where reconstructions are flat. 0 where
    an intensity is too rare. Noise is estimated from differences of neighbouring voxels, by their median absolute
    deviation, which ignores structures that the autoencoder loses."""
    count = len(scans.table)
    rows = np.random.default_rng([seed, 61]).permutation(count)[:MEASURED].tolist()
    bins, before, after = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for ready in prefetch(scans.voxels, rows):
        volume = _crop(ready()[0], None)[None, None].to(decoder.mean.device)
        again = decoder.decode(decoder.encode(volume)[0])[tuple(slice(extent) for extent in (1, 1, *volume.shape[2:]))]
        level = intensity_bin(again)
        here = level[..., 1:, 1:, 1:]
        flat = (here == level[..., :-1, 1:, 1:]) & (here == level[..., 1:, :-1, 1:]) & (here == level[..., 1:, 1:, :-1])
        # Every third voxel is enough.
        bins.append(here[flat][::3].cpu().numpy())
        for steps, each in ((before, volume), (after, again)):
            steps.append(each[..., 1:, 1:, :].diff(dim=-1)[flat][::3].cpu().numpy())
    table = pd.DataFrame(
        {"bin": np.concatenate(bins), "before": np.concatenate(before), "after": np.concatenate(after)}
    )
    by_bin = table.groupby("bin")
    variance = by_bin.agg(_noise_variance)
    lacking = (variance["before"] - variance["after"]).clip(lower=0).pow(0.5)[by_bin.size() >= ENOUGH]
    return torch.from_numpy(lacking.reindex(range(BINS)).fillna(0.0).to_numpy(np.float32).copy())


def _noise_variance(differences: pd.Series[float]) -> float:
    """The variance of noise in each of two neighbouring voxels with these differences."""
    deviation = 1.4826 * float((differences - differences.median()).abs().median())
    return deviation**2 / 2
