"""Batch normalisation over the global batch, on any backend.

Chests are similar. With normalisation over channels alone (layer or group norm), the common part of all patients
dominates their differences, and a convolutional stem trained from scratch on a few thousand volumes stays at chance.
Statistics over patients remove the common part. They are computed over the global batch, so that the result does not
depend on the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ctclip import distributed


class GlobalBatchNorm3d(nn.BatchNorm3d):
    """``nn.BatchNorm3d`` whose training statistics are summed over ranks (torch's own needs CUDA for that)."""

    def forward(self, cells: Tensor) -> Tensor:
        """(B, C, D, H, W) -> the same shape."""
        if not self.training:
            return super().forward(cells)
        normal, mean, variance, count = _GlobalNorm.apply(cells, self.weight, self.bias, self.eps)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * count / (count - 1), momentum)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
        return normal


class _GlobalNorm(torch.autograd.Function):
    """Batch normalisation (Ioffe & Szegedy 2015) with sums over ranks. The closed-form gradient needs a few passes over
    memory; differentiating through the statistics takes a dozen."""

    @staticmethod
    def forward(context: Any, cells: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        rows = _rows(cells)
        # Statistics are computed in float32, because bfloat16 cannot even count the cells. (A vector norm would compute
        # both at once, at a quarter of the speed.)
        squares = rows.float().square().sum(dim=0)
        sums = torch.cat([rows.sum(dim=0, dtype=torch.float32), squares, squares.new_full((1,), len(rows))])
        distributed.sum_over_ranks(sums)
        width, count = rows.shape[1], sums[-1]
        mean = sums[:width] / count
        variance = (sums[width:-1] / count - mean.square()).clamp(min=0)
        context.save_for_backward(cells, weight, mean, torch.rsqrt(variance + eps), count)
        context.mark_non_differentiable(mean, variance, count)
        return functional.batch_norm(cells, mean, variance, weight, bias, False, eps=eps), mean, variance, count

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cells, weight, mean, inverse, count = context.saved_tensors
        gradient = gradients[0]
        rows, steep = _rows(cells), _rows(gradient).float()
        total = steep.sum(dim=0)
        projected = ((steep * rows).sum(dim=0) - mean * total) * inverse
        sums = torch.cat([total, projected])
        distributed.sum_over_ranks(sums)
        width = len(mean)
        scale = weight * inverse
        # scale * (g - sum(g) / n - x_hat * sum(g * x_hat) / n), written as a * g + b * x + c for each channel.
        slope = -scale * inverse * sums[width:] / count
        constant = -scale * sums[:width] / count - slope * mean
        result = torch.addcmul(constant.view(1, -1), steep, scale.view(1, -1)).addcmul_(rows, slope.view(1, -1))
        cells_gradient = result.to(cells.dtype).view(_innermost(cells)).permute(0, 4, 1, 2, 3)
        return cells_gradient, projected, total, None


def _innermost(cells: Tensor) -> tuple[int, ...]:
    batch, width, *grid = cells.shape
    return (batch, *grid, width)


def _rows(cells: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B * D * H * W, C); no copy if channels are innermost in memory."""
    return cells.permute(0, 2, 3, 4, 1).reshape(-1, cells.shape[1])
