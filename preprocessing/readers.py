"""Files of strangers to a Volume: NIfTI, NRRD, MetaImage and DICOM. Sizes are checked before anything is allocated.

Nothing of a header but geometry and rescaling leaves this file: no name, id or date reaches a message.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.geometry_check import Geometry
from ctclip.preprocessing.identifiers import TAGS, is_directory_record, read_header
from ctclip.preprocessing.volume import Volume

LARGEST_VOXELS = 2**31
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(path: str | os.PathLike[str], series: str | None = None, geometry: Geometry = "auto") -> Volume:
    """Read a file or a DICOM folder (or a zip of one); the values are as stored, see ``hounsfield.to_hu``.

    ``series`` names one series (SeriesInstanceUID) of several. ``geometry`` says which of a NIfTI header's readings is
    taken; what cannot be taken as it is stands in ``Volume.geometry_doubt``, and ``geometry_check.settle`` decides on it.
    Raises PreprocessingError with one clear line.
    """
    path = Path(path)
    try:
        return _read(path, series)
    except PreprocessingError:
        raise
    except MemoryError as error:
        raise PreprocessingError(f"{path}: does not fit in memory") from error
    except Exception as error:
        # The libraries parse bytes of strangers and raise whatever those make them raise; what they say may quote the
        # header, so only the kind is passed on.
        raise PreprocessingError(f"{path}: cannot be read ({type(error).__name__}); it is damaged") from error


def _read(path: Path, series: str | None) -> Volume:
    name = path.name.lower()
    if path.is_dir():
        return read_dicom(path, series)
    if not path.is_file():
        raise PreprocessingError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if path.stat().st_size == 0:
        raise PreprocessingError(f"{path}: is empty; copy it again")
    if name.endswith((".nii", ".nii.gz")):
        return read_nifti(path)
    if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        return read_itk(path)
    if name.endswith(".npz"):
        return read_rad_chestct(path)
    if name.endswith(".zip"):
        return read_zip(path, series)
    # A DICOMDIR, whatever it is called, stands for what lies beside and below it.
    return read_dicom(path.parent, series, only=None if is_directory_record(read_header(path, TAGS)) else path)


def read_nifti(path: Path) -> Volume:
    """A ``.nii`` or ``.nii.gz``; slope and intercept of its header are applied where it sets them."""
    from isal import igzip, isal_zlib

    zipped = path.name.lower().endswith(".gz")
    damaged: Any = (OSError, EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile)
    try:
        with igzip.open(path, "rb") if zipped else path.open("rb") as stream:
            header = _nifti_header(path, stream.read(540))
            shape = _volume_shape(path, header.get_data_shape())
            offset, dtype = _nifti_layout(path, header)
            if dtype.kind not in "iuf" or dtype.itemsize > 8:
                raise PreprocessingError(f"{path}: voxels of type {dtype} are not a CT")
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if not zipped and path.stat().st_size < offset + size:
                raise PreprocessingError(
                    f"{path}: cut short ({path.stat().st_size} of {offset + size} bytes); copy it again"
                )
            if zipped and size > 1100 * path.stat().st_size:
                # No deflate stream expands more than 1032-fold: the header claims what the file cannot hold.
                raise PreprocessingError(f"{path}: cut short, or its header is wrong; copy it again")
            stream.seek(offset)
            data = stream.read(size)
    except damaged as error:
        raise PreprocessingError(f"{path}: cannot be read ({' '.join(str(error).split())}); copy it again") from error
    if len(data) < size:
        raise PreprocessingError(f"{path}: cut short ({len(data)} of {size} bytes of voxels); copy it again")
    array = np.frombuffer(data, dtype).reshape(shape, order="F")
    slope, intercept, affine = _nifti_scale_and_affine(path, header)
    if (slope, intercept) != (1.0, 0.0):
        array = array.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            array *= np.float32(slope)
            array += np.float32(intercept)
    return Volume(_native(array), RAS_TO_LPS @ affine, str(path))


def _nifti_layout(path: Path, header: Any) -> tuple[int, np.dtype]:
    from nibabel.spatialimages import HeaderDataError

    try:
        offset, dtype = int(header["vox_offset"]), header.get_data_dtype()
    except (HeaderDataError, ValueError, OverflowError, KeyError) as error:
        raise PreprocessingError(f"{path}: its header is damaged; convert it from DICOM again") from error
    if offset < 0:
        raise PreprocessingError(f"{path}: its header is damaged; convert it from DICOM again")
    return offset, dtype


def _nifti_scale_and_affine(path: Path, header: Any) -> tuple[float, float, np.ndarray]:
    from nibabel.spatialimages import HeaderDataError

    try:
        with np.errstate(all="ignore"):
            slope, intercept = header.get_slope_inter()
            affine = header.get_best_affine()
    except (HeaderDataError, ValueError, OverflowError, np.linalg.LinAlgError) as error:
        raise PreprocessingError(f"{path}: its header is damaged; convert it from DICOM again") from error
    if not (np.abs(affine) < 1e6).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise PreprocessingError(f"{path}: its header has no usable geometry (affine); convert it from DICOM again")
    return (1.0, 0.0, affine) if slope is None else (float(slope), float(intercept or 0), affine)


def _nifti_header(path: Path, block: bytes) -> Any:
    import nibabel as nib

    for kind, magic, size in ((nib.Nifti1Header, b"n+1", 348), (nib.Nifti2Header, b"n+2", 540)):
        # Unchecked: nibabel mends headers aloud, here what is wrong is refused.
        for order in "<>":
            header = kind(block[:size], endianness=order, check=False) if len(block) >= size else None
            if header is not None and int(header["sizeof_hdr"]) == size and bytes(header["magic"])[:3] == magic:
                return header
    raise PreprocessingError(f"{path}: not a NIfTI file, whatever its name says")


def _volume_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        raise PreprocessingError(f"{path}: of shape {tuple(int(n) for n in shape)}, not a volume of several slices")
    if np.prod(shape, dtype=float) > LARGEST_VOXELS:
        raise PreprocessingError(
            f"{path}: its header claims {tuple(int(n) for n in shape)} voxels, more than any CT has"
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _native(array: np.ndarray) -> np.ndarray:
    """Values in the smallest of int16 and float32 that holds them, in this machine's byte order."""
    if array.dtype.kind in "iu" and (array.dtype == np.int16 or (array.min() >= -32768 and array.max() <= 32767)):
        return array.astype(np.int16, copy=False)
    return array.astype(np.float32)


