"""A decoder that generates volumes from the embedding of a text or a volume: latent diffusion (Rombach et al. 2022)
with a rectified flow (Liu et al. 2023) and MONAI's networks, as in MAISI (Guo et al. 2024).

An autoencoder compresses volumes to latents. A flow network generates latents from noise, conditioned on the embedding
of a volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ctclip.models.convolution import right_convolutions
from ctclip.schema import Section

# Number of normalisation groups, and number of channels per attention head.
GROUPS, HEAD = 8, 32
# Number of time steps of the flow, and number of intensity bins of [-1, 1] with a measured noise level.
TIMES, BINS = 1000, 20
# How far the times of the flow are shifted towards noise (Esser et al. 2024, section 5.3.2): the outline of a chest is
# visible in noise that hides a single cell. And the spread of the logits of the times in training.
SHIFT, SPREAD = 3.0, 1.3
AIR = -1.0
# Number of components of the expected latents, and the number of cells of their grid.
COMPONENTS, CELLS = 64, 4096
# Initial log variance of the latents.
START = -6.0


class Networks(Section):
    """Sizes of a decoder's networks."""

    fold: int = Field(2, ge=1, le=8, description="side in voxels of the blocks that the autoencoder takes as channels")
    channels: tuple[int, ...] = Field(
        (32, 64, 128),
        min_length=1,
        max_length=6,
        description="number of channels of each level of the autoencoder; each further level halves the grid",
    )
    blocks: int = Field(1, ge=1, le=8, description="number of residual blocks per level of the autoencoder")
    latent: int = Field(4, ge=1, le=256, description="number of channels of the latents")
    patch: int = Field(
        2, ge=1, le=8, description="side in latent cells of the blocks that the flow network takes as channels"
    )
    width: tuple[int, ...] = Field(
        (128, 256),
        min_length=1,
        max_length=6,
        description="number of channels of each level of the flow network; each further level halves the grid, and the "
        "last has attention",
    )
    depth: int = Field(2, ge=1, le=16, description="number of residual blocks per level of the flow network")

    @field_validator("channels", "width")
    @classmethod
    def _even(cls, values: tuple[int, ...], given: Any) -> tuple[int, ...]:
        step = HEAD if given.field_name == "width" else GROUPS
        if any(value < step or value > 4096 or value % step for value in values):
            raise ValueError(f"each must be a multiple of {step} and at most 4096")
        return values

    @property
    def step(self) -> int:
        """Side in voxels of a cell of the flow network's coarsest level."""
        return self.fold * 2 ** (len(self.channels) - 1) * self.patch * 2 ** (len(self.width) - 1)


