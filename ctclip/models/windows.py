"""Attention over a large grid of tokens, within windows and between them.

Within a window, every token attends to the others and to the registers, which attend to all tokens (as in ViTDet, Li et
al. 2022). Between windows, a layer works on one token per window, the mean of its tokens, and adds its change to each
of them, like the carrier tokens of FasterViT (Hatamizadeh et al. 2024), but without parameters of their own. For such a
layer, 13,824 tokens in windows of 144 become 96.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class Windows(NamedTuple):
    """Which tokens attend to each other: S windows of at most L tokens, for all volumes of the batch in order."""

    rows: Tensor  # (S, L) indices of each window's tokens among the batch's B * M
    real: Tensor | None  # (S, L) bool; None: all windows are full
    volume: Tensor  # (S,) index of each window's volume
    place: Tensor  # (S,) index of each window among B * W, where W is the largest number of windows of a volume
    there: Tensor | None  # (B, W) bool, which of these exist; None: every volume has W
    back: Tensor  # (B * M,) index of each token among S * L


def cut(
    places: np.ndarray,
    is_real: np.ndarray | None,
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    device: torch.device,
) -> Windows:
    """Windows of ``window`` tokens; those without a real token are left out. ``places`` (B, M): each token's index in
    the grid; ``is_real`` (B, M) bool, None for all. Both are on the host, so that nothing waits for the device."""
    batch, count = places.shape
    blocks = [-(-extent // step) for extent, step in zip(grid, window, strict=True)]
    cell = [axis // step for axis, step in zip(np.unravel_index(places, grid), window, strict=True)]
    number = np.arange(batch)[:, None] * math.prod(blocks) + np.ravel_multi_index(cell, blocks)
    rows = np.arange(batch * count) if is_real is None else np.flatnonzero(is_real)
    rows = rows[np.argsort(number.ravel()[rows], kind="stable")]
    _, first, counts = np.unique(number.ravel()[rows], return_index=True, return_counts=True)
    most = int(counts.max())
    slots = np.repeat(np.arange(len(counts)) * most - first, counts) + np.arange(len(rows))
    table, back = np.zeros(len(counts) * most, dtype=np.int64), np.zeros(batch * count, dtype=np.int64)
    table[slots], back[rows] = rows, slots
    real, volume = np.arange(most) < counts[:, None], rows[first] // count
    each = np.bincount(volume, minlength=batch)
    there = np.arange(each.max()) < each[:, None]

    def moved(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device)

    return Windows(
        moved(table.reshape(-1, most)),
        None if real.all() else moved(real),
        moved(volume),
        moved(np.flatnonzero(there)),
        None if there.all() else moved(there),
        moved(back),
    )


def within(query: Tensor, key: Tensor, value: Tensor, attends: Tensor | None, windows: Windows) -> Tensor:
    """Attention (B, heads, registers + M, c) of each token to its window and the registers, and of registers to all
    tokens."""
    registers = query.shape[2] - len(windows.back) // len(query)
    keys, values = (
        torch.cat([part[windows.volume, :, :registers], _gathered(part[:, :, registers:], windows)], dim=2)
        for part in (key, value)
    )
    mask = None if windows.real is None else F.pad(windows.real, (registers, 0), value=True)[:, None, None, :]
    local = F.scaled_dot_product_attention(_gathered(query[:, :, registers:], windows), keys, values, attn_mask=mask)
    local = rearrange(local, "s h l c -> (s l) h c")[windows.back]
    local = rearrange(local, "(b m) h c -> b h m c", b=len(query))
    if not registers:
        return local
    everywhere = F.scaled_dot_product_attention(query[:, :, :registers], key, value, attn_mask=attends)
    return torch.cat([everywhere, local], dim=2)


def _gathered(part: Tensor, windows: Windows) -> Tensor:
    """(B, heads, M, c) -> (S, heads, L, c)."""
    return rearrange(rearrange(part, "b h m c -> (b m) h c")[windows.rows], "s l h c -> s h l c")


def means(parts: Tensor, windows: Windows, batch: int) -> Tensor:
    """(B or 1, M, C) -> (B, W, C): the mean of the real tokens of each window; zeros for missing windows."""
    inside = rearrange(parts.expand(batch, -1, -1), "b m c -> (b m) c")[windows.rows]
    if windows.real is None:
        average = inside.mean(dim=1)
    else:
        real = windows.real[..., None]
        average = (inside * real).sum(dim=1) / real.sum(dim=1)
    if windows.there is None:
        return rearrange(average, "(b w) c -> b w c", b=batch)
    return (
        average.new_zeros(windows.there.numel(), average.shape[1])
        .index_copy(0, windows.place, average)
        .unflatten(0, windows.there.shape)
    )


def to_tokens(parts: Tensor, windows: Windows) -> Tensor:
    """(B, W, C) -> (B, M, C): give each token the value of its window."""
    window = windows.place[windows.back // windows.rows.shape[1]]
    return rearrange(rearrange(parts, "b w c -> (b w) c")[window], "(b m) c -> b m c", b=len(parts))
