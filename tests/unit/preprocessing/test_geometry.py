"""Orientation and resampling compared with SciPy, SimpleITK, PyTorch and explicit sums; small enough to run without
numba."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.geometry import bounds, orient, resample, resampled_affine, source_positions
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import Volume

AIR, METAL = -1024, 3071


def straight(spacing: tuple[float, float, float], origin: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """Slices up, rows back, columns left; spacing along [slice, row, column]."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing
    affine[:, 3] = (*origin, 1)
    return affine


def turn(axis: int, degrees: float) -> np.ndarray:
    one, other = [a for a in range(3) if a != axis]
    matrix, angle = np.eye(3), np.radians(degrees)
    matrix[one, one] = matrix[other, other] = np.cos(angle)
    matrix[one, other], matrix[other, one] = -np.sin(angle), np.sin(angle)
    return matrix


def rotated(spacing: tuple[float, float, float], axis: int, degrees: float) -> np.ndarray:
    affine = straight(spacing, (3, -7, 11))
    affine[:3, :3] = turn(axis, degrees) @ affine[:3, :3]
    return affine


def noise(shape: tuple[int, ...], low: int = -1000, high: int = 1500, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


def indices(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, len(shape))


def places(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    return index @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("degrees", [0, 0.4])
def test_every_voxel_keeps_its_place_and_value(axes, flips, degrees) -> None:
    """Axes in any direction, or nearly: each voxel stays at the position that the first affine gives."""
    affine = np.eye(4)
    affine[:3, :3] = turn(1, degrees) @ np.diag(flips)[:, axes] @ np.diag((1.5, 2.5, 3.5))
    affine[:3, 3] = 5, -6, 7
    array = noise((3, 4, 5))
    given = Volume(array, affine, "x", ["told before"])
    out = orient(given)
    assert out.warnings == ["told before"]
    assert out.source == "x"
    back = np.linalg.inv(affine)
    source = places(back, places(out.affine, indices(out.array.shape)))
    assert np.abs(source - source.round()).max() < 1e-9
    assert np.array_equal(array[tuple(source.round().astype(int).T)], out.array.ravel())
    for axis, world in enumerate((2, 1, 0)):
        assert out.affine[world, axis] == pytest.approx(out.spacing[axis], rel=1e-4)
    assert np.array_equal(out.affine[3], [0, 0, 0, 1])
    assert out.array.size == array.size


@pytest.mark.parametrize(("degrees", "refused"), [(31.0, False), (29.0, True), (0.0, True), (math.nan, True)])
def test_axes_that_span_no_volume_are_refused(degrees: float, refused: bool) -> None:
    """The volume spanned by two axes 31 degrees apart is half that of perpendicular ones."""
    affine = np.eye(4)
    affine[:3, 1] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 0
    affine[:3, :3] *= 2
    if refused:
        with pytest.raises(PreprocessingError, match="x: its header's orientation is degenerate"):
            orient(Volume(noise((4, 4, 4)), affine, "x"))
    else:
        assert "oblique" in orient(Volume(noise((4, 4, 4)), affine, "x")).warnings[0]


@pytest.mark.parametrize(("axis", "degrees"), [(0, 0.6), (0, 12), (1, -20), (2, 35)])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_an_oblique_volume_is_resampled_as_itk_does(axis: int, degrees: float, kind: type) -> None:
    spacing, shape = (2.0, 1.5, 1.0), (6, 7, 9)
    affine, array = rotated(spacing, axis, degrees), noise(shape, -2000).astype(kind)
    given = Volume(array, affine, "x", ["told before"])
    out = orient(given)
    assert out.warnings == [
        "told before",
        f"oblique by {abs(degrees):.1f} degrees: resampled onto the axis-aligned grid",
    ]
    assert out.array.dtype == np.float32
    # The grid has the same spacing and middle, and covers the bounding box of all corners, rounded to whole voxels.
    assert np.allclose(out.affine[:3, :3], straight(spacing)[:3, :3])
    assert np.array_equal(out.affine[3], [0, 0, 0, 1])
    corners = places(affine, np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in shape]))))
    low, high = corners.min(axis=0), corners.max(axis=0)
    assert np.array_equal(out.array.shape, np.rint((high - low)[::-1] / spacing))
    middle = places(out.affine, (np.array(out.array.shape) - 1)[None] / 2)[0]
    assert np.allclose(middle, (low + high) / 2)
    image = sitk.GetImageFromArray(np.maximum(array, AIR).astype(np.float32))
    image.SetSpacing(spacing[::-1])
    image.SetDirection((affine[:3, [2, 1, 0]] / np.array(spacing[::-1])).ravel())
    image.SetOrigin(affine[:3, 3])
    grid = sitk.Image(*[int(n) for n in out.array.shape[::-1]], sitk.sitkFloat32)
    grid.SetSpacing(spacing[::-1])
    grid.SetOrigin(out.affine[:3, 3])
    expected = sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, float(AIR)))
    source = places(np.linalg.inv(affine), places(out.affine, indices(out.array.shape))).reshape(*out.array.shape, 3)
    inside = ((source > 0) & (source < np.array(shape) - 1)).all(axis=-1)
    outside = ((source < -1) | (source > np.array(shape))).any(axis=-1)
    assert inside.sum() > 50
    assert np.abs(out.array - expected)[inside].max() < 0.1
    assert (out.array[outside] == AIR).all()
    assert outside.any() or degrees == 0.6


