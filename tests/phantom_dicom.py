"""A volume of the phantom as a DICOM series, on the same grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tests.unit.preprocessing import dicom_builder


def write_series(scan: Path, folder: Path, **tags: Any) -> Path:
    """A NIfTI without rotation (its first voxel is at the patient's right, anterior and inferior) as single-frame
    images; ``tags`` are set in all of them, None deletes one."""
    image = nib.load(scan)
    hu = np.rint(image.get_fdata()).astype(np.int16).transpose(2, 1, 0)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    assert np.allclose(lps[:3, :3], np.diag(np.diag(lps[:3, :3])))
    assert (np.diag(lps) > 0).all()

    def place(index: int, data: Any) -> None:
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{data.SeriesInstanceUID}.{index + 1}"
        data.ImagePositionPatient = [f"{value:.6f}" for value in (lps @ [0, 0, index, 1])[:3]]
        data.PixelSpacing, data.SliceThickness = [f"{lps[1, 1]:.8f}", f"{lps[0, 0]:.8f}"], f"{lps[2, 2]:.6f}"

    return dicom_builder.write(folder, dicom_builder.series(np.clip(hu, -1024, 3071), place, **tags))
