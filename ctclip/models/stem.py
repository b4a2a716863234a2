"""The convolutional stem of our 3-D vision transformer: HU windows, patches and stages of residual convolutions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ctclip.models.batchnorm import GlobalBatchNorm3d
from ctclip.models.convolution import Convolution3d
from ctclip.models.pooling import largest_token, mean_token, real_cells

if TYPE_CHECKING:
    from ctclip.models.vit3d import ViT3DConfig


class Stem(nn.Module):
    """Volume -> cells of tokens: HU windows, a linear map of each patch, then stages of convolutions.

    With ``extremes``, the minimum and maximum of each patch and window are additional inputs, because a small
    calcification is lost in a weighted sum of 64 voxels. Each stage mixes neighbours by 3x3x3 convolutions and ends
    with a strided one that halves each axis. With ``pool_stem``, the mean and maximum of each channel before that
    convolution are returned too, so that small structures contribute even if they are lost in the tokens.
    """

    def __init__(self, config: ViT3DConfig, hu_window: tuple[float, float]) -> None:
        """``hu_window``: the HU values of -1 and 1 in the input."""
        super().__init__()
        self.patch = config.patch
        self.hu_window, self.windows = hu_window, config.windows
        widths = [width for width, _ in config.stages] + [config.width]
        self.embed = nn.Linear(math.prod(config.patch) * len(config.windows), widths[0])
        self.extremes = nn.Linear(2 * len(config.windows), widths[0], bias=False) if config.extremes else None
        self.embed_norm = GlobalBatchNorm3d(widths[0]) if config.stages else nn.Identity()
        layers: list[nn.Module] = []
        for (width, depth), after in zip(config.stages, widths[1:], strict=True):
            layers += [Convolution(width, width) for _ in range(depth)]
            layers.append(Convolution(width, after, stride=2))
        self.convolutions = nn.Sequential(*layers)
        self.pools = config.pool_stem
        self.pooled_width = 2 * sum(widths[:-1]) if config.pool_stem else 0

    def forward(
        self, volume: Tensor, mask: Tensor | None = None, stages: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """volume and mask (B, 1, D, H, W) -> (B, C, d, h, w), and the pooled features of the stages, (B, ...) each;
        ``stages``: a list to which the cells before pooling are appended, (B, C, d, h, w) each."""
        pd, ph, pw = self.patch
        patches = rearrange(volume, "b 1 (d pd) (h ph) (w pw) -> b d h w (pd ph pw)", pd=pd, ph=ph, pw=pw)
        windowed = [self._window(patches, low, high) for low, high in self.windows]
        embedded = self.embed(torch.cat(windowed, dim=-1))
        if self.extremes is not None:
            spots = [extreme for window in windowed for extreme in (window.amin(dim=-1), window.amax(dim=-1))]
            embedded = embedded + self.extremes(torch.stack(spots, dim=-1))
        # The channel axis stays innermost in memory, which suits both convolutions and linear maps.
        cells = rearrange(embedded, "b d h w c -> b c d h w")
        if len(self.convolutions):
            cells = F.relu(self.embed_norm(cells))
        pooled: list[Tensor] = []
        for layer in self.convolutions:
            if self.pools and layer.halves:
                if stages is not None:
                    stages.append(cells)
                real = real_cells(mask, cells.shape[2:])
                tokens = rearrange(cells, "b c d h w -> b (d h w) c")
                pooled += [mean_token(tokens, real), largest_token(tokens, real)]
            cells = layer(cells)
        return cells, pooled

    def _window(self, values: Tensor, low: float, high: float) -> Tensor:
        """Map HU from ``low`` to ``high`` to -1 to 1, clipped; the input is scaled to ``hu_window``."""
        bottom, top = self.hu_window
        if (low, high) == (bottom, top):
            return values
        gain = (top - bottom) / (high - low)
        offset = (bottom + top - low - high) / (high - low)
        return torch.add(values.new_tensor(offset), values, alpha=gain).clamp_(-1, 1)


class Convolution(nn.Module):
    """relu(norm(conv(x))), 3x3x3; added to x if the shapes match."""

    def __init__(self, width: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = Convolution3d(width, after, 3, stride, padding=1, bias=False)
        self.norm = GlobalBatchNorm3d(after)
        self.residual = width == after and stride == 1
        self.halves = stride == 2

    def forward(self, cells: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, after, D / stride, H / stride, W / stride)."""
        mixed = self.norm(self.convolution(cells))
        return F.relu(cells + mixed if self.residual else mixed)