def test_too_oblique_for_its_slice_distance() -> None:
    """A tilted stack of few thick slices would be resampled to many times its size; eight times is the limit."""
    ratios = []
    for degrees in range(8, 13):
        affine, shape = rotated((10.0, 0.5, 0.5), 0, degrees), (12, 6, 6)
        corners = places(affine, np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in shape]))))
        sides = np.maximum(1, np.rint(np.ptp(corners, axis=0)[::-1] / (10.0, 0.5, 0.5)))
        ratios.append(np.prod(sides) / np.prod(shape))
        volume = Volume(noise(shape), affine, "x")
        if ratios[-1] > 8:
            with pytest.raises(PreprocessingError, match=rf"x: too oblique \({degrees} degrees\) for its slice"):
                orient(volume)
        else:
            assert orient(volume).array.size == np.prod(sides)
    assert 8.0 in ratios
    assert any(8 < ratio < 9 for ratio in ratios), "both sides of the bound are met"


@pytest.mark.parametrize("centre", [None, (2.0, 3.5, -1.0)])
def test_positions_are_about_the_middle_or_a_given_centre(centre) -> None:
    volume, spec = (
        Volume(noise((5, 6, 7)), straight((3, 2, 1), (4, 5, 6)), "x"),
        PreprocessingSpec("t", (2, 2, 5), (4, 5, 3)),
    )
    middle = (2.0, 2.5, 3.0) if centre is None else centre
    found, ends = source_positions(volume, spec, centre), bounds(volume, spec, centre)
    for axis in range(3):
        ratio = (2, 2, 5)[axis] / (3, 2, 1)[axis]
        count = (4, 5, 3)[axis]
        expected = [middle[axis] + (k - (count - 1) / 2) * ratio for k in range(count)]
        assert np.allclose(found[axis], expected)
        assert ends[axis] == pytest.approx((middle[axis] - count / 2 * ratio, middle[axis] + count / 2 * ratio))
    affine = resampled_affine(volume, spec, centre)
    for index in indices((4, 5, 3)):
        source = np.array([found[axis][index[axis]] for axis in range(3)])
        assert np.allclose(places(affine, index), places(volume.affine, source))
    assert np.array_equal(affine[3], [0, 0, 0, 1])
    assert np.array_equal(volume.affine, straight((3, 2, 1), (4, 5, 6))), "the volume's own is left alone"


@pytest.mark.parametrize("published", [False, True])
def test_a_grid_of_one_voxel_has_its_own_spacing(published: bool) -> None:
    volume = Volume(noise((6, 6, 6)), straight((1, 1, 1)), "x")
    spec = PreprocessingSpec("t", (3, 3, 3), (1, 1, 2), published_geometry=published)
    assert np.allclose(np.linalg.norm(resampled_affine(volume, spec)[:3, :3], axis=0), 3)


