"""A prior maps the embedding of a text to embeddings of matching volumes (unCLIP, Ramesh et al. 2022, section 2.2). As
a head, it scores findings by their prompts after mapping these to volume embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctclip.errors import CheckpointError
from ctclip.heads.head import Head, reading
from ctclip.heads.prompts import PromptHead, pair_vectors, read_names
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.prompts import PromptSet, load_prompts

Kind = Literal["ridge", "mlp", "diffusion"]
SIZE, WEIGHTS = "prior.yaml", "prior.safetensors"
# Number of sampler steps, and number of samples whose mean represents the volumes of a text.
STEPS, DRAWS = 32, 16
# Nichol & Dhariwal 2021, eq. 17; clipped where x0 would be indistinguishable from noise.
OFFSET, LAST = 0.008, 0.999


class Prior(nn.Module):
    """``ridge``: a linear map; ``mlp``: a linear map plus a network; ``diffusion``: a network that predicts the
    embedding of the volume (x0) from a noisy one, the time and the text.

    The target is the volume's embedding, centred and scaled (``mean``, ``scale``) to unit variance over the training
    volumes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: Kind, dim: int, width: int = 512, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        if kind not in ("ridge", "mlp", "diffusion"):
            raise ValueError(f"no prior of kind {kind!r}")
        self.size: dict[str, Any] = {"kind": kind, "dim": dim, "width": width, "depth": depth, "dropout": dropout}
        self.kind: Kind = kind
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(1))
        if kind != "diffusion":
            self.linear = nn.Linear(dim, dim)
        if kind == "mlp":
            self.network = _network(dim, dim, width, depth, dropout)
        if kind == "diffusion":
            self.absent = nn.Parameter(torch.zeros(dim))  # represents a missing text
            self.times = nn.Linear(2 * TIMES, width)
            self.network = _network(2 * dim + width, dim, width, depth, dropout)

    def target(self, volumes: Tensor) -> Tensor:
        """Unit vectors (n, dim) of volumes -> standardised targets."""
        return (volumes - self.mean) / self.scale

    def regress(self, texts: Tensor) -> Tensor:
        """Unit vectors (n, dim) of texts -> targets (n, dim)."""
        direct: Tensor = self.linear(texts)
        return direct + self.network(texts) if self.kind == "mlp" else direct

    def denoise(self, noisy: Tensor, time: Tensor, texts: Tensor) -> Tensor:
        """noisy (n, dim), time (n,) in [0, 1], texts (n, dim), scaled as ``scaled`` does -> x0 (n, dim)."""
        angles = time[:, None] * torch.exp(torch.arange(TIMES, device=time.device) * (math.log(1000.0) / (TIMES - 1)))
        step = F.silu(self.times(torch.cat([angles.sin(), angles.cos()], dim=1)))
        denoised: Tensor = self.network(torch.cat([noisy, texts, step], dim=1))
        return denoised

    def scaled(self, texts: Tensor) -> Tensor:
        """Scale unit vectors to coordinates of unit variance, which suits a network."""
        return texts * math.sqrt(texts.shape[1])

    @torch.no_grad()
    def sample(self, texts: Tensor, draws: int = 1, *, guidance: float = 1.0, seed: int = 0) -> Tensor:
        """Unit vectors (n, dim) of texts -> (n, draws, dim) unit vectors of volumes. A regression is deterministic: its
        ``draws`` are equal. Deterministic DDIM steps from noise (Song et al. 2021, eq. 12 with sigma 0), with
        classifier-free guidance (Ho & Salimans 2022, eq. 6)."""
        if self.kind != "diffusion":
            one = self._unit(self.regress(texts))
            return one[:, None].expand(-1, draws, -1)
        random = torch.Generator().manual_seed(seed)
        given = self.scaled(texts).repeat_interleave(draws, dim=0)
        # The same noise for every text, so that equal texts give equal volumes.
        noise = torch.randn(draws, texts.shape[1], generator=random).to(texts).repeat(len(texts), 1)
        x, times = noise, torch.linspace(LAST, 0, STEPS + 1)
        absent = self.absent.expand_as(given)
        for now, following in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            moment = torch.full((len(x),), now, device=x.device)
            clean = self.denoise(x, moment, given)
            if guidance != 1:
                without = self.denoise(x, moment, absent)
                clean = without + guidance * (clean - without)
            kept, lost = signal_and_noise(now)
            residual = (x - kept * clean) / lost
            kept, lost = signal_and_noise(following)
            x = kept * clean + lost * residual
        return self._unit(x).unflatten(0, (len(texts), draws))

    @torch.no_grad()
    def expected(self, texts: Tensor) -> Tensor:
        """Unit vectors (n, dim) of texts -> (n, dim): the direction of the mean volume; for a diffusion, the mean of
        ``DRAWS`` samples."""
        return F.normalize(self.sample(texts, DRAWS if self.kind == "diffusion" else 1).mean(dim=1), dim=-1)

    @torch.no_grad()
    def best(self, texts: Tensor, draws: int = 2, *, guidance: float = 1.0, seed: int = 0) -> Tensor:
        """Unit vectors (n, dim) of texts -> (n, dim): the sample nearest to the text (unCLIP, section 2.2)."""
        drawn = self.sample(texts, draws, guidance=guidance, seed=seed)
        nearest = torch.einsum("nkd,nd->nk", drawn, texts).argmax(dim=1)
        return drawn[torch.arange(len(texts), device=texts.device), nearest]

    def _unit(self, values: Tensor) -> Tensor:
        return F.normalize(values * self.scale + self.mean, dim=-1)


