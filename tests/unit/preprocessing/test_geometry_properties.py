"""Property-based: a point in the patient keeps its position and value through orientation, spacing, flip and
obliquity."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ctclip.preprocessing.geometry import orient, resample, resampled_affine
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import Volume

TURNS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1.0, -1.0), repeat=3)
]


def blob(shape: tuple[int, int, int], affine: np.ndarray, place: np.ndarray, width: float) -> np.ndarray:
    """-1000 HU with a Gaussian of +800 at a point of the patient (LPS+ mm)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    distance = ((world - place) ** 2).sum(axis=-1)
    return (-1000 + 1800 * np.exp(-distance / (2 * width**2))).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(TURNS),
    st.tuples(*[st.floats(1.0, 3.0)] * 3),
    st.floats(-25, 25),
    st.floats(-25, 25),
    st.tuples(*[st.floats(-6, 6)] * 3),
    st.tuples(*[st.floats(1.0, 3.0)] * 3),
)
def test_a_point_keeps_its_place_and_value(turn, spacing, yaw, pitch, offset, target) -> None:
    axes, flips = turn
    shape = tuple(int(np.ceil(72 / step)) for step in spacing)
    a, b = np.radians(yaw), np.radians(pitch)
    rotation = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    rotation = rotation @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    direction = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(axes, flips, strict=True)):
        direction[world, axis] = sign
    affine = np.eye(4)
    affine[:3, :3] = rotation @ direction @ np.diag(spacing)
    affine[:3, 3] = np.array([30.0, -12.0, 200.0])
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    place = middle + offset
    spec = PreprocessingSpec("any", target, tuple(int(np.ceil(90 / step)) for step in target))
    volume = orient(Volume(blob(shape, affine, place, 9.0), affine, "point"))
    hu, back = resample(volume, spec), resampled_affine(volume, spec)
    excess = np.maximum(hu + 950.0, 0)
    index = np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), axis=-1)
    centre = (index * excess[..., None]).reshape(-1, 3).sum(axis=0) / excess.sum()
    found = back[:3, :3] @ centre + back[:3, 3]
    assert np.linalg.norm(found - place) < 0.25
    # Interpolation and antialiasing lower the maximum of the Gaussian by less than a tenth at these spacings.
    assert 800 - 180 < hu.max() < 801


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(4, 20)] * 3), st.tuples(*[st.integers(0, 9)] * 3))
def test_padding_and_cropping_are_inverse(shape, margin) -> None:
    """With the volume's own spacing nothing is resampled: after padding and cropping back, the voxels are the same."""
    random = np.random.default_rng(0)
    hu = random.integers(-1000, 1000, shape).astype(np.int16)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 3.0, 2.0, 2.0, 1.0
    # Grids of equal parity share their centre voxels.
    larger = tuple(n + 2 * m for n, m in zip(shape, margin, strict=True))
    volume, large = Volume(hu, affine, "x"), PreprocessingSpec("large", (3.0, 2.0, 2.0), larger)
    padded = resample(volume, large)
    outside = np.ones(larger, bool)
    outside[tuple(slice(m, m + n) for n, m in zip(shape, margin, strict=True))] = False
    assert (padded[outside] == -1000).all()
    assert np.abs(padded[~outside] - hu.ravel()).max() < 1e-3
    again, small = Volume(padded, resampled_affine(volume, large), "x"), PreprocessingSpec("s", (3.0, 2.0, 2.0), shape)
    assert np.abs(resample(again, small) - hu).max() < 1e-3
    assert np.allclose(resampled_affine(again, small), affine)
