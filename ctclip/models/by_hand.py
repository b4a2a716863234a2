"""Three steps of a transformer layer whose gradient PyTorch's CPU kernels compute slowly, differentiated by hand.

Each takes a cache's worth of rows at a time, and keeps for the backward pass what it was given, not what it made on the
way. Elsewhere (a GPU, autocast, inference, torch.compile) PyTorch's own operations are called, whose results these equal.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, CHANNELS = 64, 128


def gated(up_gate: Tensor) -> Tensor:
    """(..., 2 n) -> (..., n): the first half times the GELU of the second (Shazeer 2020)."""
    if _by_hand(up_gate):
        return _Gated.apply(up_gate)
    up, gate = up_gate.chunk(2, dim=-1)
    return up * F.gelu(gate)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Queries, keys, values (S, heads, n, c), a bias (heads, n, n) of the scores -> (S, heads, n, c)."""
    # PyTorch's fused attention has no gradient of a bias: asked for it, it writes all score matrices out.
    if _by_hand(query):
        return _Attention.apply(query, key, value, bias, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=scale)


def depthwise(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cells (B, t, h, w, C), padded already; weight (C, 1, kt, kh, kw) -> (B, t - kt + 1, h - kh + 1, w - kw + 1, C)."""
    if _by_hand(cells):
        return _Depthwise.apply(cells, weight, bias)
    return _convolve(cells, weight, bias)


def _by_hand(given: Tensor) -> bool:
    return (
        given.device.type == "cpu"
        and given.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up_gate: Tensor) -> Tensor:
        ctx.save_for_backward(up_gate)
        made = up_gate.new_empty(*up_gate.shape[:-1], up_gate.shape[-1] // 2)
        for given, into in zip(_blocks(up_gate), _blocks(made), strict=True):
            up, gate = given.chunk(2, dim=-1)
            torch.mul(up, F.gelu(gate), out=into)
        return made

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (up_gate,) = ctx.saved_tensors
        made = torch.empty_like(up_gate)
        for given, above, into in zip(_blocks(up_gate), _blocks(slope.contiguous()), _blocks(made), strict=True):
            (up, gate), (of_up, of_gate) = given.chunk(2, dim=-1), into.chunk(2, dim=-1)
            torch.mul(above, F.gelu(gate), out=of_up)
            torch.ops.aten.gelu_backward.grad_input(above * up, gate, grad_input=of_gate)
        return made


def _blocks(given: Tensor) -> tuple[Tensor, ...]:
    return given.view(-1, given.shape[-1]).split(ROWS)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        # Detached: the fused kernel is refused to a mask that wants a gradient, even where none is recorded.
        made = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.detach()[None], scale=scale)
        ctx.save_for_backward(query, key, value, bias, made)
        ctx.scale = scale
        return made

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, made = ctx.saved_tensors
        # In memory as a linear map of all heads side by side makes and takes them.
        of_query, of_key, of_value = (torch.empty_like(query.transpose(1, 2)).transpose(1, 2) for _ in range(3))
        of_bias = torch.zeros_like(bias)
        # The part of a score's gradient that softmax's normalisation takes away again (Dao et al. 2022, section 3.1).
        common = (slope * made).sum(dim=-1, keepdim=True)
        for head in range(query.shape[1]):
            for row in range(len(query)):
                at = (row, head)
                q, k, v, above = query[at], key[at], value[at], slope[at]
                weights = torch.addmm(bias[head], q, k.T, alpha=ctx.scale).softmax(dim=-1)
                of_scores = torch.addmm(common[at], above, v.T, beta=-1).mul_(weights)
                of_bias[head] += of_scores
                of_value[at] = weights.T @ above
                of_query[at] = (of_scores @ k).mul_(ctx.scale)
                of_key[at] = (of_scores.T @ q).mul_(ctx.scale)
        return of_query, of_key, of_value, of_bias, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weight)
        return _convolve(cells, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells, weight = ctx.saved_tensors
        _, slabs, height, width, channels = slope.shape
        kt, kh, kw = weight.shape[2:]
        around = F.pad(slope, (0, 0, kw - 1, kw - 1, kh - 1, kh - 1, kt - 1, kt - 1))
        of_cells = _convolve(around, weight.flip(2, 3, 4), None)
        of_weight = weight.new_zeros(kt, kh, kw, channels)
        taps = list(itertools.product(range(kt), range(kh), range(kw)))
        for block, above in zip(cells, slope, strict=True):
            for slab, start in itertools.product(range(slabs), range(0, channels, CHANNELS)):
                some = slice(start, start + CHANNELS)
                given, times = block[slab : slab + kt, :, :, some], above[slab, :, :, some]
                product = torch.empty_like(times, memory_format=torch.contiguous_format)
                for t, h, w in taps:
                    torch.mul(given[t, h : h + height, w : w + width], times, out=product)
                    of_weight[t, h, w, some] += product.sum(dim=(0, 1))
        return of_cells, of_weight.permute(3, 0, 1, 2)[:, None], slope.sum(dim=(0, 1, 2, 3))


def _convolve(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(cells.permute(0, 4, 1, 2, 3), weight, bias, groups=len(weight)).permute(0, 2, 3, 4, 1)
