"""Positions in a prepared scan: for nibabel and SimpleITK, a marker has its position in the original file."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ctclip.preprocessing import PreprocessingError, PreprocessingSpec, prepare

MARKER = np.array([31.0, -22.0, 17.0])  # RAS+ mm
SHAPE, SPACING = (60, 66, 54), (2.0, 1.8, 2.2)
SPECS = [
    PreprocessingSpec("plain", spacing=(2.5, 2.0, 2.0), shape=(64, 80, 76)),
    PreprocessingSpec("published", spacing=(2.5, 2.0, 2.0), shape=(64, 80, 76), published_geometry=True),
]


def rotation(degrees: float) -> np.ndarray:
    """Rotation about an axis that is not one of the grid's."""
    axis, angle = np.array([1.0, 2.0, 3.0]) / np.sqrt(14), np.deg2rad(degrees)
    cross = np.cross(np.eye(3), axis)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def scan_with_marker(path: Path, axes: tuple[int, ...], signs: tuple[int, ...], degrees: float) -> Path:
    """Air with a spot of dense tissue at ``MARKER``, on a grid whose axes run along ``axes`` with ``signs``,
    rotated."""
    affine = np.eye(4)
    matrix = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        matrix[axis, column] = sign * SPACING[column]
    affine[:3, :3] = rotation(degrees) @ matrix
    affine[:3, 3] = np.array([4.0, 9.0, -6.0]) - affine[:3, :3] @ (np.array(SHAPE) - 1) / 2
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    distance = ((index @ affine[:3, :3].T + affine[:3, 3] - MARKER) ** 2).sum(-1)
    image = nib.Nifti1Image((-1000 + 1500 * np.exp(-distance / 2 / 5.0**2)).astype(np.int16), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def centre(hu: np.ndarray) -> np.ndarray:
    """Centre of mass above air, as an index."""
    weights = np.clip(hu.astype(float) + 900, 0, None)
    return np.array([(weights * place).sum() / weights.sum() for place in np.indices(hu.shape)])


GRIDS = [
    *[((0, 1, 2), signs, 0.0) for signs in itertools.product((1, -1), repeat=3)],
    ((2, 0, 1), (1, -1, 1), 0.0), ((1, 2, 0), (-1, 1, -1), 0.0), ((0, 1, 2), (-1, -1, 1), 12.0), ((0, 1, 2), (1, 1, 1), 20.0),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(("axes", "signs", "degrees"), GRIDS)
def test_a_marker_stays_where_it_is(
    spec: PreprocessingSpec, axes: tuple[int, ...], signs: tuple[int, ...], degrees: float, tmp_path: Path
) -> None:
    ready = prepare(scan_with_marker(tmp_path / "scan.nii.gz", axes, signs, degrees), spec, hu="trust-file")
    ready.save(tmp_path / "saved.nii.gz")
    image = nib.load(tmp_path / "saved.nii.gz")
    assert nib.affines.apply_affine(image.affine, centre(np.asarray(image.dataobj))) == pytest.approx(MARKER, abs=0.3)
    assert image.get_sform() == pytest.approx(image.get_qform(), abs=1e-3)

    other = sitk.ReadImage(str(tmp_path / "saved.nii.gz"))
    point = other.TransformContinuousIndexToPhysicalPoint(centre(sitk.GetArrayFromImage(other))[::-1].tolist())
    assert np.array(point) * [-1, -1, 1] == pytest.approx(MARKER, abs=0.3)

    # Computed by hand, in both conventions.
    place = centre(ready.hu)
    assert nib.affines.apply_affine(ready.affine_ras, place) == pytest.approx(MARKER, abs=0.3)
    assert nib.affines.apply_affine(ready.affine_lps, place) * [-1, -1, 1] == pytest.approx(MARKER, abs=0.3)
    assert image.shape == ready.hu.shape[::-1]


def test_other_names_are_refused(tmp_path: Path) -> None:
    ready = prepare(scan_with_marker(tmp_path / "scan.nii.gz", (0, 1, 2), (-1, -1, 1), 0.0), SPECS[0], hu="trust-file")
    with pytest.raises(PreprocessingError, match=r"end the name in \.nii\.gz"):
        ready.save(tmp_path / "saved.mha")
