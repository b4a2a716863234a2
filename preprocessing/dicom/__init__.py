"""From DICOM series to volumes: choice of files, series and acquisition, order of slices, values in HU."""

from __future__ import annotations

from pathlib import Path

from ctclip.preprocessing.volume import Volume


def read_series(
    folder: Path, series: str | None = None, only: Path | None = None, name: Path | None = None, *, largest: int
) -> Volume:
    """The CT volume [slice, row, column] in HU of a DICOM series below ``folder``; see ``dicom.series`` for which one.

    ``series`` names one by its SeriesInstanceUID, ``only`` takes the one that holds a file, and ``name`` is what
    messages call the input (a zip, instead of the folder it was unpacked to). ``largest`` bounds the
    bytes of the voxels. Raises PreprocessingError.
    """
    # Imported here: ``identifiers`` imports ``dicom.headers``, and the series imports ``identifiers``.
    from ctclip.preprocessing.dicom.series import read

    return read(folder, series, only, name, largest)