TIMES = 32


def signal_and_noise(time: float) -> tuple[float, float]:
    """sqrt(alpha bar) and sqrt(1 - alpha bar) of the cosine schedule at ``time`` in [0, 1]."""
    kept = math.cos((time + OFFSET) / (1 + OFFSET) * math.pi / 2) / math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)
    return kept, math.sqrt(max(1 - kept**2, 1e-8))


def _network(inside: int, outside: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inside, width)]
    layers += [_Block(width, dropout) for _ in range(depth)]
    return nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, outside))


def _check_size(size: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the sizes in an untrusted file match its weights, before memory is allocated for them."""
    blocks = {name.split(".")[1] for name in tensors if ".inner." in name}
    agree = size["dim"] == len(tensors["mean"])
    if size["kind"] != "ridge":
        agree &= (size["width"], size["depth"]) == (len(tensors["network.0.weight"]), len(blocks))
    if not agree:
        raise ValueError("sizes and weights do not agree")


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def forward(self, values: Tensor) -> Tensor:
        changed: Tensor = values + self.inner(values)
        return changed


class PriorHead(Head):
    """Scores a finding by the softmax over its positive and negative prompt, like ``PromptHead``, after the prior has
    mapped both to volume embeddings."""

    kind = "prior"

    def __init__(self, model: DualEncoder, prior: Prior, prompts: PromptSet, names: Sequence[str]) -> None:
        """``prior``: trained by `ctclip adapt --method prior`; ``names``: the findings, named in ``prompts`` or not."""
        super().__init__(model)
        self.prior = prior.to(model.device).eval().requires_grad_(False)
        self.prompts, self.names = prompts, tuple(names)
        self.source = f"{prompts.identity()} by {prior.kind} prior"
        positive, negative = pair_vectors(model, prompts, self.names, self.volumes)
        self.direction = positive - negative

    @torch.no_grad()
    def volumes(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (n, dim) unit vectors of the volumes expected for them."""
        return self.prior.expected(self.model.encode_text(texts))

    def score(self, encoded: Encoded) -> Tensor:
        if encoded.embedding is None:
            raise ValueError("these volumes were encoded without their embedding; call DualEncoder.encode")
        return self.model.logits(encoded.embedding, self.direction)

    def texts(self) -> Tensor:
        return pair_vectors(self.model, self.prompts, self.names)[0]

    def fingerprint(self, probe: Tensor) -> bytes:
        return self.direction.float().cpu().numpy().tobytes()

    def save(self, folder: Path) -> None:
        save_prior(folder, self.prior)
        PromptHead.write(folder, self.prompts, self.names)

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> PriorHead:
        return cls(model, load_prior(folder, model), load_prompts(folder / "prompts.yaml"), read_names(folder))


def save_prior(folder: Path, prior: Prior) -> None:
    """Write a prior to the folder of a head."""
    save_file({name: value.cpu().contiguous() for name, value in prior.state_dict().items()}, folder / WEIGHTS)
    (folder / SIZE).write_text(yaml.safe_dump(prior.size, sort_keys=False), encoding="utf-8")


def load_prior(folder: Path, model: DualEncoder) -> Prior:
    """Read a prior from the folder of a head. Raises CheckpointError if it is damaged or belongs to another model."""
    with reading(folder, "its prior is"):
        size, tensors = read_yaml(folder / SIZE), load_file(folder / WEIGHTS)
        _check_size(size, tensors)
        prior = Prior(**size)
        prior.load_state_dict(tensors)
    if prior.size["dim"] != model.config.dim:
        raise CheckpointError(
            f"{folder}: its prior maps embeddings of {prior.size['dim']} dimensions, but those of the model have "
            f"{model.config.dim}: it belongs to another model"
        )
    return prior