def read_itk(path: Path) -> Volume:
    """NRRD or MetaImage by SimpleITK."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = _volume_shape(path, reader.GetSize()[::-1])
        if reader.GetNumberOfComponents() != 1:
            raise PreprocessingError(f"{path}: has {reader.GetNumberOfComponents()} values a voxel, not a CT")
        if np.prod(shape, dtype=float) > 1100 * max(1, _bytes_beside(path)):
            raise PreprocessingError(f"{path}: cut short, or its header is wrong; copy it again")
        image = reader.Execute()
    except RuntimeError as error:
        raise PreprocessingError(f"{path}: cannot be read ({_short(error)}); copy it again") from error
    return from_sitk(image, str(path))


def _bytes_beside(path: Path) -> int:
    # Detached headers (.mhd, .nhdr) keep their voxels in another file of the same folder.
    if path.suffix.lower() in (".mhd", ".nhdr"):
        return sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
    return path.stat().st_size


def from_sitk(image, source: str) -> Volume:  # type: ignore[no-untyped-def]
    """A SimpleITK image (its physical space is LPS) as a Volume [slice, row, column]."""
    import SimpleITK as sitk

    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = (direction * np.array(image.GetSpacing()))[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return Volume(_native(sitk.GetArrayFromImage(image)), affine, source)


def read_rad_chestct(path: Path) -> Volume:
    """A volume of RAD-ChestCT (Draelos et al. 2021): array ``ct`` of an .npz, 0.8 mm isotropic, HU.

    The file has no header. The data set's own table of lung limits (``sup_axis0min``, ``ant_axis1min``,
    ``rig_axis2min``) says how it lies: slices from head to feet, rows from front to back, columns from right to left.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if "ct.npy" not in archive.namelist():
                raise PreprocessingError(f"{path}: has no array 'ct'; only RAD-ChestCT's .npz files are read")
            packed = archive.getinfo("ct.npy")
            with archive.open(packed) as stream:
                version = np.lib.format.read_magic(stream)
                reader = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = reader(stream)
                _volume_shape(path, shape)
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                if dtype.kind not in "iuf" or size > packed.file_size or packed.file_size > 1100 * path.stat().st_size:
                    raise PreprocessingError(f"{path}: its header does not fit its contents; copy it again")
                data = stream.read(size)
    except PreprocessingError:
        raise
    except Exception as error:
        # numpy parses a damaged header as Python source, and raises whatever that raises.
        raise PreprocessingError(f"{path}: cannot be read ({_short(error)}); copy it again") from error
    if len(data) < size:
        raise PreprocessingError(f"{path}: cut short; copy it again")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = -0.8, 0.8, 0.8, 1.0
    return Volume(_native(array), affine, str(path))


def read_zip(path: Path, series: str | None) -> Volume:
    """A zip of one DICOM series, unpacked beside nothing: into a temporary folder, by numbers instead of names."""
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            members = [member for member in archive.infolist() if not member.is_dir()]
            total = sum(member.file_size for member in members)
            if len(members) > 20000 or total > 8 * LARGEST_VOXELS or total > 1100 * path.stat().st_size:
                raise PreprocessingError(
                    f"{path}: would unpack to {total / 1e9:.1f} GB in {len(members)} files; refused"
                )
            for number, member in enumerate(members):
                Path(folder, f"{number:06d}").write_bytes(archive.read(member))
            return read_dicom(Path(folder), series, name=path)
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError) as error:
        # What zipfile says may quote the names inside, and those the patient's.
        raise PreprocessingError(f"{path}: not a readable zip ({type(error).__name__}); copy it again") from error


def read_dicom(folder: Path, series: str | None = None, only: Path | None = None, name: Path | None = None) -> Volume:
    """A DICOM series of a folder and those below it: the one ``series`` names; else the one with most axial slices, of
    equals the last by path; ``only`` takes the one that holds a file.

    Slices are put in order and checked by their positions: tilt is corrected, uneven gaps are resampled up to three
    times the usual, copies are left out, single missing slices interpolated, all of it aloud; more is refused.
    """
    from ctclip.preprocessing.dicom import read_series

    return read_series(folder, series, only, name)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[-160:]
