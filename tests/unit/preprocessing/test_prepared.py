"""A saved prepared scan has the position of the scan, for nibabel, for SimpleITK and for us."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.pipeline import Prepared, prepare
from ctclip.preprocessing.spec import PreprocessingSpec

SHAPE = (40, 48, 56)
MARKER = (31, 12, 44)
# Columns to the right, rows to the front, slices to the head, with an offset: RAS+ mm, nibabel's convention.
AFFINE = np.array([[3.0, 0, 0, -70], [0, 3.0, 0, -60], [0, 0, 3.0, -500], [0, 0, 0, 1]])


def scan(folder: Path) -> Path:
    """Water in air with one dense voxel outside its middle."""
    voxels = np.full(SHAPE, -1000, dtype=np.int16)
    voxels[4:-4, 4:-4, 4:-4] = np.random.default_rng(0).integers(-80, 80, size=[n - 8 for n in SHAPE])
    voxels[MARKER] = 3000
    nib.save(nib.Nifti1Image(voxels, AFFINE), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def prepared(folder: Path, *, published: bool) -> Prepared:
    spec = PreprocessingSpec("test", (3.0, 3.0, 3.0), (40, 48, 48), published_geometry=published)
    return prepare(scan(folder), spec, hu="trust-file")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", ["saved.nii.gz", "saved.nii"])
def test_a_marker_is_where_it_was(published: bool, name: str, tmp_path: Path) -> None:
    ready = prepared(tmp_path, published=published)
    ready.save(tmp_path / name)
    truth = (AFFINE @ [*MARKER, 1])[:3]
    by_nibabel = nib.load(tmp_path / name)
    place = np.unravel_index(np.argmax(by_nibabel.get_fdata()), by_nibabel.shape)
    assert np.abs((by_nibabel.affine @ [*place, 1])[:3] - truth).max() <= 1.6, "half a voxel, and rounding"
    by_itk = sitk.ReadImage(str(tmp_path / name))
    index = np.unravel_index(np.argmax(sitk.GetArrayFromImage(by_itk)), by_itk.GetSize()[::-1])
    lps = np.array(by_itk.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]]))
    assert np.abs(lps * [-1, -1, 1] - truth).max() <= 1.6
    own = np.unravel_index(np.argmax(ready.hu), ready.hu.shape)
    assert np.abs((ready.affine_ras @ [*own, 1])[:3] - truth).max() <= 1.6
    assert np.abs((ready.affine_lps @ [*own, 1])[:3] * [-1, -1, 1] - truth).max() <= 1.6


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreprocessingError, match=r"\.nii\.gz"):
        prepared(tmp_path, published=False).save(tmp_path / "x.mha")
