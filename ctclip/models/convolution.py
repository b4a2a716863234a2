"""3-D convolutions that are right on CPUs with few slices.

oneDNN's kernels (torch 2.13) read and write outside their memory if a volume has so few slices that each position of the
kernel extends beyond it: gradients are random or NaN, or the process crashes. In bfloat16 that happens with two slices
and a kernel of 3, as in the last stage of a ResNet on a small grid; in float32 with a kernel of 7."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Convolution3d(nn.Conv3d):
    """`torch.nn.Conv3d` that adds the padding slices itself where the kernel of CPUs is wrong."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if input.device.type != "cpu" or isinstance(padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        first = -padding[0] % self.stride[0]
        if first + self.dilation[0] * (self.kernel_size[0] - 1) < input.shape[2]:
            # At ``first``, the kernel lies within the volume.
            return super()._conv_forward(input, weight, bias)
        padded = F.pad(input, (0, 0, 0, 0, padding[0], padding[0]))
        return F.conv3d(padded, weight, bias, self.stride, (0, *padding[1:]), self.dilation, self.groups)


def right_convolutions(module: nn.Module) -> None:
    """Turn every `torch.nn.Conv3d` in a module that others wrote (MONAI's networks) into a ``Convolution3d``."""
    for part in module.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = Convolution3d
