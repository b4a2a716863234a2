"""Functions for all formats: the shape of a volume, its values in memory, and the voxel file of a detached header."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError

LONGEST_NAME = 255


def volume_shape(sizes: Sequence[int], source: str) -> tuple[int, int, int]:
    """Three sizes of at least 2. Trailing axes of size 1 are dropped; any other shape is refused."""
    shape = tuple(int(size) for size in sizes)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3 and min(shape) > 1:
        count = prod(shape[3:])
        raise PreprocessingError(
            f"{source}: holds {count} volumes (phases?), shape {shape}; save the volume you want by itself"
        )
    if len(shape) != 3 or min(shape) < 2:
        raise PreprocessingError(f"{source}: has shape {shape}: not a volume of several slices")
    return shape[0], shape[1], shape[2]


def byte_count(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes of an array, in Python integers, because sizes in headers may overflow others."""
    count = dtype.itemsize
    for size in shape:
        count *= int(size)
    return count


def native(array: np.ndarray) -> np.ndarray:
    """Values as int16 if they fit, else float32, in native byte order."""
    if array.dtype.kind in "iu" and (array.dtype == np.int16 or (array.min() >= -32768 and array.max() <= 32767)):
        return array.astype(np.int16, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32, copy=False)


def detached(header: Path, name: str, source: str) -> Path:
    """The existing file that a detached header names, in the header's folder or below it.

    If there is none, backslashes are read as path separators and case is ignored, as on Windows.
    """
    relative = PurePosixPath(name if (header.parent / name).exists() else name.replace("\\", "/"))
    odd = "%" in name or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME
    if odd or relative.is_absolute() or ".." in relative.parts:
        raise PreprocessingError(
            f"{source}: its header names a data file that is not in its own folder or below; put both into one folder and "
            f"name it there"
        )
    path = header.parent / relative
    if not path.exists() and path.parent.is_dir():
        alike = [file for file in path.parent.iterdir() if file.name.lower() == path.name.lower()]
        path = alike[0] if len(alike) == 1 else path
    if not path.exists():
        raise PreprocessingError(f"{source}: the file of its voxels, {name}, is missing; copy it beside the header")
    if not path.resolve().is_relative_to(header.parent.resolve()):
        raise PreprocessingError(f"{source}: the file of its voxels, {name}, is a link that leads out of its folder")
    if not path.is_file():
        raise PreprocessingError(f"{source}: the file of its voxels, {name}, is not a file")
    return path
