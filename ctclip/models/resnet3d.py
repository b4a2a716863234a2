"""MONAI's 3-D ResNets under our interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip.config import Count, EncoderConfig
from ctclip.models.batchnorm import GlobalBatchNorm3d
from ctclip.models.convolution import right_convolutions
from ctclip.models.encoded import Encoded, Evidence, Level, VolumeEncoder, beside, check_shape
from ctclip.models.pooling import air_where_padded, largest_token, mean_token, real_cells
from ctclip.preprocessing.spec import PreprocessingSpec

BLOCKS = {18: ("basic", (2, 2, 2, 2)), 50: ("bottleneck", (3, 4, 6, 3))}
GROUPS = 8


class ResNet3DConfig(EncoderConfig):
    """MONAI's 3-D ResNets (``ctclip/models/resnet3d.py``)."""

    kind: Literal["resnet3d"] = Field("resnet3d", description="MONAI's 3-D ResNet")
    depth: Literal[18, 50] = Field(18, description="ResNet-18 or ResNet-50")
    stem_stride: tuple[Count, Count, Count] = Field(
        (2, 2, 2), description="stride [slice, row, column] of the first convolution"
    )
    norm: Literal["batch", "group"] = Field(
        "group", description="group: the result does not depend on the batch; batch: as in the original"
    )
    width_factor: float = Field(1.0, gt=0, le=64, description="factor for the number of channels of every stage")

    @model_validator(mode="after")
    def _counts_once(self) -> ResNet3DConfig:
        if self.activation_checkpointing and self.norm == "batch":
            raise ValueError("activation_checkpointing would count a batch's statistics twice: set norm=group")
        return self

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> ResNet3DConfig:
        if any(width < 1 or (self.norm == "group" and width % GROUPS) for width in self.widths):
            raise ValueError(
                f"width_factor {self.width_factor:g} gives stages of {', '.join(map(str, self.widths))} channels; each must "
                f"be a multiple of {GROUPS} with norm=group"
            )
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of the four stages."""
        return [round(width * self.width_factor) for width in (64, 128, 256, 512)]


class ResNet3D(VolumeEncoder):
    """volume (B, 1, D, H, W) in [-1, 1] -> Encoded: the last feature map's cells, and their mean and maximum."""

    Config: ClassVar[type[EncoderConfig]] = ResNet3DConfig
    lora_targets = ("conv1", "conv2", "conv3")
    config: ResNet3DConfig

    def __init__(self, config: ResNet3DConfig, spec: PreprocessingSpec) -> None:
        super().__init__(config, spec)
        from monai.networks.nets import ResNet

        block, layers = BLOCKS[config.depth]
        widths = config.widths
        self.net: Any = ResNet(
            block, list(layers), widths, spatial_dims=3, n_input_channels=1, conv1_t_size=7,
            conv1_t_stride=config.stem_stride,  # type: ignore[arg-type]
            feed_forward=False,
        )  # fmt: skip
        # MONAI 1.6 applies ``norm`` only to the stem; the blocks would keep a batch norm.
        for parent in list(self.net.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm3d):
                    setattr(parent, name, _norm(config, child.num_features))
        right_convolutions(self.net)
        self.token_width = widths[-1] * (4 if block == "bottleneck" else 1)
        self.width = 2 * self.token_width

    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        """``mask`` (B, 1, D, H, W) bool, true where voxels are real: padding is treated as air, and cells with only
        padding are not pooled."""
        check_shape(volume)
        net = self.net
        cells = net.maxpool(net.act(net.bn1(net.conv1(air_where_padded(volume, mask)))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            if self.config.activation_checkpointing and self.training:
                cells = checkpoint(layer, cells, use_reentrant=False)
            else:
                cells = layer(cells)
        tokens = rearrange(cells, "b c d h w -> b (d h w) c")
        grid = (cells.shape[2], cells.shape[3], cells.shape[4])
        real = real_cells(mask, grid)
        pooled = torch.cat([mean_token(tokens, real), largest_token(tokens, real)], dim=1)
        # After the stride of the stem, its pooling and three of the four stages halve the grid.
        affine = self.affine([16 * stride for stride in self.config.stem_stride], (0.0, 0.0, 0.0))
        return Encoded(tokens if real is None else tokens * real[..., None], grid, pooled, affine, real)

    def evidence(self, volume: Tensor, mask: Tensor | None = None) -> Evidence:
        encoded = self(volume, mask)

        def pool(features: Sequence[Tensor]) -> Tensor:
            return torch.cat([mean_token(features[0], encoded.real), largest_token(features[0], encoded.real)], dim=1)

        level = Level(encoded.tokens, encoded.grid, encoded.affine, encoded.real)
        return Evidence(encoded, (level,), pool, lambda features, directions: [beside(features[0], directions)])

    def layers(self) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
        """The stem, then each residual block."""
        net = self.net
        blocks = [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
        return [[net.conv1, net.bn1], *([block] for block in blocks)]


def _norm(config: ResNet3DConfig, width: int) -> nn.Module:
    return GlobalBatchNorm3d(width) if config.norm == "batch" else nn.GroupNorm(GROUPS, width)
