"""An encoder whose tokens are known, the mean of each block of voxels, and a head that scores how bright the mean token is."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.config import EncoderConfig
from ctclip.heads.head import Head
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded, VolumeEncoder, check_shape
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.small import dual_encoder, spec_of

TOKEN = (4, 6, 5)
SPEC = spec_of((24, 36, 40), (4.0, 2.5, 3.0))
TURNED = spec_of((24, 36, 40), (4.0, 2.5, 3.0), published=True)


class BlockMeans(VolumeEncoder):
    """Tokens of ``TOKEN`` voxels along each index, of one channel: the mean of (voxel + 1)."""

    Config = EncoderConfig

    def __init__(self, spec: PreprocessingSpec) -> None:
        super().__init__(None, spec)
        self.width = self.token_width = 1

    def forward(self, volume: Tensor, mask: Tensor | None = None, body: Tensor | None = None) -> Encoded:
        check_shape(volume)
        cells = F.avg_pool3d(volume + 1, TOKEN)
        grid = (cells.shape[2], cells.shape[3], cells.shape[4])
        tokens = cells.flatten(2).transpose(1, 2)
        affine = self.affine(TOKEN, [(extent - 1) / 2 for extent in TOKEN])
        return Encoded(tokens, grid, tokens.mean(dim=1), affine)


class Brightness(Head):
    """Score "Lesion" by the pooled vector, "Dark" by its negative."""

    kind = "brightness"
    names = ("Lesion", "Dark")

    def score(self, encoded: Encoded) -> Tensor:
        return torch.cat([encoded.pooled, -encoded.pooled], dim=1) * 100

    def save(self, folder: Path) -> None:
        """There is nothing to save."""

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> Brightness:
        return cls(model)


def known_model(spec: PreprocessingSpec = SPEC) -> tuple[DualEncoder, Brightness]:
    model = dual_encoder(spec=spec_of((8, 8, 8)))
    model.volume_encoder = BlockMeans(spec)
    model.volume_projection = nn.Linear(1, model.config.dim)
    return model.eval(), Brightness(model.eval())


def token_mm(spec: PreprocessingSpec) -> np.ndarray:
    """mm of a token along x, y and z of a scan that is not oblique."""
    along = np.array(TOKEN)[[0, 2, 1]] if spec.published_geometry else np.array(TOKEN)
    z, y, x = along * np.array(spec.spacing)
    return np.array([x, y, z])


def write_scan(
    path: Path, affine: np.ndarray, lesion_ras: np.ndarray, shape: tuple[int, int, int], radius: float = 7.0
) -> None:
    """A body in air with one bright ball at ``lesion_ras`` (mm, RAS+), as nibabel writes it."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    body = (((index / np.array(shape) - 0.5) * 2.2) ** 2).sum(axis=-1) < 1
    tissue = np.where(body, 30, -1000) + np.random.default_rng(0).normal(0, 15, shape)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    ball = np.linalg.norm(world - lesion_ras, axis=-1) < radius
    nib.save(nib.Nifti1Image(np.where(ball, 950, tissue).astype(np.int16), affine), path)
