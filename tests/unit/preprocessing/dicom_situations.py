"""Situations of DICOM series: how each is built, and the expected voxels, positions and messages.

If other readers decode the same input, their results are compared with ours: ``same`` names those that must give the
same voxels at the same positions, ``differ`` those that do not, with the reason why ours is nevertheless right.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import RLELossless

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.volume import Volume
from tests.unit.preprocessing.dicom_builder import affine, change, series, truth, write

HU = truth()
MOVED = truth(move=4.0)
OTHER = "1.2.826.0.1.3680043.8.498.2"
ALL = ("dcm2niix", "sitk", "pydicom")
TWO = "several acquisitions or reconstructions, which differ in {}: used 24 of 48 slices"
CHOSEN = ("2 series in the folder: used the best one",)
UNSIGNED = {"BitsStored": 16, "HighBit": 15}
SIGNED = {**UNSIGNED, "PixelRepresentation": 1}


@dataclass
class Row:
    """``build`` fills a folder; ``hu`` and ``affine`` are the expected result, or ``refused`` the words of the refusal.
    ``says`` are words of the expected warnings; there must be no others."""

    name: str
    build: Callable[[Path], object]
    hu: np.ndarray = field(default_factory=lambda: HU)
    affine: np.ndarray = field(default_factory=affine)
    says: tuple[str, ...] = ()
    refused: str = ""
    same: tuple[str, ...] = ()
    differ: dict[str, str] = field(default_factory=dict)


def both(one: list[Any], other: list[Any]) -> Callable[[Path], object]:
    """Two lists of images in one folder."""
    return lambda folder: (write(folder, one, "A"), write(folder, other, "B"))


def edited(
    edit: Callable[[int, Any], object] | None = None, hu: np.ndarray = HU, **tags: Any
) -> Callable[[Path], object]:
    return lambda folder: write(folder, series(hu, edit, **tags))


def each(change_file: Callable[[Path], object]) -> Callable[[Path], object]:
    """A good series whose files are rewritten."""

    def build(folder: Path) -> None:
        for path in write(folder, series(HU)).iterdir():
            change_file(path)

    return build


def at(indices: tuple[int, ...], **tags: Any) -> Callable[[int, Any], None]:
    """An edit of some slices."""

    def edit(index: int, data: Any) -> None:
        if index in indices:
            for keyword, value in tags.items():
                change(data, keyword, value)

    return edit


def per_slice(keyword: str, value: Callable[[int], Any]) -> Callable[[int, Any], None]:
    return lambda index, data: setattr(data, keyword, value(index))


def beside(count: int, hu: np.ndarray = MOVED, **tags: Any) -> list[Any]:
    """A second series."""
    return series(np.resize(hu, (count, *hu.shape[1:])), SeriesInstanceUID=OTHER, **tags)


def rle(data: Any) -> Any:
    data.compress(RLELossless, generate_instance_uid=False)
    return data


def check(row: Row, tmp_path: Path) -> None:
    """Build a situation, read it, and compare the result with the truth and with other readers' answers."""
    folder = tmp_path / "scan"
    row.build(folder)
    if row.refused:
        with pytest.raises(PreprocessingError, match=row.refused) as refusal:
            read(folder)
        assert str(refusal.value).startswith(f"{folder}: ")
        assert "\n" not in str(refusal.value)
        return
    volume = read(folder)
    assert len(volume.warnings) == len(row.says), volume.warnings
    for words, warning in zip(row.says, volume.warnings, strict=True):
        assert re.search(words, warning), (words, warning)
    if len(row.hu):
        assert volume.array.shape == row.hu.shape
        assert np.abs(volume.array.astype(float) - row.hu).max() < 1e-3
        assert np.allclose(volume.affine, row.affine, atol=1e-6)
    for name in (*row.same, *row.differ):
        others = OPINIONS[name](folder, tmp_path)
        agrees = any(_same(volume, array, matrix) for array, matrix in others)
        assert agrees == (name in row.same), f"{name}: {row.differ.get(name, 'is expected to agree')}"


def _same(volume: Volume, array: np.ndarray, matrix: np.ndarray | None) -> bool:
    """Whether another reader has our value at each of our positions. ``matrix``: its indices to LPS mm, or None."""
    if matrix is None:
        return array.shape == volume.array.shape and bool(np.abs(array - volume.array).max() < 1e-2)
    indices = np.indices(volume.array.shape).reshape(3, -1)
    places = (np.linalg.inv(matrix) @ volume.affine @ np.vstack([indices, np.ones(indices.shape[1])]))[:3]
    whole = np.rint(places).astype(int)
    if np.abs(places - whole).max() > 0.02 or sorted(array.shape) != sorted(volume.array.shape):
        return False
    if (whole < 0).any() or (whole >= np.array(array.shape)[:, None]).any():
        return False
    return bool(np.abs(array[tuple(whole)] - volume.array.ravel()).max() < 1e-2)


def _by_dcm2niix(folder: Path, out: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    program = pytest.importorskip("dcm2niix").bin
    (out / "nifti").mkdir()
    command = [program, "-z", "n", "-b", "n", "-o", str(out / "nifti"), str(folder)]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    images = [nib.load(path) for path in sorted((out / "nifti").glob("*.nii"))]
    flip = np.diag([-1.0, -1, 1, 1])
    return [(np.asarray(image.dataobj, dtype=float), flip @ image.affine) for image in images]  # type: ignore[attr-defined]


def _by_sitk(folder: Path, out: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    answers: list[tuple[np.ndarray, np.ndarray | None]] = []
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        try:
            image = sitk.ReadImage(names if len(names) > 1 else names[0])
        except RuntimeError:
            continue
        matrix = np.eye(4)
        matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        matrix[:3, 3] = image.GetOrigin()
        answers.append((sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(float), matrix))
    return answers


def _by_pydicom(folder: Path, out: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    files = [pydicom.dcmread(Path(root) / name) for root, _, names in os.walk(folder) for name in names]
    files.sort(key=lambda data: float(data.ImagePositionPatient[2]))
    planes = [
        data.pixel_array * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0)) for data in files
    ]
    return [(np.stack(planes), None)]


OPINIONS = {"dcm2niix": _by_dcm2niix, "sitk": _by_sitk, "pydicom": _by_pydicom}
