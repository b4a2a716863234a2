"""Hand-written gradients for four operations of a transformer layer that are slow in PyTorch's CPU kernels.

Each operation processes as many rows at a time as fit into the cache, and saves its inputs for the backward pass
instead of intermediate results. On a GPU, and under autocast, inference mode or torch.compile, PyTorch's own operations
are used, with equal results. The exception is the depthwise convolution on a GPU: the gradient of the 3-D kernel is 80
times slower than that of three 2-D kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS, LINES = 64, 8
allowed = True


@contextmanager
def switched_off() -> Iterator[None]:
    """Also use PyTorch's own operations on a CPU."""
    global allowed
    before, allowed = allowed, False
    try:
        yield
    finally:
        allowed = before


def gated(up_gate: Tensor) -> Tensor:
    """(..., 2 n) -> (..., n): the first half multiplied by the GELU of the second (Shazeer 2020)."""
    if _by_hand(up_gate):
        result: Tensor = _Gated.apply(up_gate)  # type: ignore[no-untyped-call]
        return result
    up, gate = up_gate.chunk(2, dim=-1)
    return up * F.gelu(gate)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Queries, keys, values (S, heads, n, c), a bias (heads, n, n) of the scores -> (S, heads, n, c)."""
    # PyTorch's fused attention has no gradient for a bias; if one is needed, it materialises all score matrices.
    if _by_hand(query):
        return _Attention.apply(query, key, value, bias, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=scale)


def depthwise(cells: Tensor, convolution: nn.Conv3d) -> Tensor:
    """Depthwise convolution of cells (B, t, h, w, C) with a kernel of three, which reaches two slabs back and one cell
    to each side in plane."""
    run: Any = _Depthwise.apply if _by_hand(cells) else _by_planes if cells.is_cuda else _convolve
    result: Tensor = run(cells, convolution.weight, convolution.bias)
    return result


def unit(given: Tensor, scale: Tensor) -> Tensor:
    """Normalise (..., heads, c) to unit length and multiply by ``scale`` (c)."""
    if _by_hand(given):
        result: Tensor = _Unit.apply(given, scale)  # type: ignore[no-untyped-call]
        return result
    return F.normalize(given, dim=-1) * scale


def _by_hand(given: Tensor) -> bool:
    return (
        allowed
        and given.device.type == "cpu"
        and given.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up_gate: Tensor) -> Tensor:
        ctx.save_for_backward(up_gate)
        result = up_gate.new_empty(*up_gate.shape[:-1], up_gate.shape[-1] // 2)
        for given, into in zip(_blocks(up_gate), _blocks(result), strict=True):
            up, gate = given.chunk(2, dim=-1)
            torch.mul(up, F.gelu(gate), out=into)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (up_gate,) = ctx.saved_tensors
        result = torch.empty_like(up_gate)
        for given, above, into in zip(_blocks(up_gate), _blocks(slope.contiguous()), _blocks(result), strict=True):
            (up, gate), (of_up, of_gate) = given.chunk(2, dim=-1), into.chunk(2, dim=-1)
            torch.mul(above, F.gelu(gate), out=of_up)
            torch.ops.aten.gelu_backward.grad_input(above * up, gate, grad_input=of_gate)
        return result


def _blocks(given: Tensor) -> tuple[Tensor, ...]:
    return given.view(-1, given.shape[-1]).split(ROWS)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        # Detached, because PyTorch does not use the fused kernel for a mask that requires a gradient, even if none is
        # recorded.
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.detach()[None], scale=scale)
        ctx.save_for_backward(query, key, value, bias, result)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, result = ctx.saved_tensors
        # The memory layout of a linear map of all heads.
        of_query, of_key, of_value = (torch.empty_like(query.transpose(1, 2)).transpose(1, 2) for _ in range(3))
        of_bias = torch.zeros_like(bias)
        # The part of a score's gradient that the softmax normalisation removes (Dao et al. 2022, section 3.1).
        common = (slope * result).sum(dim=-1, keepdim=True)
        weights, of_scores = torch.empty_like(bias[0]), torch.empty_like(bias[0])
        for head, row in itertools.product(range(query.shape[1]), range(len(query))):
            q, k, v, above = (part[row, head] for part in (query, key, value, slope))
            torch.softmax(torch.addmm(bias[head], q, k.T, alpha=ctx.scale, out=weights), dim=-1, out=weights)
            torch.mm(above, v.T, out=of_scores).sub_(common[row, head]).mul_(weights)
            of_bias[head] += of_scores
            torch.mm(weights.T, above, out=of_value[row, head])
            torch.mm(of_scores, k, out=of_query[row, head])
            torch.mm(of_scores.T, q, out=of_key[row, head])
        return of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, of_bias, None


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(given, scale)
        result = torch.empty_like(given, memory_format=torch.contiguous_format)
        for some, into in zip(_heads(given), _heads(result), strict=True):
            torch.div(some, _length(some), out=into).mul_(scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        given, scale = ctx.saved_tensors
        result = torch.empty_like(slope, memory_format=torch.contiguous_format)
        of_scale = torch.zeros_like(scale)
        for some, above, into in zip(_heads(given), _heads(slope), _heads(result), strict=True):
            length = _length(some)
            direction = some / length
            along = above * direction
            of_scale += along.sum(dim=(0, 1))
            outward = along.mul_(scale).sum(dim=-1, keepdim=True)
            torch.mul(above, scale, out=into).sub_(direction.mul_(outward)).div_(length)
        return result, of_scale


def _heads(given: Tensor) -> tuple[Tensor, ...]:
    return given.flatten(0, -3).split(8 * ROWS)


def _length(given: Tensor) -> Tensor:
    return torch.linalg.vector_norm(given, dim=-1, keepdim=True).clamp_min_(1e-12)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weight)
        return _convolve(cells, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells, weight = ctx.saved_tensors
        # The gradient of the input is a convolution with the flipped kernel, without the first two slabs instead of the
        # last two.
        of_cells = _padded(slope, weight.flip(2, 3, 4), None)[:, 2:]
        of_weight = weight.new_zeros(3, 3, 3, cells.shape[-1])
        for given, above in zip(cells, slope, strict=True):
            slabs, height, width = above.shape[:3]
            for slab, top in itertools.product(range(slabs), range(0, height, LINES)):
                lines = range(top, min(top + LINES, height))
                for t, h, w in itertools.product(range(max(0, 2 - slab), 3), range(3), range(3)):
                    down, there_down = _overlap(lines, h - 1, height)
                    across, there_across = _overlap(range(width), w - 1, width)
                    product = given[slab + t - 2, there_down, there_across] * above[slab, down, across]
                    of_weight[t, h, w] += product.sum(dim=(0, 1))
        return of_cells, of_weight.permute(3, 0, 1, 2)[:, None], slope.sum(dim=(0, 1, 2, 3))


def _overlap(places: range, offset: int, length: int) -> tuple[slice, slice]:
    """The ``places`` that have a neighbour at ``offset``, and those neighbours."""
    first, last = max(places.start, -offset), min(places.stop, length - offset)
    return slice(first, last), slice(first + offset, last + offset)


def _convolve(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _padded(cells, weight, bias)[:, : cells.shape[1]]


def _by_planes(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same convolution as the sum of three 2-D convolutions: of the slab two back, the previous slab, and the slab
    itself."""
    slabs, total = cells.shape[1], bias
    # Slabs as a batch, channels innermost: the memory layout of cuDNN's fast kernels.
    before = F.pad(cells, (0, 0, 0, 0, 0, 0, 2, 0))
    for tap in range(3):
        planes = before[:, tap : tap + slabs].flatten(0, 1).permute(0, 3, 1, 2)
        result = F.conv2d(planes, weight[:, :, tap], padding=1, groups=len(weight))
        total = total + result.permute(0, 2, 3, 1).view(cells.shape)
    return total


def _padded(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with two slabs of padding at both ends, (B, t, h, w, C) -> (B, t + 2, h, w, C); conv3d pads
    without a copy."""
    result = F.conv3d(cells.permute(0, 4, 1, 2, 3), weight, bias, padding=(2, 1, 1), groups=len(weight))
    return result.permute(0, 2, 3, 4, 1)
