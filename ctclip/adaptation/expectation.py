"""The expected latents of a volume with a given embedding, by ridge regression.

A network that sees a condition only as a vector learns slowly where in the body a finding belongs. The regression is fitted
in closed form and tells it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctclip.heads.decoder import Decoder

# Penalties relative to the mean variance of the conditions, the share of patients that chooses one, and latents at a time.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT, TOGETHER = 0.2, 256


@torch.no_grad()
def fit_expectation(decoder: Decoder, latents: Tensor, volumes: Tensor, patients: np.ndarray, seed: int) -> None:
    """Set the decoder's ``expectation``: latents (n, latent, d, h, w), embeddings of the volumes (n, dim), patients
    (n,). The strength of the regression has the lowest error over held-out patients."""
    device = decoder.scale.device
    names = np.random.default_rng([seed, 73]).permutation(np.unique(patients))
    held = torch.from_numpy(np.isin(patients, names[: round(HELD_OUT * len(names))]))
    given = decoder.condition(volumes.to(device))
    # Products of the patients that fit, and of those that choose the strength.
    parts = (~held, held)
    squares = torch.stack([given[part].T @ given[part] for part in parts])
    products = squares.new_zeros(2, given.shape[1], decoder.expectation[0].numel())
    for begin in range(0, len(latents), TOGETHER):
        rows = slice(begin, begin + TOGETHER)
        wanted = decoder.coarse(decoder.standard(latents[rows].float().to(device))).flatten(1)
        for product, part in zip(products, parts, strict=True):
            product += given[rows][part[rows]].T @ wanted[part[rows]]
    variance, errors = squares[0].diagonal().mean(), []
    for penalty in PENALTIES:
        weights = _ridge(squares[0], products[0], penalty * variance)
        errors.append(float((weights * (squares[1] @ weights - 2 * products[1])).sum()))
    square, product = squares.sum(0), products.sum(0)
    decoder.set_expectation(_ridge(square, product, PENALTIES[int(np.argmin(errors))] * variance), square)


def _ridge(square: Tensor, product: Tensor, penalty: Tensor) -> Tensor:
    return torch.linalg.solve(square + penalty * torch.eye(len(square)).to(square), product)
