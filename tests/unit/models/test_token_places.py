"""Positions of tokens: a bright point changes most the token that ``Encoded.affine`` places next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from ctclip.models.ctvit import CTViTConfig
from ctclip.models.dual_encoder import build_volume_encoder
from ctclip.models.encoded import Encoded, VolumeEncoder, axis_shape, axis_spacing
from ctclip.models.resnet3d import ResNet3DConfig
from ctclip.models.slices import SlicesConfig
from ctclip.models.vit3d import ViT3DConfig
from ctclip.preprocessing import prepare
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.models.pretrained import vision_folder
from tests.unit.small import spec_of

VIT: dict[str, Any] = {"width": 24, "heads": 2, "depth": 2, "registers": 2}
CTVIT = CTViTConfig(
    patch=(4, 8, 12), width=16, spatial_depth=1, temporal_depth=1, heads=2, head_width=8, quantise=False
)  # fmt: skip
SPACING = (3.0, 0.8, 1.7)
# Name -> configuration, spec, voxels of a token along each index of the volume.
CASES: dict[str, tuple[Any, PreprocessingSpec, tuple[int, int, int]]] = {
    "vit3d": (ViT3DConfig(stages=(), patch=(4, 8, 6), **VIT), spec_of((24, 48, 48), SPACING), (4, 8, 6)),
    "vit3d, convolutions": (
        ViT3DConfig(stages=((8, 1), (8, 1)), patch=(2, 2, 3), **VIT), spec_of((48, 56, 96), SPACING), (8, 8, 12)
    ),
    "vit3d, turned": (
        ViT3DConfig(stages=(), patch=(4, 8, 6), **VIT), spec_of((24, 48, 56), SPACING, published=True), (4, 8, 6)
    ),
    "ctvit": (CTVIT, spec_of((24, 40, 60), SPACING), (4, 8, 12)),
    "ctvit, turned": (CTVIT, spec_of((24, 60, 40), SPACING, published=True), (4, 8, 12)),
    "resnet3d": (
        ResNet3DConfig(width_factor=0.125, stem_stride=(1, 2, 2)), spec_of((64, 128, 160), SPACING), (16, 32, 32)
    ),
    "slices": (SlicesConfig(aggregator="mean", every=3), spec_of((23, 16, 24), SPACING), (3, 16, 24)),
}  # fmt: skip


def build(name: str, folder: Path) -> VolumeEncoder:
    config, spec, _ = CASES[name]
    torch.manual_seed(0)
    if name == "slices":
        config = config.model_copy(update={"pretrained": str(vision_folder(folder))})
    return build_volume_encoder(config, spec).eval()


def changed_most(one: Encoded, other: Encoded) -> np.ndarray:
    """(B, 3) index in the grid of the token that changes most."""
    change = (one.tokens - other.tokens).norm(dim=2)
    return np.stack(np.unravel_index(change.argmax(dim=1).numpy(), one.grid), axis=1)


def points(name: str, count: int = 8) -> np.ndarray:
    """(count, 3) voxels, evenly distributed over all but the outermost half token, along each axis in a different
    order."""
    _, spec, size = CASES[name]
    random = np.random.default_rng(3)
    places = [
        step / 2 + (random.permutation(count) + 0.5) / count * (extent - step)
        for extent, step in zip(axis_shape(spec), size, strict=True)
    ]
    return np.stack(places, axis=1).astype(int)


@pytest.mark.parametrize("name", list(CASES))
def test_a_bright_point_changes_the_token_beside_it_most(name: str, tmp_path: Path) -> None:
    encoder = build(name, tmp_path)
    _, spec, size = CASES[name]
    empty = torch.full((1, 1, *axis_shape(spec)), -0.2)
    voxels = points(name)
    bright = empty.repeat(len(voxels), 1, 1, 1, 1)
    for volume, (z, y, x) in zip(bright[:, 0], voxels, strict=True):
        # A 2-D model that takes every third slice detects a point whose thickness is its step.
        depth = 1 if name == "slices" else 0
        volume[max(0, z - depth) : z + depth + 1, y : y + 2, x : x + 2] = 1.0
    with torch.no_grad():
        encoded = encoder(bright)
        tokens = changed_most(encoded, encoder(empty))
    steps = np.array(axis_spacing(spec))
    centres = (np.c_[tokens, np.ones(len(tokens))] @ encoded.affine.T)[:, :3]
    # The point is two voxels wide in plane.
    true = (voxels + np.array([0, 0.5, 0.5])) * steps
    away = (centres - true) / (np.array(size) * steps)
    axes = slice(0, 1) if name == "slices" else slice(None)
    assert np.abs(away[:, axes]).max() <= 1, "in tokens"
    # An affine half a token off would still pass for one point; with points at all positions within a token it fails.
    assert np.abs(away[:, axes].mean(axis=0)).max() < 0.35


def test_slices_lie_in_the_middle_of_their_plane(tmp_path: Path) -> None:
    encoder = build("slices", tmp_path)
    _, spec, _ = CASES["slices"]
    encoded = encoder(torch.zeros(1, 1, *spec.shape))
    # 23 slices, every third one from the first: 0, 3 ... 21.
    assert encoded.grid == (8, 1, 1)
    assert (encoded.affine @ [0, 0, 0, 1]).tolist() == pytest.approx([0, 7.5 * 0.8, 11.5 * 1.7, 1])
    assert (encoded.affine @ [7, 0, 0, 1])[0] == pytest.approx(21 * 3.0)


# Columns of the scan's array run to the left, inferior and anterior, rotated by some degrees, far from the origin.
TURN = np.array([[np.cos(0.15), -np.sin(0.15), 0], [np.sin(0.15), np.cos(0.15), 0], [0, 0, 1]])
AXES = np.array([[-1.1, 0, 0], [0, 0, -0.9], [0, 2.2, 0]]).T


@pytest.mark.parametrize("name", ["vit3d", "vit3d, turned", "vit3d, convolutions", "ctvit, turned", "resnet3d"])
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_lie_in_the_space_of_the_scan(name: str, turned: bool, tmp_path: Path) -> None:
    """A ball at a known position in millimetres, as nibabel writes it: in the scan's own space, the token that it
    changes most is next to it."""
    _, spec, size = CASES[name]
    encoder = build(name, tmp_path)
    shape = (70, 80, 45)
    axes = TURN @ AXES if turned else AXES
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = (40.0, -170.0, 310.0) - axes @ ((np.array(shape) - 1) / 2)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    # A body in air, with noise, so that it is read as Hounsfield units.
    body = (((index / np.array(shape) - 0.5) * 2.2) ** 2).sum(axis=-1) < 1
    tissue = np.where(body, 30, -1000) + np.random.default_rng(0).normal(0, 15, shape)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    extent = np.array(size) * axis_spacing(spec)
    for offset in ((0.0, 0.0, 0.0), (9.0, -12.0, 14.0), (-8.0, 13.0, -11.0)):
        ball = np.array((40.0, -170.0, 310.0)) + offset
        prepared = []
        for hu in (0, 900):
            voxels = np.where(np.linalg.norm(world - ball, axis=-1) < 4, tissue + hu, tissue).astype(np.int16)
            path = tmp_path / f"{hu}.nii"
            nib.save(nib.Nifti1Image(voxels, affine), path)
            prepared.append(prepare(path, spec))
        with torch.no_grad():
            empty, bright = (encoder(torch.from_numpy(one.voxels)[None, None]) for one in prepared)
        token = changed_most(bright, empty)[0]
        place = (prepared[1].token_affine(bright.affine) @ [*token, 1])[:3]
        # The axes of prepared volumes are left, posterior, superior, or nearly so: [slice, ...] is z.
        away = np.abs(place - ball * [-1, -1, 1])
        in_plane = extent[1:] if spec.published_geometry else extent[:0:-1]
        assert (away <= np.array([*in_plane, extent[0]]) * 1.2).all(), (away, extent)