class Decoder(nn.Module):
    """Autoencoder and flow network. ``shape`` (D, H, W) of the volumes, ``dim`` of the embeddings.

    Volumes are (B, 1, D, H, W) in [-1, 1], latents (B, latent, d, h, w), conditions (B, dim + 1).
    """

    mean: Tensor
    scale: Tensor
    heard: Tensor
    expectation: Tensor
    noise: Tensor

    def __init__(self, shape: Sequence[int], dim: int, networks: Networks) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

        self.shape, self.dim, self.networks = (shape[0], shape[1], shape[2]), dim, networks
        folded, levels = networks.fold**3, len(networks.channels)
        self.autoencoder = AutoencoderKL(
            3, folded, folded, (networks.blocks,) * levels, networks.channels, (False,) * levels, networks.latent,
            norm_num_groups=GROUPS, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )  # fmt: skip
        # Start with almost no noise on the latents; with the usual initialisation, hundreds of steps make little
        # progress.
        spread: Any = self.autoencoder.quant_conv_log_sigma.conv
        nn.init.zeros_(spread.weight)
        nn.init.constant_(spread.bias, START)
        patched, levels = networks.latent * networks.patch**3, len(networks.width)
        self.flow = DiffusionModelUNet(
            3, 2 * patched + 3, patched, (networks.depth,) * levels, networks.width, (*(False,) * (levels - 1), True),
            norm_num_groups=GROUPS, num_head_channels=HEAD, num_class_embeds=1,
        )  # fmt: skip
        # The embedding of the condition takes the place of MONAI's class embedding, which is added to the time
        # embedding.
        hidden = 4 * networks.width[0]
        embed_condition = nn.Sequential(nn.Linear(dim + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.flow.class_embedding = embed_condition  # type: ignore[assignment]
        right_convolutions(self.autoencoder)
        right_convolutions(self.flow)
        self.register_buffer("mean", torch.zeros(networks.latent, *self.grid))
        self.register_buffer("scale", torch.ones(networks.latent))
        coarse = (networks.latent, *_coarse(self.grid))
        rank = min(COMPONENTS, dim + 1, math.prod(coarse))
        self.register_buffer("heard", torch.zeros(dim + 1, rank))
        self.register_buffer("expectation", torch.zeros(rank, *coarse))
        self.register_buffer("noise", torch.zeros(BINS))

    @property
    def facts(self) -> dict[str, Any]:
        """The arguments of the constructor as plain values."""
        return {"shape": list(self.shape), "dim": self.dim, "networks": self.networks.model_dump(mode="json")}

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid of the latents, which covers the padded volume."""
        step, cell = self.networks.step, self.networks.fold * 2 ** (len(self.networks.channels) - 1)
        d, h, w = (-(-extent // step) * step // cell for extent in self.shape)
        return d, h, w

    def padded(self, volumes: Tensor) -> Tensor:
        """Pad volumes with air at the end of each axis to whole cells."""
        step, sizes = self.networks.step, volumes.shape[2:]
        last = [side for extent in reversed(sizes) for side in (0, -extent % step)]
        return F.pad(volumes, last, value=AIR) if any(last) else volumes

    def encode(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the latents of volumes of any shape."""
        mean, deviation = self.autoencoder.encode(fold(self.padded(volumes), self.networks.fold))
        return mean, deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruct the volumes, including the padding."""
        return unfold(self.autoencoder.decode(latents), self.networks.fold)

    @torch.no_grad()
    def standardise(self, latents: Tensor) -> None:
        """Set the means of the latents (n, latent, d, h, w) of the training volumes in each cell, and the scale of each
        channel.

        The variance of a standardised channel is proportional to its effect on volumes (``channel_effects``), and the
        mean variance is 1. With the same variance in each channel, the faintest details would count as much as the
        outline of the chest; with the variance of their effects, they would be lost in the noise at nearly every time.
        """
        total, squares = (torch.zeros(latents.shape[1:], dtype=torch.float64) for _ in range(2))
        for part in latents.split(64):
            total += part.double().sum(dim=0)
            squares += part.double().square().sum(dim=0)
        mean = total / len(latents)
        variance = (squares / len(latents) - mean.square()).mean(dim=(1, 2, 3))
        deviation = variance.clamp(min=1e-12).sqrt().to(self.mean)
        effects = self.channel_effects(latents[0].float().to(self.mean), deviation)
        self.mean.copy_(mean)
        self.scale.copy_(deviation / (effects / effects.mean()).sqrt().clamp(min=1e-3))

    def channel_effects(self, latents: Tensor, deviation: Tensor) -> Tensor:
        """The effect of each channel on a volume with these latents (latent, d, h, w): the root mean square of the
        change by one ``deviation`` of the channel in every cell, with random signs."""
        random = torch.Generator().manual_seed(0)
        signs = torch.randint(2, latents.shape[1:], generator=random).to(latents) * 2 - 1
        before, effects = self.decode(latents[None]), []
        for channel, change in enumerate(deviation):
            moved = latents.clone()
            moved[channel] += change * signs
            effects.append((self.decode(moved[None]) - before).square().mean().sqrt())
        return torch.stack(effects)

    def standard(self, latents: Tensor) -> Tensor:
        """Subtract the mean over the training volumes of each cell, and divide by the scale of each channel."""
        return (latents - self.mean) / self.scale[:, None, None, None]

    def condition(self, volumes: Tensor | None = None, count: int = 1) -> Tensor:
        """Unit vectors (B, dim) of volumes -> conditions (B, dim + 1); without them, ``count`` empty conditions."""
        if volumes is None:
            return self.scale.new_zeros(count, self.dim + 1)
        # Scale coordinates to unit variance, which suits a network.
        return torch.cat([volumes * math.sqrt(self.dim), volumes.new_ones(len(volumes), 1)], dim=1)

    def coarse(self, latents: Tensor) -> Tensor:
        """Latents on the grid of the expected ones."""
        return F.adaptive_avg_pool3d(latents, _coarse(latents.shape[2:]))

    @torch.no_grad()
    def set_expectation(self, weights: Tensor, square: Tensor) -> None:
        """Keep the ``COMPONENTS`` components of a regression (dim + 1, latent * cells) from conditions to standardised
        latents that explain most of its predictions; ``square``: the conditions' second moment, times any number."""
        values, axes = torch.linalg.eigh(square)
        spread = axes * values.clamp(min=0).sqrt()
        _, _, components = torch.linalg.svd(spread.T @ weights, full_matrices=False)
        components = components[: len(self.expectation)]
        self.heard.copy_(weights @ components.T)
        self.expectation.copy_(components.view_as(self.expectation))

    def expected(self, conditions: Tensor, grid: Sequence[int]) -> Tensor:
        """Conditions (B, dim + 1) -> the expected latents (B, latent, *grid), standardised; 0 without a condition."""
        made = (conditions @ self.heard @ self.expectation.flatten(1)).unflatten(1, self.expectation.shape[1:])
        return made if made.shape[2:] == grid else F.interpolate(made, tuple(grid), mode="trilinear")

    def denoise(self, noisy: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        """noisy (B, latent, d, h, w), times (B,) from 0 (clean) to 1000 (noise) -> the clean latents.

        The network predicts the difference between the clean and the expected latents instead of the velocity, so that
        it can have fewer channels than the patched latents (Li & He 2025).
        """
        patched = fold(noisy, self.networks.patch)
        places = _places(patched.shape[2:]).to(patched).expand(len(patched), -1, -1, -1, -1)
        expected = fold(self.expected(conditions, noisy.shape[2:]), self.networks.patch)
        inputs = torch.cat([patched, places, expected], dim=1)
        return unfold(expected + self.flow(inputs, times, class_labels=conditions), self.networks.patch)

    def flow_loss(self, latents: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the predicted clean latents at random times, and the prediction. ``latents`` (B, latent,
        d, h, w), standardised. Uses torch's random generator."""
        scheduler = _scheduler()
        times = scheduler.sample_timesteps(latents)
        noisy = scheduler.add_noise(latents, torch.randn_like(latents), times)
        clean = self.denoise(noisy, times, conditions).float()
        return F.mse_loss(clean, latents), clean

    @torch.inference_mode()
    def sample(self, conditions: Tensor, seeds: Sequence[int], *, steps: int = 25, guidance: float = 2.0) -> Tensor:
        """Conditions (B, dim + 1) with one seed each -> volumes (B, 1, D, H, W) in [-1, 1], by Euler steps along the flow
        with classifier-free guidance (Ho & Salimans 2022, eq. 6). Volumes are sampled one at a time, so that each depends
        only on its condition and seed."""
        volumes = []
        for condition, seed in zip(conditions, seeds, strict=True):
            random = torch.Generator().manual_seed(seed)
            latents = torch.randn(1, self.networks.latent, *self.grid, generator=random).to(self.mean)
            latents = self._flowed(latents, condition[None], steps, guidance)
            volumes.append(self.volume(latents, random))
        return torch.cat(volumes)

    def _flowed(self, latents: Tensor, condition: Tensor, steps: int, guidance: float) -> Tensor:
        guided = guidance != 1
        both = torch.cat([condition, self.condition()]) if guided else condition
        times = _times(steps)
        for now, following in zip(times, [*times[1:], 0], strict=True):
            moment = torch.full((len(both),), float(now), device=latents.device)
            clean = self.denoise(latents.expand(len(both), -1, -1, -1, -1), moment, both)
            if guided:
                clean = clean[1:] + guidance * (clean[:1] - clean[1:])
            # Move along the straight line from noise to the clean latents (Liu et al. 2023, eq. 1).
            latents = latents.lerp(clean, 1 - following / now)
        return latents

    def volume(self, latents: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Standardised latents (B, latent, d, h, w) -> volumes (B, 1, D, H, W) in [-1, 1]. The autoencoder
        reconstructs the mean of the volumes with these latents; white noise is added with the noise level of training
        volumes at each intensity. ``random``: a generator on the host; None: torch's generator of the device."""
        decoded = self.decode(latents * self.scale[:, None, None, None] + self.mean).float()
        d, h, w = self.shape
        decoded = decoded[:, :, :d, :h, :w]
        shape, device = decoded.shape, decoded.device
        drawn = torch.randn(shape, device=device if random is None else "cpu", generator=random).to(device)
        return (decoded + drawn * self.noise[intensity_bin(decoded)]).clamp(-1, 1)


def intensity_bin(volumes: Tensor) -> Tensor:
    """The intensity bin of [-1, 1] of each voxel."""
    return ((volumes + 1) / 2 * BINS).long().clamp(0, BINS - 1)


def fold(values: Tensor, by: int) -> Tensor:
    """(B, C, D, H, W) -> (B, C * by^3, D / by, H / by, W / by): blocks become channels."""
    b, c, d, h, w = values.shape
    blocks = values.reshape(b, c, d // by, by, h // by, by, w // by, by)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * by**3, d // by, h // by, w // by)


def unfold(values: Tensor, by: int) -> Tensor:
    """The inverse of ``fold``."""
    b, c, d, h, w = values.shape
    blocks = values.reshape(b, c // by**3, by, by, by, d, h, w)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // by**3, d * by, h * by, w * by)


def _places(grid: Sequence[int]) -> Tensor:
    """Positions (1, 3, d, h, w) of the cells, from -1 to 1 along each axis."""
    axes = [torch.linspace(-1, 1, extent) if extent > 1 else torch.zeros(1) for extent in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _coarse(grid: Sequence[int]) -> tuple[int, int, int]:
    """The largest grid of at most ``CELLS`` cells whose extents are fractions of ``grid`` by one number."""
    by = 1
    while math.prod(-(-extent // by) for extent in grid) > CELLS:
        by += 1
    d, h, w = (-(-extent // by) for extent in grid)
    return d, h, w


def _scheduler() -> Any:
    """MONAI's rectified flow; in training, times are logit-normal (Esser et al. 2024)."""
    from monai.networks.schedulers import RFlowScheduler

    return RFlowScheduler(
        TIMES, use_discrete_timesteps=True, sample_method="logit-normal", loc=math.log(SHIFT), scale=SPREAD
    )


def _times(steps: int) -> list[int]:
    """The times of ``steps`` Euler steps, from noise to the last before 0, shifted like those of training."""
    even = [1 - step / steps for step in range(steps)]
    return [max(1, round(TIMES * SHIFT * time / (1 + (SHIFT - 1) * time))) for time in even]


def built(shape: Sequence[int], dim: int, networks: Networks, tensors: dict[str, Tensor]) -> Decoder:
    """A decoder with these weights. Raises ValueError unless the sizes in an untrusted file match its weights; the
    decoder is first built on the meta device, so that no memory is allocated for wrong sizes."""
    with torch.device("meta"):
        decoder = Decoder(shape, dim, networks)
    there = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    if there != {name: (value.shape, value.dtype) for name, value in decoder.state_dict().items()}:
        raise ValueError("sizes and weights do not agree")
    decoder.load_state_dict(tensors, assign=True)
    return decoder
