"""Read a Volume from a path. The format is detected, first by content, and read by its module."""

from __future__ import annotations

import os
from pathlib import Path

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import archive, metaimage, nifti, npz, nrrd, streams
from ctclip.preprocessing.formats.others import DECOMPRESS, other_kind
from ctclip.preprocessing.geometry_check import Geometry
from ctclip.preprocessing.identifiers import TAGS, is_directory_record, read_header
from ctclip.preprocessing.volume import Volume

LARGEST_GB = archive.LARGEST_GB
APPLE_DOUBLE = b"\0\5\x16\7"
# Raw voxel files may begin with any bytes.
VOXELS_OF_PAIRS = (".img", ".img.gz")


def read(
    path: str | os.PathLike[str],
    series: str | None = None,
    geometry: Geometry = "auto",
    *,
    largest_gb: float = LARGEST_GB,
) -> Volume:
    """Read a file, a DICOM folder or an archive of one; the values are as stored, see ``hounsfield.to_hu``.

    ``series`` names one series (SeriesInstanceUID) of several. ``geometry`` selects one of the geometries of a NIfTI
    header; a doubtful geometry is described in ``Volume.geometry_doubt``, and ``geometry_check.settle`` resolves the
    doubt. ``largest_gb`` limits the voxels of a volume and the unpacked size of an archive, in 1e9 bytes. Raises
    PreprocessingError.
    """
    path = Path(path)
    try:
        return _read(path, str(path), series, geometry, int(largest_gb * 1e9))
    except PreprocessingError:
        raise
    except MemoryError as error:
        raise PreprocessingError(f"{path}: does not fit in memory") from error
    except Exception as error:
        # The libraries parse untrusted bytes, which can make them raise any exception. Messages may quote the
        # header, so only the type of the exception is passed on.
        raise PreprocessingError(f"{path}: cannot be read ({type(error).__name__}); it is damaged") from error


def _read(path: Path, source: str, series: str | None, geometry: Geometry, largest: int) -> Volume:
    name = path.name.lower()
    if path.is_dir():
        return _dicom(path, series, largest)
    if not path.is_file():
        raise PreprocessingError(f"{source}: {'not a file' if path.exists() else 'no such file'}")
    with streams.open_regular(path, source) as stream:
        head = stream.read(512)
    if not head:
        raise PreprocessingError(f"{source}: is empty; copy it again")
    if head[:4] == APPLE_DOUBLE:
        raise PreprocessingError(f"{source}: a metadata file of macOS, not a scan; give the scan itself")
    if not name.endswith(VOXELS_OF_PAIRS) and (other := other_kind(head, name)):
        raise PreprocessingError(f"{source}: {other}")
    if head[:4] in archive.ZIP and name.endswith(".npz"):
        return npz.read(path, source, largest)
    compression, start = streams.start(path, source)
    if nifti.is_header(start) and compression != "bzip2":
        return nifti.read(path, source, geometry, largest)
    packed = head[:4] in archive.ZIP or (name.endswith(archive.SUFFIXES) and not head.startswith(b"NRRD"))
    if packed or (not name.endswith(nifti.SUFFIXES) and archive.is_tar(path)):
        with archive.unpacked(path, source, largest) as scan:
            if scan.is_dir():
                return _dicom(scan, series, largest, name=path)
            return _read(scan, source, series, geometry, largest)
    by_content = not name.endswith(VOXELS_OF_PAIRS)
    if head[:4] == b"NRRD" or name.endswith((".nrrd", ".nhdr")):
        return nrrd.read(path, source, largest)
    if (by_content and metaimage.is_header(head)) or name.endswith((".mha", ".mhd")):
        return metaimage.read(path, source, largest)
    if name.endswith(nifti.SUFFIXES):
        return nifti.read(path, source, geometry, largest)
    if name.endswith(".npz"):
        return npz.read(path, source, largest)
    if compression:
        raise PreprocessingError(f"{source}: is compressed ({compression}), {DECOMPRESS}")
    # A DICOMDIR, whatever its name, represents the files beside and below it.
    return _dicom(path.parent, series, largest, only=None if is_directory_record(read_header(path, TAGS)) else path)


def _dicom(
    folder: Path, series: str | None, largest: int, only: Path | None = None, name: Path | None = None
) -> Volume:
    """A series of a folder and its subfolders: the one called ``series``, or the one with the file ``only``, or the
    best.

    ``name`` is its name in messages. Imported here: pydicom is slow to load, and other formats do not need it.
    """
    from ctclip.preprocessing.dicom import read_series

    return read_series(folder, series, only, name, largest=largest)
