"""Situations of volume files: the right voxels at the right position, or a refusal that states the reason.

An accepted file is compared voxel by voxel, at its position in the patient, with the truth from which it was built.
``nibabel`` and ``itk`` state how these libraries read the same bytes ("same", "refuses", or how they differ and why ours is
right). This is tested too, unless they would crash the process.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ctclip.preprocessing import PreprocessingError
from ctclip.preprocessing.geometry_check import Geometry, settle
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.volume import Volume
from tests.unit.preprocessing.scan_files import AFFINE, HU, RAS, meta, meta_header, nifti, patched, written

NIFTI = nifti()
NOT_ASKED = "not asked"
RAW = HU.tobytes()
STRAIGHT = np.array([[0, 0, 0.8, 0], [0, 0.9, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
GZ = gzip.compress(NIFTI)


@dataclass(frozen=True)
class Row:
    """``name`` of the file that is read and its ``content`` (bytes, or a function that fills a folder and returns the
    path); ``refused`` or ``warned``: words of the message, otherwise it is read without one. ``affine`` and ``hu``: the
    truth, if it differs from the default."""

    what: str
    name: str
    content: bytes | Callable[[Path], Path]
    refused: str = ""
    warned: str = ""
    geometry: Geometry = "auto"
    affine: np.ndarray | None = None
    hu: np.ndarray | None = None
    nibabel: str = NOT_ASKED
    itk: str = NOT_ASKED


def itk(what: str, name: str, content, refused: str = "", itk: str = "same", **more) -> Row:  # type: ignore[no-untyped-def]  # fmt: skip
    return Row(what, name, content, refused, itk=itk, **more)


def files(named: str, **others: bytes) -> Callable[[Path], Path]:
    """Several files; ``__`` in a name stands for a full stop and ``___`` for a folder."""

    def build(folder: Path) -> Path:
        for name, content in others.items():
            written(folder, name.replace("___", "/").replace("__", "."), content)
        return folder / named

    return build


def piped(named: str, content: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        os.mkfifo(folder / "voxels.raw")
        return written(folder, named, content)

    return build


def linked_out(folder: Path) -> Path:
    below = folder / "below"
    below.mkdir()
    written(folder, "secret.raw", HU.tobytes())
    (below / "scan.raw").symlink_to(folder / "secret.raw")
    return written(below, "scan.mhd", meta_header(ElementDataFile="scan.raw"))


def split(content: bytes) -> tuple[bytes, bytes]:
    """A single NIfTI file as a pair of files."""
    return patched(content, magic=("4s", b"ni1\0"), vox_offset=("f", 0))[:348], content[352:]


HEADER, VOXELS = split(NIFTI)
DETACHED = {"study/scan.mhd": meta(b"", ElementDataFile="scan.raw"), "study/scan.raw": RAW}


def check(row: Row, tmp_path: Path) -> None:
    """Build a situation, read it, and compare the result with the truth and with other readers' answers."""
    path = row.content(tmp_path) if callable(row.content) else written(tmp_path, row.name, row.content)
    if row.refused:
        with pytest.raises(PreprocessingError, match=row.refused) as refused:
            settle(read(path, geometry=row.geometry), None, row.geometry)
        assert str(refused.value).startswith(f"{path}: ")
        assert "\n" not in str(refused.value)
    else:
        volume = settle(read(path, geometry=row.geometry), None, row.geometry)
        assert same(volume, row), "other voxels, or at another place"
        assert row.warned in " ".join(volume.warnings)
        assert bool(row.warned) == bool(volume.warnings), volume.warnings
    for name, said, ask in (("nibabel", row.nibabel, by_nibabel), ("itk", row.itk, by_itk)):
        if not said.startswith(NOT_ASKED):
            assert (name, answer(ask, path, row)) == (name, said.partition(":")[0])


def same(volume: Volume, row: Row) -> bool:
    """Whether every voxel has the value of the truth at its position; the order of the axes is irrelevant."""
    hu, affine = HU if row.hu is None else row.hu, AFFINE if row.affine is None else row.affine
    index = np.indices(volume.array.shape).reshape(3, -1)
    place = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    there = np.linalg.inv(affine[:3, :3]) @ (place - affine[:3, 3:])
    near = there.round().astype(int)
    inside = volume.array.size == hu.size and np.abs(there - near).max() < 1e-2 and near.min() >= 0
    if not inside or (near.max(axis=1) >= np.array(hu.shape)).any():
        return False
    return bool(np.array_equal(volume.array.reshape(-1), hu[tuple(near)]))


def answer(ask: Callable[[Path], Volume], path: Path, row: Row) -> str:
    try:
        volume = ask(path)
    except Exception:
        return "refuses"
    return "same" if same(volume, row) else "differs"


def by_nibabel(path: Path) -> Volume:
    image = nib.load(path)
    array = np.asarray(image.dataobj)
    return Volume(array.reshape(array.shape[:3]), RAS @ image.affine, "")


def by_itk(path: Path) -> Volume:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image), affine, "")
