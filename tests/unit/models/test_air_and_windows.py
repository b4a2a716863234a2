"""Tokens of air are left out and lungs never are; attention in windows equals attention with all other tokens
masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ctclip.data.air import BodyTokens
from ctclip.models import vit3d
from ctclip.models.vit3d import Block, ViT3D, ViT3DConfig
from ctclip.phantom.scan import make_scan
from ctclip.preprocessing import prepare
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.small import spec_of

TOKEN = (8, 16, 16)
CHESTS = ("dicom/lungdx_A0001_philips_B_5mm_64", "dicom/lungdx_A0002_siemens_B40f_8mm_30")
CROPS = ("nifti/ts_chestCTA_aorta_crop_1p5mm_LPS.nii.gz", "nifti/ts_chestCTA_heart_crop_1p5mm_LPS.nii.gz")


def dropped_tokens(voxels: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """(D, H, W) in [-1, 1] -> (d, h, w) bool, tokens that contain only air outside the body."""
    finder = BodyTokens(size, spec_of(voxels.shape))
    body = finder.of_volumes(torch.from_numpy(voxels).float()[None, None])[0]
    return ~body.reshape([extent // step for extent, step in zip(voxels.shape, size, strict=True)])


def as_voxels(dropped: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Tokens (d, h, w) as voxels."""
    return np.kron(dropped, np.ones(size, dtype=bool))