@pytest.mark.parametrize(("spacing", "shape", "target"), [
    ((2.0, 1.0, 1.0), (5, 12, 14), (1.5, 2.0, 1.3)), ((2.0, 1.0, 1.0), (9, 6, 5), (2.0, 0.7, 2.5)),
    ((1.0, 1.0, 1.0), (4, 5, 6), (1.0, 1.0, 1.0)), ((3.0, 1.1, 0.9), (4, 9, 11), (1.6, 1.2, 1.7)),
])  # fmt: skip
@pytest.mark.parametrize("size", [(5, 8, 6), (6, 5, 7)])
def test_the_published_geometry_is_torchs_interpolation_cropped_and_padded(spacing, shape, target, size) -> None:
    hu = noise(shape, -1500, 1500)
    volume = Volume(hu, straight(spacing, (1, 2, 3)), "x")
    spec = PreprocessingSpec("t", target, size, published_geometry=True)
    clipped = torch.from_numpy(np.clip(hu, -1000, 1000).astype(np.float64))[None, None]
    sizes = [int(n * s / t) for n, s, t in zip(shape, spacing, target, strict=True)]
    resized = torch.nn.functional.interpolate(clipped, size=sizes, mode="trilinear", align_corners=False)[0, 0].numpy()
    expected = np.full(size, -1000.0)
    # As CT-CLIP crops and pads: half of the excess, rounded down, before the volume.
    taken, put = [], []
    for have, want in zip(sizes, size, strict=True):
        start, before = max((have - want) // 2, 0), max((want - have) // 2, 0)
        count = min(have, want)
        taken.append(slice(start, start + count))
        put.append(slice(before, before + count))
    expected[tuple(put)] = resized[tuple(taken)]
    assert np.abs(resample(volume, spec) - expected.transpose(0, 2, 1)).max() < 0.01
    # A voxel of the result has the position that the affine gives.
    affine = resampled_affine(volume, spec)
    ratio = [n / r for n, r in zip(shape, sizes, strict=True)]
    first = [(t.start - p.start + 0.5) * r - 0.5 for t, p, r in zip(taken, put, ratio, strict=True)]
    assert np.allclose(affine[:3, 3], places(volume.affine, np.array(first)))
    one = np.array(first) + np.array([1, 2, 3]) * ratio
    assert np.allclose(places(affine, np.array([1, 3, 2])), places(volume.affine, one))


def test_an_axis_shorter_than_a_voxel_is_refused_by_the_published_geometry() -> None:
    spec = PreprocessingSpec("t", (4, 1, 1), (4, 4, 4), published_geometry=True)
    with pytest.raises(PreprocessingError, match="x: an axis of 3 voxels of 1 mm is shorter than one voxel of 4 mm"):
        resample(Volume(noise((3, 5, 5)), straight((1, 1, 1)), "x"), spec)
    assert resample(Volume(noise((4, 5, 5)), straight((1, 1, 1)), "x"), spec).shape == (4, 4, 4)


def weights(position: float, size: int, width: float) -> np.ndarray:
    """Weights (size,) of a triangle around a position: they sum to 1, and if the triangle is complete its centroid is
    the position."""
    centre = min(max(position, 0.0), size - 1.0)
    distance = np.arange(size) - centre
    triangle = np.array([max(0.0, 1 - abs(d) / width) for d in distance])
    triangle /= triangle.sum()
    if width > 1 and centre - width >= 0 and centre + width <= size - 1:
        moments = [[(triangle * distance**k).sum() for k in row] for row in ((0, 1), (1, 2))]
        level, slope = np.linalg.solve(moments, [1, 0])
        triangle = triangle * (level + slope * distance)
    return triangle


def dense(volume: Volume, spec: PreprocessingSpec, centre=None) -> np.ndarray:
    """The expected result of resampling, by full matrices along each axis."""
    array = np.clip(volume.array.astype(float), AIR, METAL)
    matrices, covered = [], []
    for axis in range(3):
        size, ratio = volume.array.shape[axis], spec.spacing[axis] / volume.spacing[axis]
        middle = (size - 1) / 2 if centre is None else centre[axis]
        positions = [middle + (k - (spec.shape[axis] - 1) / 2) * ratio for k in range(spec.shape[axis])]
        width = max(1.0, ratio) if spec.interpolation == "antialiased" else 1.0
        matrices.append(np.array([weights(p, size, width) for p in positions]))
        covered.append([-0.5 <= p <= size - 0.5 for p in positions])
    values = np.einsum("az,by,cx,zyx->abc", *matrices, array)
    return np.where(np.einsum("a,b,c->abc", *covered), values, spec.fill)


CASES = [
    ((3.0, 1.0, 1.0), (5, 9, 8), (2.0, 1.5, 2.2), (6, 5, 4)),  # more slices, fewer rows and columns
    ((1.0, 1.0, 1.0), (9, 6, 7), (2.5, 0.8, 1.0), (4, 6, 7)),  # fewer slices
    ((1.0, 1.0, 1.0), (9, 6, 17), (3.0, 1.0, 0.9), (5, 9, 6)),  # padded all around the slices and rows
    ((2.0, 1.0, 1.0), (4, 5, 6), (2.0, 1.0, 1.0), (6, 8, 9)),  # the same spacing; half voxels; padded
    ((2.0, 1.0, 1.0), (3, 7, 6), (1.0, 2.9, 1.0), (3, 1, 5)),
    ((1.0, 1.0, 1.0), (9, 6, 7), (2.1, 0.8, 1.6), (5, 6, 5)),  # voxels wider than a slice, around the outermost slices
]


@pytest.mark.parametrize(("spacing", "shape", "target", "size"), CASES)
@pytest.mark.parametrize("interpolation", ["antialiased", "linear"])
@pytest.mark.parametrize("centre", [None, (1.2, 3.0, 2.4)])
def test_resampling_is_a_sum_along_each_axis(spacing, shape, target, size, interpolation, centre) -> None:
    volume = Volume(noise(shape, -2000, 4000), straight(spacing), "x")
    spec = PreprocessingSpec("t", target, size, interpolation=interpolation, fill=-900.0)
    expected = dense(volume, spec, centre)
    hu = resample(volume, spec, centre=centre)
    assert hu.dtype == np.float32
    assert np.abs(hu - expected).max() < 0.01
    stored = resample(volume, spec, "stored", centre)
    assert stored.dtype == np.int16
    assert np.array_equal(stored, np.rint(hu))
    voxels = resample(volume, spec, "voxels", centre)
    assert voxels.dtype == np.float32
    assert np.abs(voxels - np.clip(expected, -1000, 1000) / 1000).max() < 1e-5
    if interpolation == "linear":
        affine = np.linalg.inv(volume.affine) @ resampled_affine(volume, spec, centre)
        source = places(affine, indices(size)).T
        values = map_coordinates(np.clip(volume.array, AIR, METAL).astype(float), source, order=1, mode="nearest")
        outside = ((source < -0.5) | (source > np.array(shape)[:, None] - 0.5)).any(axis=0)
        if min(size) > 1:
            assert np.abs(hu.ravel() - np.where(outside, -900, values)).max() < 0.01


@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_an_array_is_read_as_it_lies(flips, order) -> None:
    """Axes reversed and permuted without a copy give the same result as a copy."""
    for spacing, shape, target, size in CASES[:3]:
        array = noise(tuple(np.array(shape)[np.argsort(order)])).transpose(order)[
            tuple(slice(None, None, f) for f in flips)
        ]
        assert array.shape == shape
        spec = PreprocessingSpec("t", target, size)
        found = resample(Volume(array, straight(spacing), "x"), spec, centre=(1.2, 3.0, 2.4))
        expected = resample(Volume(array.copy(order="C"), straight(spacing), "x"), spec, centre=(1.2, 3.0, 2.4))
        assert np.abs(found - expected).max() < 0.01


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.float64, np.float32])
def test_arrays_of_any_type_are_resampled(kind: type) -> None:
    array, spec = noise((4, 5, 6), 0, 200), PreprocessingSpec("t", (1.3, 1.3, 1.3), (3, 3, 3))
    expected = resample(Volume(array, straight((1, 1, 1)), "x"), spec)
    found = resample(Volume(array.astype(kind), straight((1, 1, 1)), "x"), spec)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("factor", [2, 3])
