"""RAD-ChestCT (Draelos et al. 2021): array ``ct`` of an .npz, 0.8 mm isotropic, HU."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import streams
from ctclip.preprocessing.formats.voxels import byte_count, native, volume_shape
from ctclip.preprocessing.volume import Volume

MEMBER = "ct.npy"


def read(path: Path, source: str, largest: int) -> Volume:
    """A volume [slice, row, column].

    The file has no header. The data set's own table of lung limits (``sup_axis0min``, ``ant_axis1min``,
    ``rig_axis2min``) shows the orientation: slices from head to feet, rows from front to back, columns from right to
    left.
    """
    try:
        with streams.open_regular(path, source) as file, zipfile.ZipFile(file) as archive:
            if MEMBER not in archive.namelist():
                raise PreprocessingError(f"{source}: has no array 'ct'; only RAD-ChestCT's .npz files are read")
            if archive.getinfo(MEMBER).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise PreprocessingError(f"{source}: uses a compression that is not supported; save it with numpy")
            with archive.open(MEMBER) as stream:
                shape, fortran, dtype = _header(stream, source)
                size = byte_count(shape, dtype)
                streams.plausible(size, streams.size_of(file), largest, source)
                # zipfile compares the member's CRC-32 at its end.
                content, _ = streams.exactly(stream, size, source)
    except streams.DAMAGE as error:
        raise PreprocessingError(f"{source}: cannot be read ({type(error).__name__}); copy it again") from error
    array = content.view(dtype).reshape(shape, order="F" if fortran else "C")
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = -0.8, 0.8, 0.8, 1.0
    return Volume(native(array), affine, source, fixed_geometry=True)


def _header(stream: Any, source: str) -> tuple[tuple[int, int, int], bool, np.dtype]:
    """Shape, whether it is in Fortran order, and type; numpy limits the header's length."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, dtype = readers[version](stream)
    except Exception as error:
        # numpy parses the header as a Python literal, so a damaged one may raise any exception.
        raise PreprocessingError(f"{source}: the header of its array is damaged; copy it again") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise PreprocessingError(f"{source}: its voxels have a type that no CT has")
    return volume_shape(shape, source), fortran, dtype
