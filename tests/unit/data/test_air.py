"""Tokens with part of the body, found before a volume is augmented."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctclip.config import AugmentConfig
from ctclip.data.air import BodyTokens
from ctclip.data.augment import Change, draw_change, shift
from ctclip.data.normalise import to_model_input
from ctclip.phantom.scan import make_scan
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.small import spec_of

SIZE = (4, 8, 8)
SLIVER = 0.01
STILL = Change((0.0, 0.0, 0.0), 1.0, (0, 0, 0), 1.0, 0.0, 0)


@pytest.fixture(scope="module", params=range(3))
def scan(request: pytest.FixtureRequest) -> tuple[np.ndarray, PreprocessingSpec]:
    """HU (D, H, W) int16 of a phantom whose body reaches no edge in plane, and its spec."""
    reconstruction = make_scan(5, request.param, scale=4.0).reconstructions[0]
    cut = tuple(slice(0, n // s * s) for n, s in zip(reconstruction.hu.shape, SIZE, strict=True))
    hu = np.pad(reconstruction.hu[cut], ((0, 0), (16, 16), (16, 16)), constant_values=-1000)
    return hu, spec_of(hu.shape, (4.5, 3.0, 3.0))


def really(hu: np.ndarray, spec: PreprocessingSpec, change: Change) -> torch.Tensor:
    """The volume (1, 1, D, H, W) in [-1, 1] that a model receives."""
    return to_model_input(torch.from_numpy(hu.copy())[None, None], spec, [change])


def grid(tokens: np.ndarray, spec: PreprocessingSpec) -> np.ndarray:
    return tokens.reshape([n // s for n, s in zip(spec.shape, SIZE, strict=True)])


def test_stored_and_shown_volumes_have_the_same_body(scan: tuple[np.ndarray, PreprocessingSpec]) -> None:
    hu, spec = scan
    finder = BodyTokens(SIZE, spec)
    body = finder.of_hu(hu)
    assert 0.1 < body.mean() < 0.9
    assert np.array_equal(body, finder.of_volumes(to_model_input(torch.from_numpy(hu)[None, None], spec))[0])
    assert np.array_equal(body, finder.of_hu(hu, STILL))
    # Noise, contrast and the limits of the window do not move the body.
    assert np.array_equal(body, finder.of_hu(hu, STILL._replace(contrast=1.1, noise_hu=40.0, window_hu=(30.0, -30.0))))


def test_a_shift_by_whole_tokens_shifts_the_tokens(scan: tuple[np.ndarray, PreprocessingSpec]) -> None:
    hu, spec = scan
    finder = BodyTokens(SIZE, spec)
    body = grid(finder.of_hu(hu), spec)
    for tokens in ((0, 1, -1), (1, 0, 2), (-2, -1, 0)):
        offset = tuple(n * s for n, s in zip(tokens, SIZE, strict=True))
        moved = finder.of_hu(hu, STILL._replace(offset=offset))
        expected = shift(torch.from_numpy(body), tokens, fill=False).numpy()
        assert np.array_equal(grid(moved, spec), expected), tokens
        assert np.array_equal(moved, finder.of_volumes(really(hu, spec, STILL._replace(offset=offset)))[0])


@pytest.mark.parametrize("offset", [(1, 0, 0), (-1, 3, -5), (3, -4, 1)])
@pytest.mark.parametrize("crop", [(), ((0.11, 0.07), (0.3, 0.02), (0.05, 0.33))], ids=["whole", "cropped"])
def test_without_a_turn_the_tokens_are_those_of_the_changed_volume(
    scan: tuple[np.ndarray, PreprocessingSpec], offset: tuple[int, ...], crop: tuple[tuple[float, float], ...]
) -> None:
    """Exact to the token, including partial tokens at the first and the last slice."""
    hu, spec = scan
    finder, change = BodyTokens(SIZE, spec), STILL._replace(offset=offset, crop=crop)
    assert np.array_equal(finder.of_hu(hu, change), finder.of_volumes(really(hu, spec, change))[0])
    assert not np.array_equal(finder.of_hu(hu, change), finder.of_hu(hu))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("config", [{}, {"shift_voxels": 3}, {"crop": 0.2}], ids=["turn", "shift", "crop"])
def test_no_token_of_a_turned_body_is_dropped(
    scan: tuple[np.ndarray, PreprocessingSpec], config: dict[str, Any], seed: int
) -> None:
    """Against the volume turned voxel by voxel: tokens that the rule keeps there, of which more than a sliver of a
    hundredth is denser than emphysema."""
    hu, spec = scan
    finder = BodyTokens(SIZE, spec)
    change = draw_change(AugmentConfig(rotate_degrees=15, zoom=0.1, **config), np.random.default_rng(seed))
    kept = finder.of_hu(hu, change)
    volume = really(hu, spec, change)
    needed = finder.of_volumes(volume)[0]
    tissue = torch.nn.functional.avg_pool3d((volume > -0.7).float(), SIZE).flatten().numpy()
    assert not (needed & ~kept & (tissue > SLIVER)).any()
    assert (needed & ~kept).mean() < 0.002
    assert (kept & ~needed).mean() < 0.08, "nor is much more kept"