def test_whole_factors_are_antialiased_as_torch_does(factor: int) -> None:
    hu = noise((4, 12, 18))
    spec = PreprocessingSpec("t", (1, factor, factor), (4, 12 // factor, 18 // factor))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(hu.astype(np.float32))[None], scale_factor=1 / factor, mode="bilinear", antialias=True
    )[0]
    assert np.abs(resample(Volume(hu, straight((1, 1, 1)), "x"), spec) - expected.numpy()).max() < 0.01


def test_a_voxel_whose_middle_lies_on_the_outer_face_is_of_the_volume() -> None:
    """The next voxel further out is filled."""
    hu = noise((4, 4, 4))
    found = resample(Volume(hu, straight((1, 1, 1)), "x"), PreprocessingSpec("t", (1, 1, 1), (7, 5, 5)))
    assert (found[[0, -1]] == -1000).all()
    edges = [0, 0, 1, 2, 3, 3]
    line = [(hu[a].astype(float) + hu[b]) / 2 for a, b in itertools.pairwise(edges)]
    assert np.allclose(found[1:-1, 0, 0], [plane[0, 0] for plane in line])
    assert np.allclose(found[1:-1, -1, -1], [plane[-1, -1] for plane in line])


@pytest.mark.parametrize("centre", [(-9.0, 2, 2), (2, 13.0, 2)])
def test_a_grid_beside_the_volume_is_refused(centre) -> None:
    volume, spec = Volume(noise((5, 5, 5)), straight((1, 1, 1)), "x"), PreprocessingSpec("t", (1, 1, 1), (4, 4, 4))
    for call in (resample, resampled_affine):
        with pytest.raises(PreprocessingError, match="does not overlap the grid"):
            call(volume, spec, centre=centre)
