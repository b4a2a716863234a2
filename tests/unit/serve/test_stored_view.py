"""A stored volume is shown, and its findings are located, with its axes in the directions of the scan's axes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from ctclip.preprocessing.pipeline import prepare
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.serve.worker import stored, write_view


@pytest.mark.parametrize("published", [False, True])
def test_a_stored_volume_is_where_the_file_has_it(tmp_path: Path, published: bool) -> None:
    """A file whose axes run to the back, the left and the feet, and whose voxels and grid differ along each axis."""
    random = np.random.default_rng(0)
    hu = 60 * gaussian_filter(random.normal(size=(40, 36, 30)), 3) / 0.01
    affine = np.array([[0, -1.5, 0, 20.0], [-1.2, 0, 0, 30.0], [0, 0, -2.0, 10.0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.clip(hu, -900, 900).round().astype(np.int16), affine), tmp_path / "scan.nii.gz")
    spec = PreprocessingSpec(
        "test", spacing=(2.0, 1.5, 1.5) if published else (2.5, 1.8, 1.4), shape=(16, 20, 20) if published else (16, 20, 24), published_geometry=published,
    )  # fmt: skip
    prepared = prepare(tmp_path / "scan.nii.gz", spec, expect="any", hu="trust-file")
    store = VolumeStore.create(tmp_path / "store", spec)
    store.write("scan", prepared.stored)
    again = stored(store, "scan")
    write_view(again.scan.array, again.scan.affine, tmp_path / "view.nii.gz")
    view, source = nib.load(tmp_path / "view.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    # mm from the middle of the view, converted to the file's space relative to the file's middle.
    points = np.stack(np.meshgrid(*map(np.arange, view.shape), indexing="ij"), -1).reshape(-1, 3)
    mm = nib.affines.apply_affine(view.affine, points)
    np.testing.assert_allclose(mm.mean(axis=0), 0, atol=1e-4)
    middle = nib.affines.apply_affine(source.affine, (np.array(source.shape) - 1) / 2)
    there = nib.affines.apply_affine(np.linalg.inv(source.affine), mm + middle)
    expected = map_coordinates(source.get_fdata(), there.T, order=1, mode="nearest")
    assert np.corrcoef(view.get_fdata().ravel(), expected)[0, 1] > 0.98
    # The grid of the model's voxels and that of the scan consist of the same points.
    np.testing.assert_allclose(again.affine[:3, 3], again.scan.affine[:3, 3])
    moved = np.diff(np.stack([prepared.affine[:3, :3], again.affine[:3, :3]]), axis=0)
    np.testing.assert_allclose(moved, 0, atol=1e-6 if not published else 0.2)
