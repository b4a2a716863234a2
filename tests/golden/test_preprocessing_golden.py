"""The published CT-CLIP's own loader, on two real volumes."""

from __future__ import annotations

import numpy as np
import pytest

from ctclip.preprocessing import prepare

CASES = {
    "ts_chestCTA_aorta_crop": "nifti/ts_chestCTA_aorta_crop_1p5mm_LPS.nii.gz",
    "lungdx_A0002_siemens_B40f_8mm_30": "dicom/lungdx_A0002_siemens_B40f_8mm_30",
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_published_loader(shared, name: str) -> None:
    golden = np.load(shared / "upstream_parity" / "preprocessing" / f"{name}.npz")
    voxels = prepare(shared / "ct" / CASES[name], "ct_clip").voxels
    offset, stride = int(golden["offset"]), int(golden["stride"])
    assert voxels.shape == (240, 480, 480)
    assert np.abs(voxels[offset::stride, offset::stride, offset::stride] - golden["values"]).max() < 1e-4
    assert abs(voxels.mean(dtype=np.float64) - golden["mean"]) < 1e-6
    assert abs(voxels.std(dtype=np.float64) - golden["std"]) < 1e-6
