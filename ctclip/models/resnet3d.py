"""MONAI's 3-D ResNets under our interface."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ctclip.config import ResNet3DConfig
from ctclip.models.outputs import VolumeTokens, air_where_padded, check_volume

BLOCKS = {18: ("basic", (2, 2, 2, 2)), 50: ("bottleneck", (3, 4, 6, 3))}
GROUP_CHANNELS = 8


class ResNet3D(nn.Module):
    """volume (B, 1, D, H, W) in [-1, 1] -> VolumeTokens: the last feature map's cells, and their mean and maximum."""

    def __init__(self, config: ResNet3DConfig) -> None:
        super().__init__()
        from monai.networks.nets import ResNet

        block, layers = BLOCKS[config.depth]
        widths = [round(width * config.width_factor) for width in (64, 128, 256, 512)]
        norm = ("group", {"num_groups": GROUP_CHANNELS}) if config.norm == "group" else "batch"
        self.net: Any = ResNet(
            block, list(layers), widths, spatial_dims=3, n_input_channels=1, conv1_t_size=7,
            conv1_t_stride=config.stem_stride,  # type: ignore[arg-type]
            feed_forward=False, norm=norm,
        )  # fmt: skip
        self.token_width = widths[-1] * (4 if block == "bottleneck" else 1)
        self.width = 2 * self.token_width

    def forward(self, volume: Tensor, mask: Tensor | None = None) -> VolumeTokens:
        """``mask`` (B, 1, D, H, W) bool, true where voxels are real: convolutions see padding as air, and cells of
        nothing else are not pooled."""
        check_volume(volume)
        net = self.net
        cells = net.maxpool(net.act(net.bn1(net.conv1(air_where_padded(volume, mask)))))
        cells = net.layer4(net.layer3(net.layer2(net.layer1(cells))))
        tokens = rearrange(cells, "b c d h w -> b (d h w) c")
        grid = (cells.shape[2], cells.shape[3], cells.shape[4])
        if mask is None:
            return VolumeTokens(tokens, grid, torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1))
        real = F.adaptive_max_pool3d(mask.to(tokens.dtype), grid).flatten(2).mT > 0
        mean = (tokens * real).sum(dim=1) / real.sum(dim=1)
        largest = tokens.masked_fill(~real, float("-inf")).amax(dim=1)
        return VolumeTokens(tokens * real, grid, torch.cat([mean, largest], dim=1))