@pytest.mark.parametrize("patient", range(4))
def test_emphysema_of_a_phantom_is_never_dropped(patient: int) -> None:
    """The phantom marks each voxel that it empties, independently of tokens."""
    made = make_scan(3, patient, scale=4.0, only=frozenset({"Emphysema"})).reconstructions[0]
    size = (4, 8, 8)
    cut = tuple(slice(0, extent // step * step) for extent, step in zip(made.hu.shape, size, strict=True))
    hu, marked = made.hu[cut], made.masks[cut] > 0
    dropped = dropped_tokens(hu.clip(-1000, 1000) / np.float32(1000), size)
    assert marked.sum() > 100
    assert dropped.any()
    assert not (as_voxels(dropped, size) & marked).any()


def lungs(hu: np.ndarray) -> np.ndarray:
    """Aerated voxels within the outline of the largest body, slice by slice; by a different method than the
    encoder's."""
    labelled, _ = ndimage.label(ndimage.binary_opening(hu > -300, iterations=2))
    body = labelled == 1 + np.argmax(np.bincount(labelled.ravel())[1:])
    closed = [ndimage.binary_closing(np.pad(part, 8), iterations=6) for part in body]
    return np.stack([ndimage.binary_fill_holes(part)[8:-8, 8:-8] for part in closed]) & (hu < -500)


@pytest.mark.parametrize("name", [*CHESTS, *CROPS])
def test_lungs_of_real_scans_are_never_dropped(shared: Path, name: str) -> None:
    """Also if the field of view cuts through them (the crops)."""
    voxels = prepare(shared / "ct" / name, "ct_224").voxels
    inside = lungs(voxels * 1000)
    dropped = dropped_tokens(voxels, TOKEN)
    assert inside.sum() > 10_000
    assert dropped.mean() > 0.15
    assert not (as_voxels(dropped, TOKEN) & inside).any()


def test_what_is_left_out_only_saves_time(shared: Path) -> None:
    """A model that leaves air out gives the same output as with air masked out of every layer and, for a real chest,
    almost the same as with all the air."""
    voxels = torch.from_numpy(prepare(shared / "ct" / CHESTS[1], "ct_224").voxels)[None, None]
    config = ViT3DConfig(patch=TOKEN, stages=(), width=96, heads=4, depth=3, pooling=("attention",), drop_air=True)
    torch.manual_seed(0)
    spec = PreprocessingSpec.load("ct_224")
    leaves_out = ViT3D(config, spec).eval()
    looks = ViT3D(config.model_copy(update={"drop_air": False}), spec).eval()
    looks.load_state_dict(leaves_out.state_dict())
    kept = ~dropped_tokens(voxels[0, 0].numpy(), TOKEN)
    with torch.no_grad():
        found, whole = leaves_out(voxels), looks(voxels)
        with mock.patch.object(vit3d, "_compact", lambda keep: (np.arange(keep.shape[1])[None], keep)):
            masked = leaves_out(voxels)
    assert 0.3 < kept.mean() < 0.7
    torch.testing.assert_close(found.tokens, masked.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooled, masked.pooled, atol=1e-5, rtol=1e-5)
    assert F.cosine_similarity(found.pooled, whole.pooled) > 0.9


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_are_attention_with_all_else_masked(registers: int, padded: bool) -> None:
    torch.manual_seed(0)
    config = ViT3DConfig(patch=(2, 2, 2), stages=(), width=24, heads=2, depth=3, registers=registers, window=(2, 3, 2), global_every=3)  # fmt: skip
    encoder = ViT3D(config, spec_of((10, 14, 12))).eval()
    volume, mask = torch.rand(3, 1, 10, 14, 12) * 2 - 1, None
    if padded:
        mask = torch.ones(volume.shape, dtype=torch.bool)
        mask[1, :, :8] = mask[2, ..., 8:] = False
    place = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(7), torch.arange(6), indexing="ij"), dim=-1)
    window = (place // torch.tensor([2, 3, 2])).flatten(0, 2)
    together = F.pad((window[:, None] == window[None]).all(dim=-1), (registers, 0, registers, 0), value=True)
    own = Block.forward

    def masked(self: Block, tokens: Tensor, rotation: Any, attends: Tensor | None, windows: Any = None) -> Tensor:
        if windows is not None:
            attends = together & attends if attends is not None else together
        return own(self, tokens, rotation, attends)

    def all_places(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(np.arange(keep.shape[1]), (len(keep), 1)), keep

    with torch.no_grad():
        found = encoder(volume, mask).tokens
        with mock.patch.object(Block, "forward", masked), mock.patch.object(vit3d, "_compact", all_places):
            expected = encoder(volume, mask).tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_between_windows_a_layer_sees_their_means(registers: int, padded: bool) -> None:
    """By loops over volumes and windows, with no window given to the layer itself."""
    torch.manual_seed(0)
    config = ViT3DConfig(
        patch=(2, 2, 2), stages=(), width=24, heads=2, depth=1, registers=registers, window=(2, 3, 2), global_every=1,
        global_over="windows",
    )  # fmt: skip
    encoder = ViT3D(config, spec_of((10, 14, 12), (3.0, 1.5, 1.5))).eval()
    volume, mask = torch.rand(3, 1, 10, 14, 12) * 2 - 1, torch.ones(3, 1, 10, 14, 12, dtype=torch.bool)
    if padded:
        mask[1, :, :, :8] = mask[2, ..., 7:] = False
    kept = F.max_pool3d(mask.float(), 2).flatten(1) > 0
    place = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(7), torch.arange(6), indexing="ij"), dim=-1)
    windows = (place // torch.tensor([2, 3, 2])).flatten(0, 2)
    millimetres = (place.flatten(0, 2) - torch.tensor([2.0, 3.0, 2.5])) * torch.tensor([6.0, 3.0, 3.0])
    with torch.no_grad():
        found = encoder(volume, mask).tokens
        cells, _ = encoder.stem(torch.where(mask, volume, -1.0), mask)
        expected = torch.zeros_like(found)
        for index, tokens in enumerate(cells.flatten(2).transpose(1, 2)):
            groups = [
                torch.nonzero((windows == window).all(dim=1) & kept[index])[:, 0] for window in windows.unique(dim=0)
            ]
            groups = [group for group in groups if len(group)]
            given = torch.cat([encoder.registers, *(tokens[group].mean(dim=0, keepdim=True) for group in groups)])
            centres = torch.stack([millimetres[group].mean(dim=0) for group in groups])
            after = encoder.blocks[0](given[None], vit3d._rotation(centres[None], 12, registers))[0]
            for group, change in zip(groups, (after - given)[registers:], strict=True):
                expected[index, group] = encoder.norm(tokens[group] + change)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
