"""Detail within cells: where it puts the peak, how it weighs blocks, and the slopes that it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ctclip.explanation import detail
from ctclip.explanation.detail import with_detail
from ctclip.explanation.learned import Learned
from ctclip.explanation.method import Maps, Method, Subject
from ctclip.explanation.shifts import maps_of
from ctclip.explanation.space import resample
from ctclip.heads.locator import Locator, levels_of
from ctclip.models.vit3d import ViT3DConfig
from tests.unit.explanation.known import SPEC, TOKEN, known_model
from tests.unit.small import dual_encoder, spec_of

SHAPE = (24, 36, 40)
STEMMED: dict[str, Any] = {
    "kind": "vit3d", "patch": [4, 4, 4], "stages": [[8, 1]], "width": 16, "depth": 1, "heads": 2, "pool_stem": True,
}  # fmt: skip


class Squares(Method):
    """The mean square of the voxels of each cell above -1, with its slopes."""

    name = "squares"

    def maps(self, subject: Subject) -> Maps:
        affine = subject.model.volume_encoder.affine(TOKEN, [(extent - 1) / 2 for extent in TOKEN])
        return Maps(F.avg_pool3d((subject.volume + 1) ** 2, TOKEN)[0].numpy(), affine, ("a note",))

    def slopes(self, subject: Subject) -> Callable[[Tensor], Tensor]:
        return lambda volume: (2 * (volume[0] + 1)) / math.prod(TOKEN)


def subject(volume: Tensor) -> Subject:
    model, head = known_model()
    return Subject(model, head, [0], volume)


class SquaresOfCells(Squares):
    """The same without detail."""

    def slopes(self, subject: Subject) -> None:
        return None


@pytest.mark.parametrize("shifts", [1, 2])
def test_the_peak_comes_nearer_to_a_small_lesion(shifts: int) -> None:
    random, away = np.random.default_rng(0), list[np.ndarray]()
    for _ in range(20):
        at = np.array([random.integers(1, extent - 1) for extent in SHAPE])
        volume = torch.full((1, 1, *SHAPE), -0.9) + 0.01 * torch.randn(1, 1, *SHAPE)
        volume[0, 0][tuple(at)] = 1
        for one in (Squares(), SquaresOfCells()):
            values, affine, notes = maps_of(one, subject(volume), shifts)
            assert notes == ("a note",)
            peak = (affine @ [*np.unravel_index(values[0].argmax(), values[0].shape), 1])[:3] / np.array(SPEC.spacing)
            # 4 x 6 x 5 voxels are divided into 4 x 3 x 1 blocks: the last axis stays as it was.
            away.append(np.abs(peak - at)[:2])
    with_it, without = np.array(away[::2]), np.array(away[1::2])
    assert (with_it <= np.array(TOKEN)[:2] / 2).all()
    assert with_it.mean() < 0.8 * without.mean()


class Given(Squares):
    """The same maps, with slopes that are given, and the volumes for which they were asked."""

    def __init__(self, given: np.ndarray) -> None:
        self.given = torch.from_numpy(given)[None]
        self.asked: list[Tensor] = []

    def slopes(self, subject: Subject) -> Callable[[Tensor], Tensor]:
        return self.answer

    def answer(self, volume: Tensor) -> Tensor:
        self.asked.append(volume)
        return self.given


def test_each_block_is_weighted_by_its_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force: loops over voxels, blocks of 1 x 2 x 5 of them, without smoothing."""
    monkeypatch.setattr(detail, "SMOOTH", 1e-3)
    random = np.random.default_rng(1)
    voxels = random.uniform(-1, 1, SHAPE).astype(np.float32)
    looking = Given(random.normal(size=SHAPE).astype(np.float32))
    asked = subject(torch.from_numpy(voxels)[None, None])
    cells = looking.maps(asked)
    found = with_detail(cells, looking, asked, TOKEN, [(0, 0, 0)])
    block, shape = (1, 2, 5), (24, 18, 8)
    whole = resample(cells.values[0], cells.affine, shape, found.affine)
    region, share = whole >= whole.max() / 2, np.ones(shape)
    # Narrow and wide surroundings: 3 and 9 blocks.
    for blocks, halfway in zip((3, 9), looking.asked, strict=True):
        d, h, w = (blocks * step for step in block)
        # An even extent has no middle: scipy's filter begins half of it before the voxel.
        padded = np.pad(voxels, [(extent // 2, extent // 2) for extent in (d, h, w)], mode="edge")
        influence, expected = np.zeros(shape), np.zeros(SHAPE)
        for z, y, x in np.ndindex(SHAPE):
            around = padded[z : z + d, y : y + h, x : x + w].mean(dtype=np.float64)
            influence[z, y // 2, x // 5] += looking.given[0, z, y, x] * (voxels[z, y, x] - around)
            expected[z, y, x] = (voxels[z, y, x] + around) / 2
        np.testing.assert_allclose(halfway[0, 0], expected, atol=1e-5)
        influence = influence.clip(min=0)
        share = np.minimum(share, influence / np.quantile(influence[region], 0.997))
    np.testing.assert_allclose(found.values[0], whole * (0.5 + np.sqrt(share)) / 1.5, rtol=1e-3, atol=1e-5)
    assert (found.values[0] <= whole + 1e-6).all()
    assert (found.values[0] >= whole / 3 - 1e-6).all()
    # The centre of the first block, in mm.
    np.testing.assert_allclose(
        found.affine[:3, 3], [(extent - 1) / 2 * mm for extent, mm in zip(block, SPEC.spacing, strict=True)]
    )


def test_influence_is_the_change_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The midpoint rule is exact for squares: slopes times differences add up to what smoothing takes from the map."""
    seen: list[np.ndarray] = []
    sums = detail._sums
    monkeypatch.setattr(detail, "_sums", lambda values, block: seen.append(values) or sums(values, block))
    voxels = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    asked = subject(voxels)
    with_detail(Squares().maps(asked), Squares(), asked, TOKEN, [(0, 0, 0)])
    smooth = torch.from_numpy(ndimage.uniform_filter(voxels[0, 0].numpy(), [3, 6, 15], mode="nearest"))[None, None]
    change = Squares().maps(asked).values.sum() - Squares().maps(subject(smooth)).values.sum()
    assert seen[0].sum() == pytest.approx(change, rel=1e-4)


def test_the_slopes_of_shifted_volumes_are_added_where_they_belong() -> None:
    """Squares have a slope of their own voxel alone, so a shifted position only doubles them."""
    volume = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked, seen = subject(volume), list[Sequence[Sequence[int]]]()
    gradient = Squares().slopes(asked)
    expected = gradient(volume)
    ones = np.ones(SHAPE, np.float32)
    total = detail._influences(gradient, volume, ones, [(0, 0, 0), (2, 3, 0)], (1, 1, 1))[0]
    np.testing.assert_allclose(total[2:, 3:], 2 * expected[0, 2:, 3:], rtol=1e-5)
    np.testing.assert_allclose(total[:2], expected[0, :2], rtol=1e-5)
    np.testing.assert_allclose(total[:, :3], expected[0, :, :3], rtol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ctclip.explanation.shifts.with_detail", lambda maps, _looking, _subject, _cell, at: seen.append(at) or maps
        )
        for shifts in (1, 2, 3):
            maps_of(Squares(), asked, shifts)
    assert seen == [[[0, 0, 0]], [[0, 0, 0], [2, 3, 0]], [[0, 0, 0], [2, 2, 0], [2, 4, 0]]]


def test_a_method_without_slopes_and_cells_that_do_not_fill_the_volume_keep_their_maps() -> None:
    asked = subject(torch.rand(1, 1, *SHAPE))
    maps = Squares().maps(asked)
    assert with_detail(maps, SquaresOfCells(), asked, TOKEN, [(0, 0, 0)]) is maps
    assert with_detail(maps, Squares(), asked, (5, 6, 5), [(0, 0, 0)]) is maps


def test_the_slopes_of_a_locator_are_what_the_map_changes_by() -> None:
    spec = spec_of((16, 16, 16))
    model = dual_encoder(ViT3DConfig(**STEMMED), spec)
    model.eval()
    _, head = known_model()
    volume = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    levels = levels_of(model.volume_encoder, volume, tokens=False, halves=False)
    locator = Locator([one.features.shape[2] for one in levels], model.config.dim, features=16, rounds=2)
    torch.nn.init.normal_(locator.weight, generator=torch.Generator().manual_seed(1))
    asked = Subject(model, head, [0, 1], volume, locator=locator)
    gradient = Learned().slopes(asked)
    assert gradient is not None
    slopes = torch.stack(list(gradient(volume)))
    for place in ((3, 4, 5), (9, 9, 2), (15, 0, 8)):
        totals = []
        for step in (-1e-2, 1e-2):
            moved = volume.clone()
            moved[0, 0][place] += step
            maps = Learned().maps(Subject(model, head, [0, 1], moved, locator=locator))
            totals.append(maps.values.astype(np.float64).sum(axis=(1, 2, 3)))
        expected = (totals[1] - totals[0]) / 2e-2
        np.testing.assert_allclose(slopes[(slice(None), *place)], expected, rtol=0.05, atol=2e-3)
    assert Learned().slopes(Subject(model, head, [0], volume, locator=Locator([8], 4, tokens=True))) is None


def test_a_map_of_a_large_volume_has_fewer_blocks() -> None:
    assert detail._parts((4, 4, 4), (50, 50, 50)) == [2, 2, 2]
    assert detail._parts((20, 20, 10), (24, 24, 24)) == [4, 4, 2]
    assert detail._parts((4, 4, 4), (200, 200, 200)) == [1, 1, 1]
